"""The figures of a synthesis report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from steerwell.scoring.intervals import Interval
from steerwell.studies.report.content import Picture
from steerwell.studies.report.draw import INK, Look, level, look, svg
from steerwell.studies.report.synthesis.measures import NAMES, Cell, Overview, by_concept, signed
from steerwell.studies.synthesis.arms import BY_HM3, ORIGINAL, PROMPTED, STEERED, UNSTEERED

PANEL = (2.95, 2.5)  # inches; four beside each other on a desk
CLOUD = (3.75, 3.4)  # three
AXES = {"success": Look("#d55e00", "o"), "coherence": Look("#2f83c5", "s"), "diversity": Look("#009e73", "^")}
MODELS = ("#d55e00", "#2f83c5", "#009e73", "#c46a9e", "#b3831a", "#7f6fc4")
PROMPTING = {"color": "#858c94", "marker": "D", "markersize": 4, "linestyle": "", "markerfacecolor": "none"}
SHARE = (-0.04, 1.04)  # axis of a share, with room for markers
SHADES = 8  # of a colour bar


def of_overview(cells: Sequence[Overview]) -> Picture:
    """AUROC of every cell by what the detectors were trained on."""
    shown: dict[str, dict[str, Any]] = {
        "originals": {"marker": "o", "markerfacecolor": "none", "color": INK, "markersize": 8},
        "unsteered": {"marker": "x", "color": "#858c94", "markersize": 7, "markeredgewidth": 2},
        "best prompted": PROMPTING | {"markersize": 7, "color": "#b3831a", "markeredgewidth": 1.6},
        "best steered": {"marker": "o", "color": "#009e73", "markersize": 6},
        "steered by HM3": {"marker": "^", "color": "#2f83c5", "markersize": 6},
    }

    def draw(axes: Any) -> None:
        for row, cell in enumerate(cells):
            values = [found.estimate for found in
                      (cell.original, cell.unsteered, cell.prompted, cell.steered, cell.by_hm3)]  # fmt: skip
            known = [value for value in values if not math.isnan(value)] or [math.nan]
            axes.plot([min(known), max(known)], [row] * 2, color=INK, alpha=0.15, linewidth=3, zorder=1)
            for value, drawn in zip(values, shown.values(), strict=True):
                axes.plot(value, row, **drawn | {"linestyle": ""})
            note = " (not measurable)" if cell.unmeasurable else ""
            axes.annotate(f"{cell.model}, {cell.concept}{note}", (0, row - 0.3), (2, 0), fontsize=8.5,
                          xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
        for name, drawn in shown.items():
            axes.plot([], [], label=name, **drawn | {"linestyle": ""})
        axes.axvline(0.5, color=INK, linestyle=":", linewidth=1, alpha=0.6)
        axes.set(ylim=(len(cells) - 0.5, -0.75), xlabel="AUROC on real test examples", yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)

    alt = "AUROC of every cell's detectors by what they were trained on; the figures are in the table"
    return Picture("overview.svg", alt, svg(draw, (4.6, 1.3 + 0.5 * len(cells))))


def of_concepts(cells: Sequence[Cell], correlations: Mapping[str, Mapping[str, Interval]]) -> Iterator[Picture]:
    """HM3 against AUROC, one figure per concept, every model in a colour of its own."""
    colours = dict(zip(dict.fromkeys(cell.result.model for cell in cells), cycle(MODELS), strict=False))

    for concept, mine in by_concept(cells).items():
        known = {cell.result.model: _known(cell, cell.arms("steered"), "hm3", "auroc") for cell in mine}
        if not any(known.values()):
            continue
        found = correlations.get(concept)
        told = "not measurable" if found is None else f"ρ {signed(found['hm3'], 2)}"

        def draw(axes: Any, mine: Sequence[Cell] = mine, known: Mapping[str, list[int]] = known,
                 title: str = f"{concept}: {told}") -> None:  # fmt: skip
            for cell in mine:
                points = [cell.result.values(known[cell.result.model], measure) for measure in ("hm3", "auroc")]
                axes.plot(*points, "o", alpha=0.7, markersize=4, color=colours[cell.result.model],
                          label=cell.result.model)  # fmt: skip
            axes.set(title=title, xlabel="HM3", ylabel="AUROC", xlim=SHARE)

        alt = f"HM3 against AUROC of every steered configuration, {concept}"
        yield Picture(f"hm3-{concept}.svg", alt, svg(draw))


def of_cell(cell: Cell) -> Iterator[Picture]:
    """Everything that is drawn of a cell."""
    for at, (way, layers) in enumerate(_ways(cell).items(), 1):
        if any(len(arms) > 1 for arms in layers.values()):
            yield _tradeoff(cell, at, way, layers)
    if _known(cell, cell.arms("steered"), "success", "coherence", "auroc"):
        yield _cloud(cell, "success", "coherence", "diversity")
    if _known(cell, cell.arms("steered"), "success", "auroc"):
        yield _cloud(cell, "success", "diversity")
    if _known(cell, cell.arms("steered"), "hm3", "auroc"):
        yield _followed(cell)


def _tradeoff(cell: Cell, at: int, way: str, layers: Mapping[int, list[int]]) -> Picture:
    """Strength against success, coherence and diversity: the mean over layers, and a thin line for every layer."""
    strengths = sorted({cell.result.value(arm, "strength") for arms in layers.values() for arm in arms})
    places = {strength: place for place, strength in enumerate(strengths)}

    def draw(axes: Any) -> None:
        for measure, drawn in AXES.items():
            lines = np.full((len(layers), len(strengths)), math.nan)
            for line, arms in zip(lines, layers.values(), strict=True):
                for arm in arms:
                    line[places[cell.result.value(arm, "strength")]] = cell.result.value(arm, measure)
                axes.plot(line, color=drawn.colour, linewidth=0.9, alpha=0.55)
            if not np.isnan(lines).all():
                mean = np.ma.masked_invalid(lines).mean(0).filled(math.nan)
                axes.plot(mean, **drawn.drawn, label=NAMES[measure])
            if UNSTEERED in cell.roles:
                plain = cell.result.value(cell.roles[UNSTEERED], measure)
                axes.axhline(plain, color=drawn.colour, linestyle=":", linewidth=1)
        axes.set_xticks(range(len(strengths)), [f"{value:g}" for value in strengths])
        axes.set(title=way.replace(" at ", "\nat "), xlabel="strength", ylim=SHARE)

    alt = f"S, C and D by strength: {way}, mean over layers and every layer; dotted: unsteered"
    return Picture(f"tradeoff-{at}.svg", alt, svg(draw, PANEL))


def _ways(cell: Cell) -> dict[str, dict[int, list[int]]]:
    """Steered arms by way, named, and layer."""
    found: dict[str, dict[int, list[int]]] = {}
    for at in cell.arms("steered"):
        row = cell.result.arms[at]
        name = f"{row['method']}, {row['estimator']} at {row['pool']}"
        name += "" if row["position"] == "all" else f", {row['position']} only"
        found.setdefault(name, {}).setdefault(row["layer"], []).append(at)
    return found


def _cloud(cell: Cell, x: str, y: str, size: str | None = None) -> Picture:
    """All configurations by two measures, coloured by AUROC; a third one is the size of the markers."""

    def draw(axes: Any) -> None:
        import matplotlib as mpl

        arms = {source: _known(cell, cell.arms(source), x, y, "auroc") for source in ("prompted", "steered")}
        areas = cell.result.values([at for mine in arms.values() for at in mine], "auroc")
        scale = mpl.colors.Normalize(areas.min(), areas.max())
        colours = mpl.colormaps["viridis"].resampled(SHADES)
        for (source, mine), marker in zip(arms.items(), ("D", "o"), strict=True):
            points = axes.scatter(
                cell.result.values(mine, x), cell.result.values(mine, y), _sizes(cell, mine, size), marker=marker,
                c=cell.result.values(mine, "auroc"), norm=scale, cmap=colours, edgecolors=INK,
                linewidths=0.9 if source == "prompted" else 0.3, alpha=0.9,
            )  # fmt: skip
            axes.plot([], [], marker, color=INK, markerfacecolor="none", label=source)
        axes.figure.colorbar(points, ax=axes, label="AUROC", shrink=0.9)
        _ringed(axes, cell, x, y)
        title = f"{NAMES[x]} and {NAMES[y]}" + (f", size: {NAMES[size]}" if size else "")
        axes.set(title=title, xlabel=f"{NAMES[x]}, {x}", ylabel=f"{NAMES[y]}, {y}", xlim=SHARE)
        if y == "coherence":
            axes.set(ylim=SHARE)

    alt = f"{x.capitalize()} and {y} of every configuration, coloured by AUROC; prompted ones are diamonds"
    return Picture(f"cloud-{x}-{y}.svg", alt, svg(draw, CLOUD))


def _sizes(cell: Cell, arms: Sequence[int], measure: str | None) -> Any:
    """Areas of markers, from the cell's lowest value of a measure to its highest."""
    if measure is None:
        return 28
    known = cell.result.values(cell.arms("steered") + cell.arms("prompted"), measure)
    low, high = np.nanmin(known), np.nanmax(known)
    values = np.nan_to_num(cell.result.values(arms, measure), nan=low)
    return 8 + 60 * (values - low) / (high - low or 1)


