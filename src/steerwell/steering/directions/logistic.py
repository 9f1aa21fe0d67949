"""Logistic regression (L-BFGS, C = 1.0) on the pooled states: the paper's probe and our default (A, section 3.2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

Array = NDArray[np.float64]


def fit(aligned: Array, violating: Array) -> tuple[Array, float | None]:
    """Weights w [d_model] and boundary `m = -b / |w|`.

    With fewer rows than `d_model` the ridge solution lies in the rows' span, so the fit runs in an orthonormal basis
    of that span: the same result for a fraction of the work.
    """
    states = np.concatenate([aligned, violating])
    labels = np.repeat([1, 0], [len(aligned), len(violating)])
    basis = None
    if len(states) < states.shape[1]:
        basis, triangle = np.linalg.qr(states.T)
        states = triangle.T
    model = LogisticRegression(C=1.0, solver="lbfgs", tol=1e-6, max_iter=10_000).fit(states, labels)
    weights = model.coef_[0] if basis is None else basis @ model.coef_[0]
    norm = np.linalg.norm(weights)
    return weights, float(-model.intercept_[0] / norm) if norm else None
