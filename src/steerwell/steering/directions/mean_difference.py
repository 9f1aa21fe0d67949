"""Difference of the class means (CAA: Rimsky et al. 2023, arXiv 2312.06681)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fit(aligned: Array, violating: Array) -> tuple[Array, float | None]:
    """Mean aligned minus mean violating state [d_model]; the boundary is left to the calibration."""
    return aligned.mean(0) - violating.mean(0), None
