"""Directional ablation: the component along the direction is removed from every token."""

from __future__ import annotations

import math

from steerwell.core.records import Calibration

STRENGTH = "share of the component removed (1 removes it, 0 leaves the token)"


def coefficients(calibration: Calibration, strength: float) -> tuple[float, float, float]:
    """(gate, offset, gain): `h - alpha rho v` (Arditi et al. 2024, arXiv 2406.11717)."""
    return math.inf, 0.0, -strength