def _followed(cell: Cell) -> Picture:
    """HM3 against AUROC by method, beside prompting."""

    def draw(axes: Any) -> None:
        prompted = _known(cell, cell.arms("prompted"), "hm3", "auroc")
        axes.plot(cell.result.values(prompted, "hm3"), cell.result.values(prompted, "auroc"), **PROMPTING,
                  label="prompted")  # fmt: skip
        arms = _known(cell, cell.arms("steered"), "hm3", "auroc")
        for method in dict.fromkeys(cell.result.arms[at]["method"] for at in arms):
            mine = [at for at in arms if cell.result.arms[at]["method"] == method]
            axes.plot(cell.result.values(mine, "hm3"), cell.result.values(mine, "auroc"), label=method,
                      **look(method).drawn | {"linestyle": "", "alpha": 0.8})  # fmt: skip
        for role, words in ((ORIGINAL, "originals"), (UNSTEERED, "unsteered")):
            if role in cell.roles:
                level(axes, cell.auroc(role).estimate, words)
        _ringed(axes, cell, "hm3", "auroc")
        told = signed(cell.correlations["hm3"], 2)
        axes.set(title=f"HM3 and AUROC, ρ {told}", xlabel="HM3", ylabel="AUROC", xlim=SHARE)

    return Picture("hm3.svg", "HM3 against AUROC of every configuration, by method", svg(draw, CLOUD))


def _ringed(axes: Any, cell: Cell, x: str, y: str) -> None:
    """Rings around what validation and HM3 pick."""
    for role, size in ((STEERED, 11), (PROMPTED, 11), (BY_HM3, 15)):
        if role in cell.roles:
            place = [cell.result.value(cell.roles[role], measure) for measure in (x, y)]
            axes.plot(*place, "o", markersize=size, markerfacecolor="none", markeredgecolor=INK, zorder=5)


def _known(cell: Cell, arms: Sequence[int], *measures: str) -> list[int]:
    """Arms that have all these measures."""
    return [at for at in arms if not any(math.isnan(cell.result.value(at, measure)) for measure in measures)]
