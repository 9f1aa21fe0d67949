"""Mean cosine distance between two texts of a set, whatever they answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerwell.scoring.diversity import Measure, Subsets, Texts, Values, unit_rows


def cosine_distance(embeddings: NDArray[np.floating[Any]]) -> float:
    """Mean of `1 - cosine` over all pairs of different rows, 0 to 2, in O(n d) (METHODS section 6).

    Args:
        embeddings: [n, d], any norm; rows of zero norm are alike to each other and unlike all others (cosine 0).

    Returns:
        NaN: fewer than 2 rows.
    """
    return mean_distance(unit_rows(embeddings))


def mean_distance(units: Values) -> float:
    """As `cosine_distance`, of unit or zero rows: the pairs' sum is the squared norm of the rows' sum, less n ones."""
    n = len(units)
    if n < 2:
        return math.nan
    blank = n - np.count_nonzero(units.any(axis=1))
    total = float(np.square(units.sum(axis=0)).sum()) + blank**2
    return max(0.0, 1 - (total - n) / (n * (n - 1)))  # identical rows: rounding may give -1e-16


def _of(texts: Texts, subsets: Subsets) -> Values:
    return np.array([mean_distance(texts.units[rows]) for rows in subsets], np.float64)


MEASURE = Measure(_of, "cosine distance, pooled", high=2)
