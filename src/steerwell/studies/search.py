"""Automatic search: an operating point for a fraction of the full grid's answers (ours; the paper's future work).

First the screen, which generates nothing: how likely does a steered model under attack find the answers that it gave
unsteered and not attacked? Steering that does nothing and steering that breaks the text both find them unlikely. Then
successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): those that passed answer a few scenarios, the better
ones answer all. Groups (methods, say) compete apart, so that each keeps a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerwell.core.errors import ArgumentError
from steerwell.studies.defence import COHERENCE_FLOOR, Configuration, Scored, by_method, grouped

Measure = Callable[[Sequence[int], int], tuple[Sequence[Scored], Scored]]


@dataclass(frozen=True, slots=True)
class Rung:
    """The survivors answer the first `share` of the scenarios; then 1 in `halving` of each group goes on."""

    share: float
    halving: int


@dataclass(frozen=True, slots=True)
class Screen:
    """1 in `part` of each group passes: where the first `tokens` of the answers to `scenarios` scenarios are likely."""

    part: int
    scenarios: int
    tokens: int


SCREEN = Screen(part=8, scenarios=8, tokens=16)  # later tokens tell less: those before them, given, pull them along
RUNGS = (Rung(1 / 6, 4), Rung(1, 1))
INCOHERENCE = 2.0  # points of trait that a point of coherence under the floor costs while few scenarios are known


def successive_halving(
    configurations: Sequence[Configuration],
    scenarios: int,
    measure: Measure,
    rungs: Sequence[Rung] = RUNGS,
    group: Callable[[Configuration], Hashable] = by_method,
    among: Sequence[int] | None = None,
) -> list[int]:
    """Indices of the configurations that came through, all measured on every scenario.

    Args:
        configurations: what to search among.
        scenarios: how many there are.
        measure: (indices, n) -> the scores of these configurations and of the unattacked baseline on the first n
            scenarios.
        rungs: the schedule; the last rung's share is 1.
        group: which configurations compete.
        among: indices to begin with; None: all.

    Raises:
        ArgumentError: a schedule whose shares do not rise to 1.
    """
    shares = [rung.share for rung in rungs]
    if not shares or shares[-1] != 1 or shares != sorted(shares) or shares[0] <= 0:
        raise ArgumentError(f"rungs: got shares {shares}; they rise from above 0 to 1")
    alive = list(range(len(configurations)) if among is None else among)
    for rung in rungs:
        scores, baseline = measure(alive, max(1, round(rung.share * scenarios)))
        merits = {index: _merit(score, baseline) for index, score in zip(alive, scores, strict=True)}
        alive = better_part(configurations, merits, rung.halving, group)
    return alive


def better_part(
    configurations: Sequence[Configuration],
    merits: Mapping[int, Any],
    part: int,
    group: Callable[[Configuration], Hashable] = by_method,
) -> list[int]:
    """1 in `part` of each group, rounded up: the indices with the highest merits; ties go to the earlier one."""
    ranked = sorted(merits, key=lambda index: merits[index], reverse=True)
    rivals = grouped(ranked, lambda index: group(configurations[index]))
    return sorted(index for found in rivals.values() for index in found[: math.ceil(len(found) / part)])


def _merit(score: Scored, baseline: Scored) -> tuple[float, float]:
    """Trait less what is incoherent; ties go to the more coherent one."""
    lacking = max(0.0, COHERENCE_FLOOR * baseline.coherence - score.coherence)
    merit = score.trait - INCOHERENCE * lacking
    return (merit, score.coherence) if math.isfinite(merit) else (-math.inf, -math.inf)
