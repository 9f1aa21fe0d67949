"""Linear discriminant: the mean difference whitened by the pooled covariance with Ledoit-Wolf shrinkage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fit(aligned: Array, violating: Array) -> tuple[Array, float | None]:
    """`S^-1 (mean+ - mean-)` [d_model] with `S = (1 - s) E + s (tr E / d) I`, E the pooled within-class covariance.

    All goes through the Gram matrix of the 2 n centred rows, so that no d_model x d_model matrix is ever made.
    """
    centred = np.concatenate([aligned - aligned.mean(0), violating - violating.mean(0)])
    n, width = centred.shape
    difference = aligned.mean(0) - violating.mean(0)
    _, singular, basis = np.linalg.svd(centred, full_matrices=False)
    variances = singular**2 / n
    level = float(variances.sum() / width)
    if level == 0:
        return difference, None
    shrinkage = ledoit_wolf(centred)
    ridge = max(shrinkage * level, 1e-9 * level)
    inside = basis @ difference
    # Inverse in the span of the rows, plus 1 / ridge outside of it.
    return difference / ridge + basis.T @ (inside * (1 / ((1 - shrinkage) * variances + ridge) - 1 / ridge)), None


def ledoit_wolf(centred: Array) -> float:
    """Ledoit and Wolf's (2004) shrinkage in [0, 1] of the covariance of centred rows [n, d], by their Gram matrix."""
    n, width = centred.shape
    gram = centred @ centred.T
    level = np.trace(gram) / (n * width)
    spread = (gram**2).sum() / n**2
    delta = spread / width - level**2
    beta = ((np.diag(gram) ** 2).sum() / n - spread) / (width * n)
    return float(np.clip(beta / delta, 0.0, 1.0)) if delta > 0 else 1.0
