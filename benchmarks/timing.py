"""Paired timing for a noisy machine: the contestants take turns, and only times of one round are ever divided."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Times = dict[str, list[float]]
MOST = 41


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and quartiles of `n` numbers."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """Of at least one value; the quartiles of a single value are the value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a measurement may take.

    Attributes:
        seconds: rounds are added until they are spent (a warm-up round included).
        least: rounds that count even if they take longer.
    """

    seconds: float
    least: int = 5


def clocked(run: Callable[[], object]) -> Callable[[], float]:
    """A contestant that tells how many seconds it took."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def take_turns(contestants: Mapping[str, Callable[[], float]], pace: Pace) -> Times:
    """Seconds of every contestant in every round, after one round that does not count.

    The order turns around from round to round and rotates, so that no place in it is favoured: A B C, C B A, B C A, ...
    """
    order = list(contestants)
    times: Times = {name: [] for name in order}
    end, number = time.perf_counter() + pace.seconds, -1
    while number < pace.least or (time.perf_counter() < end and number < MOST):
        gc.collect()
        gc.disable()
        try:
            for name in order if number % 2 == 0 else reversed(order):
                seconds = contestants[name]()
                if number >= 0:
                    times[name].append(seconds)
        finally:
            gc.enable()
        number += 1
        if number % 2 == 0 and len(order) > 2:
            order = [*order[1:], order[0]]
    return times


def ratio(times: Times, name: str, base: str) -> Summary:
    """Time of `name` over the time of `base`, round by round."""
    return Summary.of([mine / other for mine, other in zip(times[name], times[base], strict=True)])
