"""Bootstrap intervals of a mean and of a difference of means; missing scores are left out and counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from steerwell.core.errors import ArgumentError, UnknownNameError

IntervalMethod = Literal["bca", "percentile"]
Values = NDArray[np.float64]
Numbers = Sequence[float] | NDArray[np.floating[Any]]
CELLS = 2**22  # resampled numbers held in memory at once
ROUNDING = 1e-9  # relative spread of scores that differ by rounding only


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its bootstrap interval, in the scores' unit.

    Attributes:
        estimate: the mean, or the difference of means; NaN: no score.
        low: lower bound; `high` the upper one; NaN: a sample has fewer than 2 scores.
        n: scores used; in a paired difference, pairs.
        missing: scores left out because they are NaN; in a paired difference, pairs.
    """

    estimate: float
    low: float
    high: float
    n: int
    missing: int


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are made (Efron and Tibshirani 1993, chapters 13 and 14).

    Attributes:
        level: coverage aimed at, in (0, 1).
        method: `bca` (bias-corrected and accelerated) or `percentile`.
        resamples: bootstrap samples drawn.
        seed: the same scores and seed give the same interval.
    """

    level: float = 0.95
    method: IntervalMethod = "bca"
    resamples: int = 9999
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ArgumentError(f"level: got {self.level}; expected a share between 0 and 1, such as 0.95")
        if self.method not in get_args(IntervalMethod):
            raise UnknownNameError("interval method", self.method, get_args(IntervalMethod))
        if self.resamples < 1:
            raise ArgumentError(f"resamples: got {self.resamples}; expected 1 or more, such as 9999")

    def mean(self, values: Numbers) -> Interval:
        """Interval of the mean of n scores; NaN among them is a missing one.

        Raises:
            ArgumentError: not one row of numbers, or infinity among them.
        """
        row = _row("values", values)
        known = row[~np.isnan(row)]
        return self._interval([known], len(known), len(row) - len(known))

    def paired_difference(self, values: Numbers, others: Numbers) -> Interval:
        """Interval of the mean of `values[i] - others[i]`; pairs are resampled, and one with a NaN is missing.

        Raises:
            ArgumentError: as in `mean`, or the numbers of scores differ.
        """
        left, right = _row("values", values), _row("others", others)
        if len(left) != len(right):
            raise ArgumentError(
                f"others: got {len(right)} scores for {len(left)}; pairs need one each (or `difference`)"
            )
        return self.mean(left - right)

    def difference(self, values: Numbers, others: Numbers) -> Interval:
        """Interval of `mean(values) - mean(others)` of independent samples; each is resampled by itself.

        Raises:
            ArgumentError: as in `mean`.
        """
        rows = [_row("values", values), _row("others", others)]
        known = [row[~np.isnan(row)] for row in rows]
        n = sum(map(len, known))
        return self._interval(known, n, sum(map(len, rows)) - n)

    def _interval(self, samples: list[Values], n: int, missing: int) -> Interval:
        if not all(map(len, samples)):
            return Interval(math.nan, math.nan, math.nan, n, missing)
        estimate = float(_statistic(*samples))
        if min(map(len, samples)) < 2:
            return Interval(estimate, math.nan, math.nan, n, missing)
        if all(np.ptp(sample) <= ROUNDING * np.abs(sample).max() for sample in samples):
            # Every resample is the sample; BCa would divide by 0.
            return Interval(estimate, estimate, estimate, n, missing)
        found = stats.bootstrap(
            samples,
            _statistic,
            n_resamples=self.resamples,
            batch=max(1, CELLS // n),
            vectorized=True,
            confidence_level=self.level,
            method=self.method,
            rng=np.random.default_rng(self.seed),
        )
        low, high = found.confidence_interval
        return Interval(estimate, float(low), float(high), n, missing)


def _statistic(*samples: Values, axis: int = -1) -> Any:
    means = [sample.mean(axis=axis) for sample in samples]
    return means[0] - means[1] if len(means) > 1 else means[0]


def _row(name: str, values: Numbers) -> Values:
    row = np.asarray(values, np.float64)
    if row.ndim != 1:
        raise ArgumentError(f"{name}: got shape {row.shape}; expected one row of scores [n]")
    if np.isinf(row).any():
        raise ArgumentError(f"{name}: score {int(np.isinf(row).argmax())} is infinite; leave it out or mark it NaN")
    return row
