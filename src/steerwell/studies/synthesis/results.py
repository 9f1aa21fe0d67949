"""What a synthesis study has measured, read back from its cells' folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerwell.runs.ledger import Row
from steerwell.studies.alignment import CELL
from steerwell.studies.synthesis.cell import ARMS, SCORES, TEST, TEXTS
from steerwell.synthesis.detection import by_prompt
from steerwell.synthesis.examples import Example
from steerwell.synthesis.files import from_rows, read_table

MEASURABLE = (0.60, 0.97)  # AUROC of detectors trained on originals outside of which nothing can be told
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SynthesisResult:
    """One model and concept.

    Attributes:
        folder: where it lies.
        about: `cell.json`.
        arms: `configurations.parquet`: one row per arm.
        scores: P(violating) of the test examples by every arm's detectors, [arms, seeds, n].
        labels: of the test examples, [n].
    """

    folder: Path
    about: Mapping[str, Any]
    arms: Sequence[Row]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def load(cls, folder: Path) -> SynthesisResult:
        """Read a finished cell."""
        from safetensors.numpy import load_file

        saved = load_file(folder / SCORES)
        about = json.loads((folder / CELL).read_text(encoding="utf-8"))
        return cls(folder, about, read_table(folder / ARMS), saved["test"], saved["labels"])

    @property
    def model(self) -> str:
        """The model's title."""
        return str(self.about["model"])

    @property
    def concept(self) -> str:
        """The concept's name."""
        return str(self.about["concept"])

    @cached_property
    def test(self) -> list[Example]:
        """The real test examples."""
        return from_rows(read_table(self.folder / TEST))

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """Which test examples share a prompt, [n]."""
        return by_prompt(self.test)

    def texts(self, arm: str) -> list[Example]:
        """What one arm's writer wrote."""
        return self._texts.get(arm, [])

    @cached_property
    def _texts(self) -> dict[str, list[Example]]:
        found: dict[str, list[Example]] = {}
        for example in from_rows(read_table(self.folder / TEXTS)):
            found.setdefault(example.configuration, []).append(example)
        return found

    def of(self, source: str) -> list[int]:
        """Indices of a source's arms whose detectors could be trained."""
        return [at for at, row in enumerate(self.arms) if row["source"] == source and not math.isnan(self.auroc(at))]

    def named(self, arm: str) -> int | None:
        """Index of the arm of this name; None: there is none."""
        return next((at for at, row in enumerate(self.arms) if row["arm"] == arm), None)

    def value(self, at: int, measure: str) -> float:
        """A measure of one arm; NaN where it is missing."""
        found = self.arms[at][measure]
        return math.nan if found is None else float(found)

    def values(self, indices: Sequence[int], measure: str) -> Values:
        """A measure of several arms, [k]."""
        return np.array([self.value(at, measure) for at in indices], np.float64)

    def auroc(self, at: int) -> float:
        """Test AUROC of one arm, mean over its detectors."""
        return self.value(at, "auroc")

    def best(self, source: str) -> int | None:
        """The source's arm with the highest *validation* AUROC; the earlier one where two are equal."""
        return max(self.of(source), key=lambda at: (self.value(at, "auroc_validation"), -at), default=None)

    @property
    def measurable(self) -> bool:
        """Whether detectors trained on all originals do neither too badly nor too well to tell data sets apart."""
        at = self.named("original")
        return at is not None and MEASURABLE[0] <= self.auroc(at) <= MEASURABLE[1]
