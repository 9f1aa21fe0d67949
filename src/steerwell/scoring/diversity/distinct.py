"""Distinct-n: share of a set's n-grams that are different ones (Li et al. 2016, arXiv 1510.03055)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from steerwell.scoring.diversity import Measure, Subsets, Texts, Values
from steerwell.scoring.diversity._grams import Integers, grams

ORDER = 2


def distinct(texts: Sequence[Sequence[Hashable]], order: int = ORDER) -> float:
    """Different n-grams over all n-grams of texts given as words, 0 to 1; it falls with their number and length.

    Returns:
        NaN: no text has an n-gram.
    """
    return _share(grams(texts, order)[1])


def _share(numbers: Integers) -> float:
    return np.count_nonzero(np.bincount(numbers)) / len(numbers) if len(numbers) else math.nan


def _of(texts: Texts, subsets: Subsets) -> Values:
    owner, numbers = grams(texts.words, ORDER)
    inside = np.zeros((len(subsets), len(texts.words)), bool)
    for row, subset in enumerate(subsets):
        inside[row, subset] = True
    return np.array([_share(numbers[kept[owner]]) for kept in inside], np.float64)


MEASURE = Measure(_of, "distinct-2", least=lambda texts: ORDER)
