"""Which of a sweep's configurations are worth measuring on test scenarios, and as what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from steerwell.studies.defence import by_method, choose_each
from steerwell.studies.sweep import SweepResult

PAPER_METHODS = ("swfc", "sttp", "stmp")
SAME_TRAIT = 5.0  # points of validation trait within which configurations count as equal when methods are matched


@dataclass(frozen=True)
class Roles:
    """Which configurations the trials measure, by index.

    Attributes:
        best: every method's operating point.
        by_position: the same within every position, keys `method/position`.
        matched: of the three methods of the paper, the most coherent one at about equal validation trait.
        level: that trait.
        chosen: the operating point of all; None: nothing is coherent enough.
    """

    best: Mapping[str, int]
    by_position: Mapping[str, int]
    matched: Mapping[str, int]
    level: float
    chosen: int | None

    @property
    def all(self) -> list[int]:
        """Every index, once."""
        chosen = (*self.best.values(), *self.by_position.values(), *self.matched.values())
        return sorted(set(chosen))


def roles_of(result: SweepResult) -> Roles:
    """What to measure on test scenarios, from what a sweep found on validation ones."""
    left = list(result.tried)
    scores = [result.tried[index] for index in left]
    ways = [result.configurations[index] for index in left]
    found = choose_each(ways, scores, result.baseline, lambda item: f"{item.method}/{item.position}")
    matched, level = _matched(result)
    return Roles(result.best, {name: left[at] for name, at in found.items()}, matched, level, result.chosen)


def _matched(result: SweepResult) -> tuple[dict[str, int], float]:
    """For swfc, sttp and stmp the most coherent configuration at the highest trait that all of them reach."""
    groups = {
        method: [index for index in result.tried if by_method(result.configurations[index]) == method]
        for method in PAPER_METHODS
    }
    if not all(groups.values()):
        return {}, math.nan
    tried = result.tried
    level = min(max(tried[index].trait for index in group) for group in groups.values())
    found = {}
    for method, group in groups.items():
        near = [index for index in group if abs(tried[index].trait - level) <= SAME_TRAIT]
        above = [index for index in group if tried[index].trait >= level]
        pool = near or [min(above, key=lambda index: tried[index].trait)]
        found[method] = max(pool, key=lambda index: (tried[index].coherence, -index))
    return found, level
