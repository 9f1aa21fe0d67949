"""The arms of a cell: sets of violating examples that detectors are trained on, and which of them are singled out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steerwell.runs.ledger import Row
from steerwell.studies.defence import Configuration
from steerwell.studies.synthesis.config import SynthesisConfig
from steerwell.studies.synthesis.real import Real
from steerwell.synthesis.examples import Example, Source
from steerwell.synthesis.writers import Prompting

ORIGINAL, UNSTEERED = "original", "unsteered"
BROKEN = "unsteered, broken"  # the control whose texts are broken by a high temperature
PROMPTED, STEERED, BY_HM3 = "prompted, best on validation", "steered, best on validation", "steered by HM3"


@dataclass(frozen=True, eq=False)
class Arm:
    """One set of violating examples.

    Attributes:
        name: in words; no other arm of the cell has it.
        source: where they come from.
        examples: the set.
        way: what the configuration consists of, as plain values.
    """

    name: str
    source: Source
    examples: tuple[Example, ...]
    way: Mapping[str, Any]

    def training(self, real: Real, kept: int) -> list[Example]:
        """The violating examples to train on: these, and the originals that stay beside generated ones."""
        return [*self.examples, *(real.violating[:kept] if self.source != "original" else ())]

    def fields(self) -> Row:
        """Its columns in tables."""
        blank = sum(not example.response.strip() for example in self.examples)
        return {"arm": self.name, "source": self.source, "texts": len(self.examples), "blank": blank} | dict(self.way)


def arms_of(
    config: SynthesisConfig,
    real: Real,
    ways: Sequence[Configuration | Prompting | None],
    texts: Sequence[Sequence[Example]],
) -> list[Arm]:
    """Every writer's texts, then the controls: all originals, and few of them (the first ones)."""
    written = [
        Arm(examples[0].configuration, examples[0].source, tuple(examples), {} if way is None else asdict(way))
        for way, examples in zip(ways, texts, strict=True)
    ]
    controls = {f"original, {count}": real.violating[:count] for count in config.few}
    controls["original"] = real.violating
    if 0 < config.kept < len(real.violating):
        controls.setdefault(f"original, {config.kept}", real.violating[: config.kept])
    return [*written, *(Arm(name, "original", tuple(found), {}) for name, found in controls.items())]


def roles_of(rows: Sequence[Row]) -> dict[str, int]:
    """Arms singled out, by role: the controls, and of prompted and steered ones that with the best validation AUROC.

    `steered by HM3` is picked without any detector; a role that no arm can have is missing.

    Args:
        rows: one per arm: its `arm` (name), `source`, `auroc_validation` and `hm3`.
    """
    roles = {str(row["arm"]): at for at, row in enumerate(rows) if row["source"] in (ORIGINAL, UNSTEERED)}
    for role, source, measure in (
        (PROMPTED, "prompted", "auroc_validation"),
        (STEERED, "steered", "auroc_validation"),
        (BY_HM3, "steered", "hm3"),
    ):
        mine = [at for at, row in enumerate(rows) if row["source"] == source and _known(row["auroc_validation"])]
        known = {at: rows[at][measure] for at in mine if _known(rows[at][measure])}
        if known:
            roles[role] = max(known, key=lambda at: (known[at], -at))
    return roles


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
