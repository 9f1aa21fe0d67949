"""What every estimator shares: orientation, boundary, class statistics and stability."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from steerwell.core.errors import ArgumentError
from steerwell.core.records import Calibration

Array = NDArray[np.float64]
Fit = Callable[[Array, Array], tuple[Array, float | None]]
HALVES = 5  # random splits that the stability averages over
ROUNDING = 1e-12  # relative; what is smaller is no difference


def orient(fitted: tuple[Array, float | None], aligned: Array, violating: Array) -> tuple[Array, float | None]:
    """Unit direction with dmu > 0, and the boundary in that sign.

    Raises:
        ArgumentError: the direction is zero, or does not separate the class means at all.
    """
    vector, boundary = fitted
    norm = float(np.linalg.norm(vector))
    if not (math.isfinite(norm) and norm > 0):
        raise ArgumentError("the estimator found no direction (zero or not finite); the classes may be identical")
    unit = vector / norm
    difference = aligned.mean(0) - violating.mean(0)
    separation = float(difference @ unit)
    if abs(separation) <= ROUNDING * np.linalg.norm(difference):
        raise ArgumentError("the direction does not separate the classes at all; try method 'mean_difference'")
    if separation > 0:
        return unit, boundary
    return -unit, None if boundary is None else -boundary


def calibrate(unit: Array, boundary: float | None, aligned: Array, violating: Array, stability: float) -> Calibration:
    """Class statistics of the pooled projections along an oriented unit direction [d_model]."""
    plus, minus = aligned @ unit, violating @ unit
    difference = aligned.mean(0) - violating.mean(0)
    mu_plus, mu_minus = float(plus.mean()), float(minus.mean())
    sigma_plus, sigma_minus = float(plus.std(ddof=1)), float(minus.std(ddof=1))
    pooled = math.sqrt((sigma_plus**2 + sigma_minus**2) / 2)
    return Calibration(
        boundary=_boundary(plus, minus) if boundary is None else float(boundary),
        mu_aligned=mu_plus,
        mu_violating=mu_minus,
        sigma_aligned=sigma_plus,
        sigma_violating=sigma_minus,
        cohens_d=(mu_plus - mu_minus) / pooled if pooled > 0 else 0.0,
        cosine_mean_difference=float(difference @ unit / np.linalg.norm(difference)),
        split_half=stability,
        n=len(aligned),
    )


def split_half(fit: Fit, aligned: Array, violating: Array, rng: np.random.Generator) -> float:
    """Mean cosine between the directions of two random halves of the pairs.

    NaN with fewer than 4 pairs, or where the pairs of some half show no difference.
    """
    n = len(aligned)
    if n < 4:
        return math.nan
    cosines = []
    for _ in range(HALVES):
        order = rng.permutation(n)
        halves = (order[: n // 2], order[n // 2 :])
        try:
            left, right = (
                orient(fit(aligned[half], violating[half]), aligned[half], violating[half])[0] for half in halves
            )
        except ArgumentError:
            return math.nan
        cosines.append(float(left @ right))
    return float(np.mean(cosines))


def _boundary(plus: Array, minus: Array) -> float:
    """Boundary of a one-dimensional logistic fit; projections are scaled to unit spread, which the fit needs."""
    values = np.concatenate([plus, minus])
    centre, scale = values.mean(), values.std()
    labels = np.repeat([1, 0], [len(plus), len(minus)])
    model = LogisticRegression(C=1.0).fit(((values - centre) / scale)[:, None], labels)
    return float(centre - scale * model.intercept_[0] / model.coef_[0, 0])
