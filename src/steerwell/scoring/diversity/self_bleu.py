"""1 - self-BLEU: how little of a text's n-grams the others of its set contain (Zhu et al. 2018, arXiv 1802.01886)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from steerwell.scoring.diversity import Measure, Subsets, Texts, Values
from steerwell.scoring.diversity._grams import Integers, grams

ORDERS = (1, 2, 3, 4)


def self_bleu(texts: Sequence[Sequence[Hashable]]) -> float:
    """Mean over texts of their BLEU-4 against all the others as references, 0 to 1; 1: all alike.

    Each is sacrebleu's sentence BLEU with effective order and exponential smoothing. The value is exact, not sampled: a
    reference count is the largest of all texts or, for the text that has it, the second largest, so that all texts
    together cost one sort of their n-grams.

    Args:
        texts: as words. One without words is neither measured nor a reference.

    Returns:
        NaN: fewer than 2 texts with words.
    """
    return _Counts.of(texts).self_bleu(np.arange(len(texts)))


@dataclass(frozen=True, slots=True)
class _Counts:
    """n-grams of every text. Per order: (text, n-gram, times) of each pair, sorted by n-gram, most times first."""

    lengths: Integers
    orders: tuple[tuple[Integers, Integers, Integers], ...]

    @classmethod
    def of(cls, texts: Sequence[Sequence[Hashable]]) -> Self:
        lengths = np.array([len(text) for text in texts], np.int64)
        return cls(lengths, tuple(_counted(*grams(texts, order)) for order in ORDERS))

    def self_bleu(self, rows: NDArray[np.intp]) -> float:
        """Of a subset by itself."""
        rows = rows[self.lengths[rows] > 0]
        if len(rows) < 2:
            return math.nan
        inside = np.zeros(len(self.lengths), bool)
        inside[rows] = True
        matched = [_matched(inside, *order)[rows] for order in self.orders]
        lengths = self.lengths[rows].astype(np.float64)
        return float((_brevity(lengths) * _precision(matched, lengths)).mean())


def _counted(owner: Integers, numbers: Integers) -> tuple[Integers, Integers, Integers]:
    size = int(numbers.max(initial=0)) + 1
    pairs, times = np.unique(owner * size + numbers, return_counts=True)
    owner, numbers = np.divmod(pairs, size)
    order = np.lexsort((-times, numbers))
    return owner[order], numbers[order], times[order].astype(np.int64)


def _matched(inside: NDArray[np.bool_], owner: Integers, numbers: Integers, times: Integers) -> Values:
    """Per text of the whole: how many of its n-grams the other texts of the subset have, counts clipped to theirs.

    Within an n-gram the counts fall, so that all texts but the first find theirs in the first; the first finds the
    second's.
    """
    kept = inside[owner]
    owner, numbers, found = owner[kept], numbers[kept], times[kept].astype(np.float64)
    again = numbers[1:] == numbers[:-1]  # entry i + 1 is of the same n-gram as entry i
    first = np.flatnonzero(np.concatenate([[True], ~again])) if len(numbers) else np.zeros(0, np.intp)
    clipped = found.copy()
    clipped[first] = np.where(np.append(again, False)[first], np.append(found, 0)[first + 1], 0)
    return np.bincount(owner, clipped, len(inside)).astype(np.float64)


def _brevity(lengths: Values) -> Values:
    """Penalty of texts shorter than the closest length among the others; of two as close, the shorter counts."""
    order = np.argsort(lengths, kind="stable")
    padded = np.concatenate([[-math.inf], lengths[order], [math.inf]])
    below, own, above = padded[:-2], padded[1:-1], padded[2:]
    closest = np.empty_like(lengths)
    closest[order] = np.where(own - below <= above - own, below, above)
    return np.exp(np.minimum(0, 1 - closest / lengths))


def _precision(matched: Sequence[Values], lengths: Values) -> Values:
    """Geometric mean of the clipped precisions over the orders that a text is long enough for; 0: no match at all."""
    logs, halvings = np.zeros_like(lengths), np.zeros_like(lengths)
    for order, right in zip(ORDERS, matched, strict=True):
        total = np.maximum(lengths - order + 1, 0)
        halvings += (right == 0) & (total > 0)
        smoothed = np.where(right > 0, right, np.exp2(-halvings))
        logs += np.where(total > 0, np.log(smoothed / np.maximum(total, 1)), 0)
    some = np.sum(matched, axis=0) > 0
    return np.where(some, np.exp(logs / np.minimum(lengths, len(ORDERS))), 0)


def _of(texts: Texts, subsets: Subsets) -> Values:
    counts = _Counts.of(texts.words)
    return np.array([1 - counts.self_bleu(rows) for rows in subsets], np.float64)


MEASURE = Measure(_of, "1 - self-BLEU", least=lambda texts: 1)
