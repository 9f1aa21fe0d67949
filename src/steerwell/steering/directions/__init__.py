"""Estimators of a direction: one per file; `estimate` runs one on all layers in one call and calibrates it.

An estimator's module offers `fit(aligned, violating) -> (direction, boundary)` for one layer: arrays [n, d_model] whose
rows are pairs, a direction of any norm and sign, and the decision boundary m along the *unit* direction in its own
sign, or None to have it fitted on the projections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerwell.core.errors import ArgumentError
from steerwell.core.records import Direction, ModelInfo, Vectors
from steerwell.core.registry import Registry
from steerwell.steering.directions._calibrate import ROUNDING, calibrate, orient, split_half

ESTIMATORS = Registry("direction", __name__, "fit")
Array = NDArray[np.float64]
Fit = Callable[[Array, Array], tuple[Array, float | None]]


def estimate(
    aligned: NDArray[np.floating[Any]],
    violating: NDArray[np.floating[Any]],
    model: ModelInfo,
    *,
    method: str = "logistic",
    concept: str = "custom",
    concept_hash: str = "",
    seed: int = 42,
    provenance: Mapping[str, Any] | None = None,
) -> Direction:
    """Direction and calibration of every layer (A, section 3.2).

    Args:
        aligned: pooled states [n, n_layers, d_model] of the aligned answers.
        violating: the same of the violating answers; row i of both is one scenario.
        model: the model that the states come from.
        method: `logistic` (default), `mean_difference`, `pca`, `lda`, or a registered one.
        concept: name for the artifact; `concept_hash` the hash of its content.
        seed: of the random halves for the split-half stability.
        provenance: what the artifact shall remember; JSON values.

    Raises:
        UnknownNameError: no such method.
        ArgumentError: shapes differ or do not fit the model, fewer than 2 pairs, NaN, or classes that are identical.
    """
    fit: Fit = ESTIMATORS.get(method)
    for name, array in (("aligned", aligned), ("violating", violating)):
        if array.ndim != 3 or array.shape[1:] != (model.n_layers, model.d_model) or array.shape != aligned.shape:
            raise ArgumentError(
                f"{name}: got shape {array.shape}; expected [n, n_layers, d_model] = "
                f"[{len(aligned)}, {model.n_layers}, {model.d_model}]"
            )
        if not np.isfinite(array).all():
            raise ArgumentError(f"{name}: holds NaN or infinity; check the model's dtype (float16 may overflow)")
    if len(aligned) < 2:
        raise ArgumentError(f"aligned: got {len(aligned)} pair(s); a direction needs at least 2")
    vectors, calibrations = [], []
    for layer in range(model.n_layers):
        plus = np.asarray(aligned[:, layer], np.float64)
        minus = np.asarray(violating[:, layer], np.float64)
        if np.linalg.norm(plus.mean(0) - minus.mean(0)) <= ROUNDING * max(np.abs(plus).max(), np.abs(minus).max()):
            raise ArgumentError(f"layer {layer}: both classes have the same mean state; are the prompts different?")
        unit, boundary = orient(fit(plus, minus), plus, minus)
        stability = split_half(fit, plus, minus, np.random.default_rng([seed, layer]))
        vectors.append(unit)
        calibrations.append(calibrate(unit, boundary, plus, minus, stability))
    difference: Vectors = (aligned.mean(0, np.float64) - violating.mean(0, np.float64)).astype(np.float32)
    stacked = np.stack(vectors).astype(np.float32)
    made = dict(provenance or {}) | {"direction_seed": seed, "n_pairs": len(aligned)}
    return Direction(concept, concept_hash, method, model, stacked, difference, tuple(calibrations), made)
