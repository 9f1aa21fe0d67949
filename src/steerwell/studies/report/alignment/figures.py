"""The figures of an alignment report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np

from steerwell.studies.conversation import curve
from steerwell.studies.defence import COHERENCE_FLOOR, Configuration
from steerwell.studies.report.alignment.measures import Overview
from steerwell.studies.report.content import Picture
from steerwell.studies.report.draw import INK, SIZE, level, look, svg
from steerwell.studies.results import CellResult

CROWD = 100  # points from which they are drawn small
SCORES = (-4, 104)  # axis of a score, with room for markers


@dataclass(frozen=True, slots=True)
class Tried:
    """Validation scores of a cell's sweep, 0-100.

    Attributes:
        ways: what was tried to the end, by index.
        trait: by index; `coherence`: likewise.
        baseline: trait and coherence, unsteered and not attacked; `attacked`: unsteered under attack.
    """

    ways: dict[int, Configuration]
    trait: dict[int, float]
    coherence: dict[int, float]
    baseline: tuple[float, float]
    attacked: tuple[float, float]

    @classmethod
    def of(cls, cell: CellResult) -> Tried:
        """Read from a cell; what the judge did not score is left out."""
        found = cell.about["validation"]
        scores = {int(at): pair for at, pair in found["tried"].items() if None not in pair}
        trait, coherence = ({at: float(pair[part]) for at, pair in scores.items()} for part in (0, 1))
        ways = {at: cell.ways[at] for at in scores}
        return cls(ways, trait, coherence, _pair(found["baseline"]), _pair(found["attacked"]))

    @property
    def floor(self) -> float:
        """Least coherence of an operating point."""
        return COHERENCE_FLOOR * self.baseline[1]

    @property
    def methods(self) -> list[str]:
        """In the order of the sweep."""
        return list(dict.fromkeys(way.method for way in self.ways.values()))

    def anchor(self, cell: CellResult, method: str) -> int:
        """A method's operating point, or else the highest trait it reached."""
        mine = [at for at, way in self.ways.items() if way.method == method]
        best = cell.best.get(method)
        return max(mine, key=lambda at: self.trait[at]) if best is None else best

    def along(self, anchor: int, axis: str) -> list[int]:
        """Configurations that differ from an anchor in one field at most, by that field."""
        way = self.ways[anchor]
        same = [at for at, other in self.ways.items() if replace(other, **{axis: getattr(way, axis)}) == way]
        return sorted(same, key=lambda at: float(getattr(self.ways[at], axis)))


def of_overview(cells: Sequence[Overview]) -> Picture:
    """Trait of every cell: attacked, attacked and steered, not attacked."""

    def draw(axes: Any) -> None:
        for row, cell in enumerate(cells):
            line = [cell.attacked[0], cell.not_attacked[0]]
            axes.plot(line, [row] * 2, color=INK, alpha=0.25, linewidth=3, zorder=1, solid_capstyle="round")
            axes.plot(line[0], row, **look("unsteered").drawn, markersize=7, markeredgewidth=2)
            axes.plot(line[1], row, "o", markerfacecolor="none", markeredgecolor=INK, markersize=8)
            axes.plot(cell.defended[0], row, "o", color="#009e73", markersize=6)
            axes.text(0, row - 0.28, f"{cell.model}, {cell.concept}", fontsize=8.5)
        shown = {
            "attacked": {**look("unsteered").drawn, "linestyle": "", "markeredgewidth": 2},
            "attacked, steered": {"marker": "o", "linestyle": "", "color": "#009e73"},
            "not attacked": {"marker": "o", "linestyle": "", "markerfacecolor": "none", "markeredgecolor": INK},
        }
        for name, drawn in shown.items():
            axes.plot([], [], label=name, **drawn)
        axes.set(xlim=SCORES, ylim=(len(cells) - 0.5, -0.75), xlabel="trait, 0-100", yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)

    size = (4.6, 1.1 + 0.5 * len(cells))
    alt = "Trait by cell: attacked, attacked and steered, not attacked; the figures are in the table"
    return Picture("overview.svg", alt, svg(draw, size))


