"""Directions made by hand: plain numbers, no model."""

from __future__ import annotations

from typing import Any

import numpy as np

from steerwell.core.records import Calibration, Direction, ModelInfo

D_MODEL, N_LAYERS = 6, 3


def model_info(**changes: Any) -> ModelInfo:
    """A model that does not exist."""
    fields: dict[str, Any] = {
        "name": "made-up",
        "architecture": "MadeForCausalLM",
        "config_hash": "0123456789abcdef",
        "d_model": D_MODEL,
        "n_layers": N_LAYERS,
        "signature": (0.5, -1.0, 2.0, -1.5),
    }
    return ModelInfo(**(fields | changes))


def calibration(**changes: Any) -> Calibration:
    """Statistics without any symmetry, so that no two of them can be mixed up unnoticed."""
    fields: dict[str, Any] = {
        "boundary": 0.7,
        "mu_aligned": 2.5,
        "mu_violating": -1.25,
        "sigma_aligned": 0.375,
        "sigma_violating": 0.625,
        "cohens_d": 3.1,
        "cosine_mean_difference": 0.97,
        "split_half": 0.9,
        "n": 40,
    }
    return Calibration(**(fields | changes))


def direction(seed: int = 0, *, model: ModelInfo | None = None, **changes: Any) -> Direction:
    """Random unit vectors with a slightly different calibration at every layer."""
    info = model or model_info()
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(info.n_layers, info.d_model)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    fields: dict[str, Any] = {
        "concept": "made",
        "concept_hash": "f" * 64,
        "method": "mean_difference",
        "model": info,
        "vectors": vectors,
        "mean_difference": 3.75 * vectors,
        "calibration": tuple(calibration(boundary=0.7 - 0.5 * layer) for layer in range(info.n_layers)),
        "provenance": {"seed": 42, "sampling": {"temperature": 0.6}},
    }
    return Direction(**(fields | changes))
