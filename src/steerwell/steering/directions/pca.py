"""First principal component of the paired differences (Zou et al. 2023, arXiv 2310.01405)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fit(aligned: Array, violating: Array) -> tuple[Array, float | None]:
    """First right singular vector [d_model] of aligned minus violating, pair by pair, not centred.

    Differences are taken with both signs, as steering-vectors does, which makes their mean zero and centring idle.
    """
    return np.linalg.svd(aligned - violating, full_matrices=False)[2][0], None
