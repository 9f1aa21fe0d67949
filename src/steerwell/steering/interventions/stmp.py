"""Steering to mirrored projection (StMP): tokens below the boundary are reflected across it."""

from __future__ import annotations

from steerwell.core.records import Calibration

STRENGTH = "share of the mirror step (1 reflects across the boundary, 0 leaves the token)"


def coefficients(calibration: Calibration, strength: float) -> tuple[float, float, float]:
    """(gate, offset, gain): where `rho < m`, `h + 2 alpha (m - rho) v`, A section 3.3."""
    return calibration.boundary, 2.0 * strength * calibration.boundary, -2.0 * strength
