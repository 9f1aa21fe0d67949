"""Screening and successive halving on scores that are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from steerwell.core.errors import ArgumentError
from steerwell.core.records import Verdict
from steerwell.studies.defence import Outcome, choose_each, grid
from steerwell.studies.search import RUNGS, SCREEN, Rung, better_part, successive_halving

WAYS = grid(range(6), {"swfc": (1, 2, 3, 4, 5), "sttp": (0, 6, 12, 18), "stmp": (1, 2, 3)})
SCENARIOS = 24


class Table:
    """Every configuration's verdicts on every scenario, and how many of them were looked at."""

    def __init__(self, trait: np.ndarray, coherence: np.ndarray, baseline: float = 100.0) -> None:
        self.trait, self.coherence, self.baseline = trait, coherence, baseline
        self.seen: set[tuple[int, int]] = set()

    def outcome(self, index: int, count: int) -> Outcome:
        pairs = zip(self.trait[index, :count], self.coherence[index, :count], strict=True)
        return Outcome((), tuple(Verdict(float(trait), float(coherence)) for trait, coherence in pairs))

    def measure(self, indices: Sequence[int], count: int):
        self.seen |= {(index, scenario) for index in indices for scenario in range(count)}
        return [self.outcome(index, count) for index in indices], Outcome((), (Verdict(100, self.baseline),))


def noisy(rng: np.random.Generator, mean: np.ndarray, spread: float) -> np.ndarray:
    return np.clip(mean[:, None] + rng.normal(0, spread, (len(mean), SCENARIOS)), 0, 100)


def test_it_finds_the_best_coherent_one_that_passes_for_a_twentieth_of_the_answers() -> None:
    rng = np.random.default_rng(0)
    for best in (3, 40, 70):
        trait, coherence = rng.uniform(0, 60, len(WAYS)), rng.uniform(60, 100, len(WAYS))
        trait[best], coherence[best] = 90, 97
        trait[best - 1], coherence[best - 1] = 100, 50  # the one that breaks the text to get there
        table = Table(noisy(rng, trait, 15), noisy(rng, coherence, 5))
        likely = rng.uniform(-3, -1, len(WAYS))
        likely[[best - 1, best]] = -1, -0.9
        passed = better_part(WAYS, dict(enumerate(likely)), SCREEN.part)
        left = successive_halving(WAYS, SCENARIOS, table.measure, among=passed)
        assert best in left
        found = choose_each(WAYS, table.measure(range(len(WAYS)), SCENARIOS)[0], Outcome((), (Verdict(100, 100),)),
                            lambda way: way.method)  # fmt: skip
        assert found[WAYS[best].method] == best
    table.seen.clear()
    successive_halving(WAYS, SCENARIOS, table.measure, among=passed)
    assert {index for index, _ in table.seen} == set(passed)
    assert len(table.seen) < 0.08 * len(WAYS) * SCENARIOS


def test_of_each_group_the_better_part_rounded_up_passes() -> None:
    ways = grid([0], {"swfc": (1, 2, 3, 4, 5), "sttp": (0, 6), "stmp": (1,)})
    merits = dict(enumerate([1.0, 5.0, -math.inf, 5.0, 2.0, 0.0, 9.0, -math.inf]))
    assert better_part(ways, merits, 2) == [1, 3, 4, 6, 7]
    assert better_part(ways, merits, 4) == [1, 3, 6, 7]
    assert better_part(ways, merits, 5) == [1, 6, 7]  # of equals the earlier one
    assert better_part(ways, merits, 3, lambda way: "all") == [1, 3, 6]


def test_every_method_keeps_a_candidate_measured_on_everything() -> None:
    trait = np.repeat([[0.0], [50.0]], [len(WAYS) - 1, 1], axis=0).repeat(SCENARIOS, 1)
    table = Table(trait, np.full_like(trait, 100))
    left = successive_halving(WAYS, SCENARIOS, table.measure)
    assert {WAYS[index].method for index in left} == {"swfc", "sttp", "stmp"}
    assert all((index, SCENARIOS - 1) in table.seen for index in left)


def test_missing_scores_never_win() -> None:
    trait = np.full((len(WAYS), SCENARIOS), math.nan)
    trait[7] = 10
    table = Table(trait, np.full_like(trait, 100))
    assert 7 in successive_halving(WAYS, SCENARIOS, table.measure)


@pytest.mark.parametrize("shares", [(), (0.5,), (0.5, 0.2, 1), (0, 1)])
def test_a_schedule_must_rise_to_one(shares) -> None:
    with pytest.raises(ArgumentError, match="rungs: got shares"):
        successive_halving(WAYS, SCENARIOS, Table(np.ones((1, 1)), np.ones((1, 1))).measure,
                           [Rung(share, 2) for share in shares])  # fmt: skip
    assert RUNGS[-1].share == 1