def of_cell(cell: CellResult) -> Iterator[Picture]:
    """Everything that is drawn of a cell."""
    tried = Tried.of(cell)
    if tried.ways:
        yield _by_layer(cell, tried)
        several = [name for name in tried.methods if len({way.strength for way in cell.ways if way.method == name}) > 1]
        yield from (_by_strength(cell, tried, method) for method in several)
        yield _pareto(cell, tried)
    if cell.about["cohens_d"]:
        yield _separation(cell)
    if curves := cell.about["curves"]:
        yield _projections(curves)
        yield _edited(curves)
    if cell.turns:
        yield from (_by_turn(cell, measure) for measure in ("trait", "coherence", "repetition"))
    if (path := cell.folder / "heatmap.png").is_file():
        yield Picture(
            "heatmap.png", "Validation trait of every configuration, by layer and strength", path.read_bytes()
        )


def _by_layer(cell: CellResult, tried: Tried) -> Picture:
    def draw(axes: Any) -> None:
        for method in tried.methods:
            along = tried.along(tried.anchor(cell, method), "layer")
            layers = [tried.ways[at].layer for at in along]
            axes.plot(layers, [tried.trait[at] for at in along], **look(method).drawn, label=method)
            weak = [at for at in along if tried.coherence[at] < tried.floor]
            axes.plot([tried.ways[at].layer for at in weak], [tried.trait[at] for at in weak], "o", markersize=10,
                      markerfacecolor="none", markeredgecolor=INK, alpha=0.6)  # fmt: skip
        level(axes, tried.baseline[0], "not attacked")
        level(axes, tried.attacked[0], "attacked")
        last = max(way.layer for way in cell.ways)
        axes.set(title="Trait by layer", xlabel="layer", ylabel="trait, 0-100", ylim=SCORES, xlim=(-0.4, last + 0.4))
        axes.xaxis.get_major_locator().set_params(integer=True)

    alt = "Validation trait by layer, every method at the strength of its operating point; ringed: not coherent enough"
    return Picture("layers.svg", alt, svg(draw))


def _by_strength(cell: CellResult, tried: Tried, method: str) -> Picture:
    anchor = tried.anchor(cell, method)

    def draw(axes: Any) -> None:
        along = tried.along(anchor, "strength")
        strengths = [tried.ways[at].strength for at in along]
        drawn = look(method)
        axes.plot(strengths, [tried.trait[at] for at in along], **drawn.drawn, label="trait")
        dotted = drawn.drawn | {"linestyle": ":", "markerfacecolor": "none", "label": "coherence"}
        axes.plot(strengths, [tried.coherence[at] for at in along], **dotted)
        level(axes, tried.floor, "least coherence")
        values = sorted({way.strength for way in cell.ways if way.method == method})
        room = 0.05 * (values[-1] - values[0])
        axes.set(xlim=(values[0] - room, values[-1] + room), ylim=SCORES)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set(title=f"{method} by strength, layer {tried.ways[anchor].layer}", xlabel="strength", ylabel="0-100")

    return Picture(f"strength-{method}.svg", f"Validation trait and coherence of {method} by strength", svg(draw))


def _pareto(cell: CellResult, tried: Tried) -> Picture:
    def draw(axes: Any) -> None:
        crowd = {"linestyle": "", "alpha": 0.8} | ({"markersize": 3.5, "alpha": 0.5} if len(tried.ways) > CROWD else {})
        for method in tried.methods:
            mine = [at for at, way in tried.ways.items() if way.method == method]
            drawn = look(method).drawn | crowd | {"label": method}
            axes.plot([tried.coherence[at] for at in mine], [tried.trait[at] for at in mine], **drawn)
        front = pareto_front({at: (tried.coherence[at], tried.trait[at]) for at in tried.ways})
        axes.plot([tried.coherence[at] for at in front], [tried.trait[at] for at in front], color=INK, linewidth=1,
                  zorder=4, label="front")  # fmt: skip
        if cell.chosen is not None:
            place = tried.coherence[cell.chosen], tried.trait[cell.chosen]
            axes.plot(*place, "o", markersize=12, markerfacecolor="none", markeredgecolor=INK, label="operating point")
        axes.axvline(tried.floor, color=INK, linestyle=":", linewidth=1, alpha=0.7)
        axes.set(
            title="Trait and coherence", xlabel="coherence, 0-100", ylabel="trait, 0-100", xlim=SCORES, ylim=SCORES
        )

    alt = "Validation trait against coherence of all configurations, with the Pareto front and the operating point"
    return Picture("pareto.svg", alt, svg(draw, (SIZE[0], SIZE[1] + 0.2)))


