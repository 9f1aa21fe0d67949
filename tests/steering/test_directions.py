"""Estimators: planted answers recovered, parity with scikit-learn and with repeng's and steering-vectors' formulas.

Measured once against the packages themselves (repeng 0.4.0, steering-vectors 0.12.2, on the same float32 arrays of
200 x 24, 40 x 256 and 60 x 64): cosine 1.000000000 with repeng's `pca_center`, with steering-vectors' `pca_aggregator`
and its `mean_aggregator` (largest difference of the latter 2.4e-7). repeng's other method, `pca_diff`, centres the
differences and so removes what they share: another direction (cosine 0.14 to 0.98).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import Direction
from steerwell.steering.directions import ESTIMATORS, estimate
from tests import made

METHODS = ("lda", "logistic", "mean_difference", "pca")
every_method = pytest.mark.parametrize("method", METHODS)


def classes(n: int, width: int, *, separation: float = 4.0, layers: int = 2, seed: int = 0, noise: float = 1.0):
    """(aligned, violating, planted unit directions): pairs that share what they are about and differ along one line."""
    rng = np.random.default_rng(seed)
    planted = rng.normal(size=(layers, width))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    topic = rng.normal(size=(n, layers, width)) * noise + 0.5
    aligned = topic + planted * separation / 2 + 0.3 * noise * rng.normal(size=topic.shape)
    violating = topic - planted * separation / 2 + 0.3 * noise * rng.normal(size=topic.shape)
    return aligned, violating, planted


def fitted(aligned: np.ndarray, violating: np.ndarray, method: str, **options) -> Direction:
    info = made.model_info(n_layers=aligned.shape[1], d_model=aligned.shape[2])
    return estimate(aligned, violating, info, method=method, **options)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def test_the_four_estimators_are_registered() -> None:
    assert set(METHODS) <= set(ESTIMATORS.names())


@every_method
def test_a_planted_direction_is_recovered(method: str) -> None:
    aligned, violating, planted = classes(1500, 12, separation=2.5)
    got = fitted(aligned, violating, method)
    for layer, direction in enumerate(planted):
        assert cosine(got.vectors[layer], direction) > 0.99


@pytest.mark.parametrize(("n", "width"), [(120, 12), (15, 60)], ids=["more rows than columns", "fewer rows"])
def test_logistic_equals_scikit_learns_direct_fit(n: int, width: int) -> None:
    aligned, violating, _ = classes(n, width, separation=1.0)
    got = fitted(aligned, violating, "logistic")
    for layer, calibration in enumerate(got.calibration):
        states = np.concatenate([aligned[:, layer], violating[:, layer]])
        direct = LogisticRegression(C=1.0, tol=1e-8, max_iter=100_000).fit(states, [1] * n + [0] * n)
        weights, bias = direct.coef_[0], direct.intercept_[0]
        assert cosine(got.vectors[layer], weights) > 1 - 1e-7
        assert calibration.boundary == pytest.approx(-bias / np.linalg.norm(weights), abs=1e-4)


def test_the_logistic_boundary_is_where_the_probe_is_undecided() -> None:
    aligned, violating, _ = classes(60, 8, separation=1.0, layers=1)
    got = fitted(aligned, violating, "logistic")
    states = np.concatenate([aligned[:, 0], violating[:, 0]])
    probe = LogisticRegression(C=1.0, tol=1e-9, max_iter=100_000).fit(states, [1] * 60 + [0] * 60)
    at = got.calibration[0].boundary * got.vectors[0]
    assert probe.decision_function(at[None])[0] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(("n", "width"), [(120, 12), (15, 60)], ids=["more rows than columns", "fewer rows"])
def test_lda_equals_the_dense_formula(n: int, width: int) -> None:
    aligned, violating, _ = classes(n, width, separation=1.0)
    aligned = aligned * np.linspace(0.2, 3, width)
    violating = violating * np.linspace(0.2, 3, width)
    got = fitted(aligned, violating, "lda")
    for layer in range(aligned.shape[1]):
        plus, minus = aligned[:, layer], violating[:, layer]
        centred = np.concatenate([plus - plus.mean(0), minus - minus.mean(0)])
        covariance = LedoitWolf(assume_centered=True).fit(centred).covariance_
        dense = np.linalg.solve(covariance, plus.mean(0) - minus.mean(0))
        assert cosine(got.vectors[layer], dense) > 1 - 1e-9


def test_lda_sees_through_correlated_noise_where_the_mean_difference_does_not() -> None:
    """Classes differ along u, measured with noise that is strong along w and leaks into the means of few pairs."""
    rng = np.random.default_rng(1)
    loud = np.diag(np.r_[np.full(4, 5.0), np.ones(12)])
    best = np.linalg.solve(loud @ loud, np.ones(16))
    plus, minus = (rng.normal(size=(400, 1, 16)) @ loud + side * np.ones(16) for side in (0.5, -0.5))
    assert cosine(fitted(plus, minus, "lda").vectors[0], best) > 0.98
    assert cosine(fitted(plus, minus, "mean_difference").vectors[0], best) < 0.95


@pytest.mark.parametrize(("n", "width"), [(50, 10), (12, 40)])
def test_pca_equals_the_published_formulas(n: int, width: int) -> None:
    """repeng's `pca_center`, and steering-vectors' `pca_aggregator`: both say the same, and ours is that."""
    aligned, violating, _ = classes(n, width, separation=1.5)
    got = fitted(aligned, violating, "pca")
    for layer in range(aligned.shape[1]):
        plus, minus = aligned[:, layer], violating[:, layer]
        centre = (plus + minus) / 2
        centred = np.concatenate([plus - centre, minus - centre])
        repeng = np.linalg.svd(centred - centred.mean(0), full_matrices=False)[2][0]
        deltas = np.concatenate([plus - minus, minus - plus])
        steering_vectors = np.linalg.svd(deltas.T, full_matrices=False)[0][:, 0]
        steering_vectors *= np.sign(((plus - minus) @ steering_vectors).mean())
        assert abs(cosine(got.vectors[layer], repeng)) > 1 - 1e-9
        assert cosine(got.vectors[layer], steering_vectors) > 1 - 1e-9


def test_pca_is_not_repengs_pca_diff() -> None:
    """`pca_diff` centres the differences: with one clear common difference, it finds what remains."""
    aligned, violating, planted = classes(50, 10, layers=1)
    differences = (aligned - violating)[:, 0]
    pca_diff = np.linalg.svd(differences - differences.mean(0), full_matrices=False)[2][0]
    assert abs(cosine(pca_diff, planted[0])) < 0.9
    assert cosine(fitted(aligned, violating, "pca").vectors[0], planted[0]) > 0.99


def test_mean_difference_equals_the_published_formula() -> None:
    """steering-vectors' `mean_aggregator`: the mean of the paired differences, not normalised."""
    aligned, violating, _ = classes(30, 10)
    got = fitted(aligned, violating, "mean_difference")
    expected = (aligned - violating).mean(0)
    assert_allclose(got.mean_difference, expected, rtol=1e-5)
    assert_allclose(got.vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


@every_method
def test_the_mean_difference_is_kept_beside_every_direction(method: str) -> None:
    aligned, violating, _ = classes(30, 10)
    assert_allclose(fitted(aligned, violating, method).mean_difference, (aligned - violating).mean(0), rtol=1e-5)


@every_method
@pytest.mark.parametrize("seed", range(5))
def test_every_direction_points_to_the_aligned_class(method: str, seed: int) -> None:
    aligned, violating, _ = classes(10, 6, separation=0.2, seed=seed)
    got = fitted(aligned, violating, method)
    assert all(calibration.separation > 0 for calibration in got.calibration)
    assert_allclose(np.linalg.norm(got.vectors, axis=1), 1.0, atol=1e-6)


@every_method
def test_exchanging_the_classes_swaps_everything(method: str) -> None:
    aligned, violating, _ = classes(40, 6, separation=1.0)
    ours, theirs = fitted(aligned, violating, method), fitted(violating, aligned, method)
    assert_allclose(theirs.vectors, -ours.vectors, atol=1e-5)
    for mine, other in zip(ours.calibration, theirs.calibration, strict=True):
        swapped = mine.swapped()
        for field in ("boundary", "mu_aligned", "mu_violating", "sigma_aligned", "sigma_violating", "cohens_d"):
            assert getattr(other, field) == pytest.approx(getattr(swapped, field), abs=1e-3), field


@every_method
def test_the_calibration_is_that_of_the_projections(method: str) -> None:
    aligned, violating, _ = classes(30, 8, separation=1.0)
    got = fitted(aligned, violating, method)
    for layer, calibration in enumerate(got.calibration):
        vector = got.vectors[layer].astype(np.float64)
        plus, minus = aligned[:, layer] @ vector, violating[:, layer] @ vector
        difference = (aligned - violating)[:, layer].mean(0)
        pooled = math.sqrt((plus.var(ddof=1) + minus.var(ddof=1)) / 2)
        expected = {
            "mu_aligned": plus.mean(),
            "mu_violating": minus.mean(),
            "sigma_aligned": plus.std(ddof=1),
            "sigma_violating": minus.std(ddof=1),
            "separation": difference @ vector,
            "cohens_d": (plus.mean() - minus.mean()) / pooled,
            "cosine_mean_difference": cosine(difference, vector),
        }
        for name, value in expected.items():
            assert getattr(calibration, name) == pytest.approx(value, rel=1e-4), name
        assert calibration.n == 30
        assert calibration.mu_violating < calibration.boundary < calibration.mu_aligned
    if method == "mean_difference":
        assert [c.cosine_mean_difference for c in got.calibration] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("method", ["mean_difference", "pca", "lda"])
def test_estimators_without_boundary_get_a_one_dimensional_logistic_one(method: str) -> None:
    aligned, violating, _ = classes(40, 8, separation=1.0, layers=1)
    got = fitted(aligned, violating, method)
    values = np.concatenate([aligned, violating])[:, 0] @ got.vectors[0].astype(np.float64)
    scaled = (values - values.mean()) / values.std()
    probe = LogisticRegression(C=1.0, tol=1e-9).fit(scaled[:, None], [1] * 40 + [0] * 40)
    boundary = values.mean() - values.std() * probe.intercept_[0] / probe.coef_[0, 0]
    assert got.calibration[0].boundary == pytest.approx(boundary, abs=1e-3)


@every_method
def test_the_boundary_follows_the_unit_of_the_states(method: str) -> None:
    """Far from zero and in large units, as residual streams are: the boundary stays between the classes."""
    aligned, violating, _ = classes(30, 4, separation=2.0, layers=1)
    for scale, shift in ((1000.0, 0.0), (1.0, 50.0)):
        got = fitted(aligned * scale + shift, violating * scale + shift, method)
        for calibration in got.calibration:
            low = calibration.mu_violating + 0.2 * calibration.separation
            assert low < calibration.boundary < calibration.mu_aligned - 0.2 * calibration.separation


@every_method
def test_split_halves_agree_on_a_clear_direction_and_not_on_noise(method: str) -> None:
    clear = fitted(*classes(100, 12, separation=6.0, noise=0.3)[:2], method)
    assert min(layer.split_half for layer in clear.calibration) > 0.95
    rng = np.random.default_rng(0)
    noise = fitted(rng.normal(size=(60, 3, 200)), rng.normal(size=(60, 3, 200)), method)
    assert max(abs(layer.split_half) for layer in noise.calibration) < 0.3


@every_method
def test_too_few_pairs_for_halves(method: str) -> None:
    aligned, violating, _ = classes(4, 6)
    assert all(math.isnan(layer.split_half) for layer in fitted(aligned[:3], violating[:3], method).calibration)
    assert all(math.isfinite(layer.split_half) for layer in fitted(aligned, violating, method).calibration)


@every_method
def test_a_half_that_shows_no_difference_makes_the_stability_unknown(method: str) -> None:
    """A model that answers most pairs in the same way under both prompts: some halves hold no difference at all."""
    rng = np.random.default_rng(0)
    violating = rng.normal(size=(6, 1, 5))
    aligned = violating.copy()
    aligned[0] += 1.0
    got = fitted(aligned, violating, method)
    assert cosine(got.mean_difference[0], np.ones(5)) == pytest.approx(1.0)
    assert math.isnan(got.calibration[0].split_half)


def test_a_direction_across_the_difference_is_refused() -> None:
    """The pairs differ most along a line on which the classes do not differ at all."""
    violating = np.zeros((2, 1, 3))
    aligned = np.array([[[10.0, 1.0, 0.0]], [[-10.0, 1.0, 0.0]]])
    with pytest.raises(ArgumentError, match="does not separate the classes at all; try method 'mean_difference'"):
        fitted(aligned, violating, "pca")
    assert_allclose(fitted(aligned, violating, "mean_difference").vectors, [[0.0, 1.0, 0.0]], atol=1e-6)


@every_method
def test_classes_in_which_nothing_varies(method: str) -> None:
    violating = np.zeros((6, 1, 5))
    aligned = violating + np.array([3.0, 0, 0, 0, 0])
    got = fitted(aligned, violating, method)
    calibration = got.calibration[0]
    assert_allclose(got.vectors[0], [1.0, 0, 0, 0, 0], atol=1e-6)
    assert (calibration.sigma_aligned, calibration.sigma_violating, calibration.cohens_d) == (0.0, 0.0, 0.0)
    assert calibration.boundary == pytest.approx(1.5, abs=1e-3)
    assert calibration.separation == pytest.approx(3.0)


@every_method
def test_layers_are_fitted_each_on_its_own(method: str) -> None:
    aligned, violating, _ = classes(30, 8, layers=3)
    together = fitted(aligned, violating, method)
    alone = fitted(aligned[:, :1], violating[:, :1], method)
    assert_array_equal(together.vectors[0], alone.vectors[0])
    assert together.calibration[0] == alone.calibration[0]


def test_the_same_seed_gives_the_same_halves() -> None:
    aligned, violating, _ = classes(20, 8, separation=1.0)
    first, again, other = (fitted(aligned, violating, "logistic", seed=seed) for seed in (1, 1, 2))
    assert first.calibration == again.calibration
    assert [c.split_half for c in first.calibration] != [c.split_half for c in other.calibration]


def test_the_artifact_remembers_how_it_was_made() -> None:
    aligned, violating, _ = classes(20, 8)
    got = fitted(aligned, violating, "pca", concept="calm", concept_hash="abc", seed=7, provenance={"note": "x"})
    assert (got.concept, got.concept_hash, got.method) == ("calm", "abc", "pca")
    assert got.provenance == {"note": "x", "direction_seed": 7, "n_pairs": 20}
    assert got.vectors.dtype == got.mean_difference.dtype == np.float32


@every_method
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_states_of_any_float_type_are_taken_and_left_alone(method: str, dtype: type) -> None:
    aligned, violating, planted = (array.astype(dtype) for array in classes(60, 12, separation=6.0))
    before = aligned.copy()
    got = fitted(aligned, violating, method)
    assert_array_equal(aligned, before)
    assert min(cosine(*vectors) for vectors in zip(got.vectors, planted, strict=True)) > 0.95


GOOD = np.random.default_rng(0).normal(size=(5, made.N_LAYERS, made.D_MODEL))
HOLED = GOOD.copy()
HOLED[2, 1, 3] = np.nan


@pytest.mark.parametrize(
    ("aligned", "violating", "told"),
    [
        (GOOD[:, :2], GOOD[:, :2], r"aligned: got shape \(5, 2, 6\); expected .* = \[5, 3, 6\]"),
        (GOOD[..., :5], GOOD[..., :5], r"aligned: got shape \(5, 3, 5\)"),
        (GOOD, GOOD[:4], r"violating: got shape \(4, 3, 6\); expected .* = \[5, 3, 6\]"),
        (GOOD[:, 0], GOOD[:, 0], r"aligned: got shape \(5, 6\)"),
        (HOLED, GOOD, "aligned: holds NaN or infinity; check the model's dtype"),
        (GOOD, np.where(np.isnan(HOLED), np.inf, HOLED), "violating: holds NaN or infinity"),
        (GOOD[:1], GOOD[:1] + 1, r"aligned: got 1 pair\(s\); a direction needs at least 2"),
        (GOOD[:0], GOOD[:0], r"aligned: got 0 pair\(s\)"),
        (GOOD, GOOD, "layer 0: both classes have the same mean state; are the prompts different"),
        (GOOD, GOOD[::-1], "layer 0: both classes have the same mean state"),
    ],
)
@every_method
def test_what_cannot_be_fitted_is_refused(aligned, violating, told: str, method: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        estimate(aligned, violating, made.model_info(), method=method)


def test_an_unknown_estimator_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown direction 'logistics'; known: .*Did you mean 'logistic'"):
        estimate(GOOD, GOOD + 1, made.model_info(), method="logistics")
