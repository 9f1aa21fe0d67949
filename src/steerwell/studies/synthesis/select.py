"""The selector: which configurations are worth using, told without training a detector, and written as policies."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.policy import save_policy
from steerwell.studies.defence import Configuration
from steerwell.studies.sweep import DIRECTIONS
from steerwell.studies.synthesis.analysis import MEASURES, top
from steerwell.studies.synthesis.results import SynthesisResult

FIELDS = ("method", "layer", "strength", "position", "estimator", "pool")


@dataclass(frozen=True, slots=True)
class Pick:
    """A configuration that a measure picks.

    Attributes:
        cell: the model and concept it is for.
        at: index of its arm.
        rank: 1 is the best.
        regret: best test AUROC of the cell's steered configurations minus its own. The picking never looks at it.
    """

    cell: SynthesisResult
    at: int
    rank: int
    regret: float

    @property
    def way(self) -> Configuration:
        """How to steer."""
        row = self.cell.arms[self.at]
        return Configuration(**{name: row[name] for name in FIELDS})

    def write(self, folder: Path) -> Path:
        """Write it as a policy toward the violating class; the direction stays where the study put it."""
        way = self.way
        direction = self.cell.folder / DIRECTIONS / way.reading_name
        place = folder / f"{self.cell.model}-{self.cell.concept}-{self.rank}.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        found = {name: round(self.cell.value(self.at, name), 4) for name in MEASURES if self.known(name)}
        name = f"{self.cell.concept}-generator-{self.rank}"
        policy = way.policy(name, os.path.relpath(direction, folder), found, "violating")
        return save_policy(policy, place)

    def known(self, measure: str) -> bool:
        """Whether it has this measure."""
        return not math.isnan(self.cell.value(self.at, measure))


def select(cells: Sequence[SynthesisResult], by: str = "hm3", count: int = 3) -> list[Pick]:
    """Every cell's best steered configurations by a measure that needs no detector, best first.

    Args:
        cells: of a study.
        by: `hm3`, `hm2`, `success`, `coherence` or `diversity`.
        count: configurations per cell.

    Raises:
        UnknownNameError: no such measure.
        ArgumentError: a cell lacks the measure, because nobody judged its texts.
    """
    if by not in MEASURES:
        raise UnknownNameError("measure", by, MEASURES)
    picks = []
    for cell in cells:
        found = top(cell, by, count)
        if not found:
            raise ArgumentError(
                f"by: {cell.model}, {cell.concept} has no {by!r}: its texts were not judged; use 'diversity', or "
                "run the study with a judge"
            )
        highest = max(cell.auroc(at) for at in cell.of("steered"))
        picks += [Pick(cell, at, rank, highest - cell.auroc(at)) for rank, at in enumerate(found, start=1)]
    return picks
