"""What a synthesis report is about: every cell's roles, and its figures that take resampling, each computed once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from steerwell.scoring.intervals import Interval
from steerwell.studies.report.text import between, number
from steerwell.studies.synthesis.analysis import (
    Falsifier,
    Selection,
    against,
    correlations,
    falsifier,
    mean_correlations,
    selections,
    share_above,
)
from steerwell.studies.synthesis.arms import BROKEN, BY_HM3, ORIGINAL, PROMPTED, STEERED, UNSTEERED, roles_of
from steerwell.studies.synthesis.results import MEASURABLE, SynthesisResult
from steerwell.synthesis.detection import Comparison, Detection, compare, detection
from steerwell.synthesis.examples import Example

DIGITS = 3  # of an AUROC
NAMES = {"hm3": "HM3", "hm2": "HM(S, C)", "success": "S", "coherence": "C", "diversity": "D"}
MISSING = Interval(math.nan, math.nan, math.nan, 0, 0)


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell's figures, each computed when it is first asked for, and once.

    Attributes:
        result: what was measured.
        kept: originals that stay in training beside generated texts.
    """

    result: SynthesisResult
    kept: int = 0

    @property
    def title(self) -> str:
        """Model and concept."""
        return f"{self.result.model}, {self.result.concept}"

    @cached_property
    def unmeasurable(self) -> str | None:
        """Why data sets cannot be told apart here; None: they can."""
        if self.result.measurable:
            return None
        at = self.result.named(ORIGINAL)
        found = number(math.nan if at is None else self.result.auroc(at), DIGITS)
        low, high = MEASURABLE
        return f"detectors trained on originals have AUROC {found}, outside {low:.2f} to {high:.2f}"

    def arms(self, source: str) -> list[int]:
        """All arms of a source, whether or not detectors could be trained on them."""
        return [at for at, row in enumerate(self.result.arms) if row["source"] == source]

    def texts(self, at: int) -> list[Example]:
        """What one arm's writer wrote; [] of originals, which are not kept."""
        return self.result.texts(str(self.result.arms[at]["arm"]))

    @cached_property
    def roles(self) -> dict[str, int]:
        """The arms that are singled out: controls, and what validation or HM3 picks. Missing: there is none."""
        rows = self.result.arms

        def place(item: tuple[str, int]) -> tuple[bool, int]:
            row = rows[item[1]]
            return row["source"] != ORIGINAL, -row["texts"] if row["source"] == ORIGINAL else 0

        return dict(sorted(roles_of(rows).items(), key=place))

    @cached_property
    def detections(self) -> dict[str, Detection]:
        """Test figures of the linear detectors of every role, and of the probe."""
        cell = self.result
        scores = {name: cell.scores[at] for name, at in self.roles.items()}
        if probe := cell.about.get("probe"):
            scores["probe"] = np.array([probe["scores"]])
        return {name: detection(cell.labels, rows, groups=cell.groups) for name, rows in scores.items()}

    @cached_property
    def encoder_scores(self) -> dict[str, list[list[float]]]:
        """Fine-tuned encoders' test scores by role, [seeds, n]; {}: none were trained here."""
        found: dict[str, list[list[float]]] = {}
        for row in self.result.about.get("encoders") or ():
            found.setdefault(row["role"], []).append(row["scores"])
        return found

    @cached_property
    def encoders(self) -> dict[str, Detection]:
        """Their test figures."""
        cell = self.result
        return {
            name: detection(cell.labels, rows, groups=cell.groups) for name, rows in self.encoder_scores.items()
        }  # fmt: skip

    def auroc(self, role: str) -> Interval:
        """Test AUROC of a role's linear detectors, mean over seeds."""
        return self.detections[role].auroc if role in self.detections else MISSING

    @property
    def base(self) -> str:
        """The role of the originals that generated texts replace, or that they are added to."""
        few = f"{ORIGINAL}, {self.kept}"
        return few if few in self.roles else ORIGINAL

    @cached_property
    def differences(self) -> dict[tuple[str, str], Comparison]:
        """Paired comparisons of roles; linear detectors."""
        pairs = [(STEERED, PROMPTED), (BY_HM3, PROMPTED), (STEERED, UNSTEERED), (STEERED, BROKEN), (PROMPTED, BROKEN),
                 (BROKEN, self.base), (STEERED, self.base)]  # fmt: skip
        pairs += [(PROMPTED, self.base)] if self.kept else []
        found = {pair: against(self.result, *(self.roles.get(name) for name in pair)) for pair in pairs}
        return {pair: compared for pair, compared in found.items() if compared is not None}

    @cached_property
    def encoder_difference(self) -> Comparison | None:
        """The best steered against the best prompted, fine-tuned encoders; None: not run."""
        rows = [self.encoder_scores.get(name) for name in (STEERED, PROMPTED)]
        if rows[0] is None or rows[1] is None:
            return None
        return compare(self.result.labels, rows[0], rows[1], groups=self.result.groups)

    def difference(self, one: str = STEERED, other: str = PROMPTED) -> Interval:
        """AUROC of one role less that of another."""
        found = self.differences.get((one, other))
        return MISSING if found is None else found.difference

    @cached_property
    def correlations(self) -> dict[str, Interval]:
        """Of every measure with AUROC."""
        return correlations(self.result)

    @cached_property
    def falsifier(self) -> Falsifier:
        """Whether diversity helps."""
        return falsifier(self.result)

    @cached_property
    def selections(self) -> list[Selection]:
        """What every rule picks."""
        return selections(self.result)

    @cached_property
    def above(self) -> tuple[int, int]:
        """Steered configurations that beat the best prompted one, and all."""
        return share_above(self.result, self.roles.get(PROMPTED))


