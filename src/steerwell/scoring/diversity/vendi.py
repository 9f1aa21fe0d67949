"""Vendi score: how many different texts a set is worth (Friedman and Dieng 2023, arXiv 2210.02410)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerwell.scoring.diversity import Measure, Subsets, Texts, Values, unit_rows

EXACT = 1024  # eigenvalues; beyond, a subset's entropy is taken from the whole set's


def vendi(embeddings: NDArray[np.floating[Any]]) -> float:
    """`exp(-sum l log l)`, `l` the eigenvalues of the cosine Gram matrix / n: 1 (all alike) to min(n, d).

    The d x d matrix has the same eigenvalues as the n x n one; the smaller is taken, in float64.

    Args:
        embeddings: [n, d], any norm; rows of zero norm are alike to each other and unlike all others.

    Returns:
        NaN: no row.
    """
    return math.exp(_entropy(_with_blank(unit_rows(embeddings)))) if len(embeddings) else math.nan


def normalised_vendi(embeddings: NDArray[np.floating[Any]]) -> float:
    """`log VS / log min(n, d)`, 0 (all alike) to 1: d caps the rank, so that `log n` would not be reached.

    Args:
        embeddings: as in `vendi`.

    Returns:
        NaN: min(n, d) is below 2.
    """
    n, d = np.shape(embeddings)
    return float(_normalised(_entropy(_with_blank(unit_rows(embeddings))), n, d)) if n else math.nan


def _normalised(entropy: float, n: int, d: int) -> float:
    return min(1.0, max(0.0, entropy / math.log(min(n, d)))) if min(n, d) > 1 else math.nan


def _with_blank(units: Values) -> Values:
    """Zero rows get a dimension of their own, so that the Gram matrix has ones on its diagonal."""
    blank = ~units.any(axis=1)
    return np.column_stack([units, blank]) if blank.any() else units


def _gram(units: Values) -> Values:
    n, d = units.shape
    gram: Values = (units.T @ units if d < n else units @ units.T) / n
    return gram


def _entropy(units: Values) -> float:
    values = np.linalg.eigvalsh(_gram(units))
    values = values[values > 0]  # the others are 0 but for rounding
    return float(-(values * np.log(values)).sum())


def _shares(units: Values) -> Values:
    """Every row's share in the entropy, [n]; their mean is the entropy.

    With `rho = sum u u^T / n`, entropy `-tr(rho log rho)` is the mean of `-u^T log(rho) u`, and to first order the
    entropy of a subset is the mean of its rows' shares.
    """
    n, d = units.shape
    values, vectors = np.linalg.eigh(_gram(units))
    logs = np.log(np.where(values > 0, values, 1))
    squares = np.square(units @ vectors) if d < n else np.square(vectors) * (n * values)
    return np.asarray(-(squares @ logs), np.float64)


def _of(texts: Texts, subsets: Subsets) -> Values:
    n, d = texts.units.shape
    units = _with_blank(texts.units)
    if min(n, d) > EXACT and len(subsets) > 1:
        shares = _shares(units)
        entropies = [float(shares[rows].mean()) for rows in subsets]
    else:
        entropies = [_entropy(units[rows]) if len(rows) else math.nan for rows in subsets]
    return np.array([_normalised(h, len(rows), d) for h, rows in zip(entropies, subsets, strict=True)], np.float64)


MEASURE = Measure(_of, "Vendi, log VS / log min(n, d)")
