"""Monitor: no token is changed; the receipt tells the projection and how many tokens lie on the violating side."""

from __future__ import annotations

from steerwell.core.records import Calibration


def coefficients(calibration: Calibration, strength: float) -> tuple[float, float, float]:
    """(gate, offset, gain): where `rho < m` the gate opens, and nothing is added; `strength` has no effect, give 0."""
    return calibration.boundary, 0.0, 0.0