@dataclass(frozen=True, slots=True)
class Overview:
    """One cell in a line. AUROC of linear detectors on real test examples, mean over seeds; NaN: not measured.

    Attributes:
        model: its title; `concept`: its name.
        unmeasurable: why nothing can be told here; None: something can.
        original: trained on all originals.
        few: trained on fewer, by the arm's name.
        unsteered: trained on unsteered texts; `broken`: on such as broke without any steering.
        prompted: on the prompted configuration that validation picks; `steered` likewise.
        by_hm3: on the steered configuration with the highest HM3.
        probe: the steering direction itself as detector.
        difference: `steered` less `prompted`, paired.
        beating: steered configurations with a higher AUROC than `prompted`; of how many in `configurations`.
        configurations: steered ones.
    """

    model: str
    concept: str
    unmeasurable: str | None
    original: Interval
    few: Mapping[str, Interval]
    unsteered: Interval
    broken: Interval
    prompted: Interval
    steered: Interval
    by_hm3: Interval
    probe: Interval
    difference: Interval
    beating: int
    configurations: int

    def __str__(self) -> str:
        named = {"originals": self.original, "unsteered": self.unsteered, "prompted": self.prompted,
                 "steered": self.steered, "steered by HM3": self.by_hm3}  # fmt: skip
        told = ", ".join(f"{number(found.estimate, DIGITS)} {name}" for name, found in named.items())
        told = f"{self.model}, {self.concept}: AUROC {told}; steered less prompted {signed(self.difference)}"
        beating = f"{self.beating} of {self.configurations} configurations beat prompting"
        return f"{told}; {beating}" + (f"; not measurable: {self.unmeasurable}" if self.unmeasurable else "")


def overview(cell: Cell) -> Overview:
    """A cell in a line."""
    controls = [name for name, at in cell.roles.items() if cell.result.arms[at]["source"] == ORIGINAL]
    beating, configurations = cell.above
    return Overview(
        cell.result.model,
        cell.result.concept,
        cell.unmeasurable,
        cell.auroc(ORIGINAL),
        {name: cell.auroc(name) for name in controls if name != ORIGINAL},
        cell.auroc(UNSTEERED),
        cell.auroc(BROKEN),
        cell.auroc(PROMPTED),
        cell.auroc(STEERED),
        cell.auroc(BY_HM3),
        cell.auroc("probe"),
        cell.difference(),
        beating,
        configurations,
    )


def by_concept(cells: Sequence[Cell], measurable: bool = False) -> dict[str, list[Cell]]:
    """Every concept's cells; `measurable` leaves out those where nothing can be told."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if not measurable or cell.unmeasurable is None:
            found.setdefault(cell.result.concept, []).append(cell)
    return found


def concept_correlations(cells: Sequence[Cell]) -> dict[str, dict[str, Interval]]:
    """Within every concept, the mean over its measurable cells."""
    return {
        concept: mine[0].correlations if len(mine) == 1 else mean_correlations([cell.result for cell in mine])
        for concept, mine in by_concept(cells, measurable=True).items()
    }


def signed(found: Interval, digits: int = DIGITS) -> str:
    """A difference and its interval, on one line."""
    told, bounds = number(found.estimate, digits), between(found, digits)
    return f"{'+' if found.estimate > 0 else ''}{told}" + (f" ({bounds})" if bounds else "")