def pareto_front(points: dict[int, tuple[float, float]]) -> list[int]:
    """Those that no other one beats in one coordinate and equals or beats in the other, by the first coordinate."""
    front: list[int] = []
    for at in sorted(points, key=lambda at: points[at], reverse=True):
        if not front or points[at][1] > points[front[-1]][1]:
            front.append(at)
    return front[::-1]


def _separation(cell: CellResult) -> Picture:
    def draw(axes: Any) -> None:
        for (reading, values), line in zip(cell.about["cohens_d"].items(), cycle(("-", "--", ":", "-.")), strict=False):
            axes.plot(range(len(values)), _numbers(values), color=INK, linestyle=line, marker=".", label=reading)
        axes.set(title="Separation by layer", xlabel="layer", ylabel="Cohen's d", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)

    return Picture("separation.svg", "How well the classes' projections separate, by layer", svg(draw))


def _projections(curves: dict[str, Any]) -> Picture:
    names = {"not attacked": "not attacked", "attacked": "unsteered"}

    def draw(axes: Any) -> None:
        for name, values in curves["projection"].items():
            drawn = look(names.get(name, curves["way"].split(",")[0]))
            label = "attacked, steered" if "steered" in name else name
            axes.plot(range(1, len(values) + 1), _numbers(values), color=drawn.colour, label=label)
        for key, line, label in (
            ("boundary", "-", "boundary"),
            ("mu_aligned", ":", "class means"),
            ("mu_violating", ":", ""),
        ):
            axes.axhline(curves[key], color=INK, linestyle=line, linewidth=1, alpha=0.6, label=label or None)
        axes.set(title="Projection by token, before the edit", xlabel="response token", ylabel="activation units")

    return Picture("projection.svg", "Mean projection on the direction by response token", svg(draw))


def _edited(curves: dict[str, Any]) -> Picture:
    def draw(axes: Any) -> None:
        for method, values in curves["edited"].items():
            shares = [100 * value for value in _numbers(values)]
            axes.plot(range(1, len(values) + 1), shares, color=look(method).colour, label=method)
        axes.set(title="Answers edited, by token", xlabel="response token", ylabel="%", ylim=SCORES)

    return Picture("edited.svg", "Share of the attacked answers whose token is edited, by response token", svg(draw))


def _by_turn(cell: CellResult, measure: str) -> Picture:
    def draw(axes: Any) -> None:
        for name in dict.fromkeys(row["condition"] for row in cell.turns):
            values = curve(cell.turns, measure, name)
            axes.plot(range(1, len(values) + 1), values, **look(name).drawn, label=name)
        axes.set(title=f"{measure.capitalize()} by turn", xlabel="turn")
        if measure == "repetition":
            axes.set(ylabel="share of 3-grams", ylim=(0, None))
        else:
            axes.set(ylabel=f"{measure}, 0-100", ylim=SCORES)
        axes.xaxis.get_major_locator().set_params(integer=True)

    alt = f"Mean {measure} by turn of the conversations, every condition"
    return Picture(f"turns-{measure}.svg", alt, svg(draw, (SIZE[0], SIZE[1] + 0.4)))


def _pair(figures: Mapping[str, float | None]) -> tuple[float, float]:
    """Trait and coherence."""
    trait, coherence = _numbers([figures["trait"], figures["coherence"]])
    return trait, coherence


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]
