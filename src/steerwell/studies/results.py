"""What a study has measured, read back from its cells' folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from steerwell.runs.ledger import Row
from steerwell.scoring.metrics import Values
from steerwell.studies.alignment import CELL, TRIALS, TURNS
from steerwell.studies.defence import Configuration

Condition = int | None  # a configuration's index; None: unsteered


@dataclass(frozen=True, eq=False)
class CellResult:
    """One model and concept.

    Attributes:
        folder: where it lies.
        about: `cell.json`: roles, validation scores, curves, examples ...
        trials: every test answer's row by (task, condition), in the order of the scenarios.
        turns: every turn of the conversations.
    """

    folder: Path
    about: Mapping[str, Any]
    trials: Mapping[tuple[str, Condition], Sequence[Row]]
    turns: Sequence[Row]

    @classmethod
    def load(cls, folder: Path) -> CellResult:
        """Read a finished cell."""
        import pyarrow.parquet as pq

        trials: dict[tuple[str, Condition], list[Row]] = {}
        for row in pq.read_table(folder / TRIALS).to_pylist():
            trials.setdefault((row["task"], row["condition"]), []).append(row)
        turns = pq.read_table(folder / TURNS).to_pylist() if (folder / TURNS).is_file() else []
        return cls(folder, json.loads((folder / CELL).read_text(encoding="utf-8")), trials, turns)

    @property
    def model(self) -> str:
        """The model's title."""
        return str(self.about["model"])

    @property
    def concept(self) -> str:
        """The concept's name."""
        return str(self.about["concept"])

    @cached_property
    def ways(self) -> list[Configuration]:
        """All configurations of the sweep, by index."""
        names = [field.name for field in fields(Configuration)]
        return [Configuration(**{name: item[name] for name in names}) for item in self.about["configurations"]]

    @property
    def best(self) -> Mapping[str, int]:
        """Every method's operating point; methods without a coherent one are missing."""
        found: Mapping[str, int] = self.about["roles"]["best"]
        return found

    @property
    def by_position(self) -> Mapping[str, int]:
        """The same within every position, keys `method/position`."""
        found: Mapping[str, int] = self.about["roles"]["by_position"]
        return found

    @property
    def matched(self) -> Mapping[str, int]:
        """Of swfc, sttp and stmp the most coherent configuration at about equal validation trait."""
        found: Mapping[str, int] = self.about["roles"]["matched"]
        return found

    @property
    def chosen(self) -> Condition:
        """The operating point; None where nothing was coherent enough."""
        found: Condition = self.about["roles"]["chosen"]
        return found

    def values(self, task: str, condition: Condition, measure: str) -> Values:
        """One measure of a condition's answers, by scenario [n]; NaN where missing; [0] where it was not run."""
        rows = self.trials.get((task, condition), ())
        return np.array([math.nan if row[measure] is None else row[measure] for row in rows], np.float64)

    def mean(self, task: str, condition: Condition, measure: str) -> float:
        """Mean over the answers that have the measure; NaN without any."""
        known = self.values(task, condition, measure)
        known = known[~np.isnan(known)]
        return float(known.mean()) if len(known) else math.nan

    def gap_closed(self, condition: Condition, task: str = "attacked") -> float:
        """Share of the trait lost to a threat that steering restores; NaN: nothing was lost."""
        aligned, bad = self.mean("baseline", None, "trait"), self.mean(task, None, "trait")
        return (self.mean(task, condition, "trait") - bad) / (aligned - bad) if aligned > bad else math.nan

    def accuracy(self, condition: Condition) -> float:
        """Mean accuracy (%) over the capability tasks; NaN where none was run."""
        rows = [row for row in self.about["capabilities"] if row["condition"] == condition]
        found = [value for row in rows for name, value in row.items() if name != "condition" and value is not None]
        return float(np.mean(found)) if found else math.nan
