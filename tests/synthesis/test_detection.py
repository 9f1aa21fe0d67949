"""Figures of a detector against scikit-learn, hand calculation and a plain bootstrap."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from steerwell.core.errors import ArgumentError
from steerwell.synthesis.detection import FIGURES, auroc, by_prompt, compare, detection, f1_threshold
from steerwell.synthesis.examples import Example

NAN = math.nan
# Highest first: + - + (+ -) -. Pairs: 3 x 3; won 3 + 2 + 1.5 = 6.5.
LABELS = [0, 1, 1, 0, 1, 0]
SCORES = [0.1, 0.9, 0.6, 0.75, 0.3, 0.3]


def drawn(n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and rounded scores, so that ties occur."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return labels, np.clip(np.round(0.45 + 0.1 * labels + 0.2 * rng.normal(size=n), 2), 0, 1)


def by_sklearn(labels: np.ndarray, scores: np.ndarray, threshold: float) -> list[float]:
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = [abs((scores - labels)[bins == each].sum()) for each in range(10)]
    return [
        float(roc_auc_score(labels, scores)),
        float(average_precision_score(labels, scores)),
        float(f1_score(labels, scores >= threshold)),
        float(false[true >= 0.95].min()),
        sum(gaps) / len(labels),
    ]


def test_figures_by_hand() -> None:
    found = detection(LABELS, SCORES, threshold=0.6)
    assert found.auroc.estimate == pytest.approx(6.5 / 9)
    assert found.auprc.estimate == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)
    assert found.f1.estimate == pytest.approx(2 * 2 / (3 + 3))  # flags + - +, misses one
    assert found.fpr95.estimate == pytest.approx(2 / 3)  # all three are flagged from 0.3 on
    assert found.ece.estimate == pytest.approx((0.1 + 0.1 + 0.4 + 0.75 + abs(0.3 - 0.7)) / 6)  # both 0.3: one bin
    assert (found.violating, found.groups, found.auroc.n, found.auroc.missing) == (3, 6, 6, 0)


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    labels, scores = drawn(seed=seed)
    found = detection(labels, scores, threshold=0.55, resamples=1)
    assert_allclose([getattr(found, name).estimate for name in FIGURES], by_sklearn(labels, scores, 0.55), atol=1e-12)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))


def test_nineteen_of_twenty_are_95_percent() -> None:
    labels, scores = [1] * 19 + [0] * 10 + [1], np.linspace(0.9, 0.1, 30)
    assert detection(labels, scores).fpr95.estimate == 0
    assert detection(labels[1:], scores[1:]).fpr95.estimate == 1  # 18 of 19 are fewer


def test_auroc_reads_any_scale_and_turns_round() -> None:
    labels, scores = drawn()
    assert auroc(labels, 100 * scores - 7) == pytest.approx(auroc(labels, scores))
    assert auroc(labels, -scores) == pytest.approx(1 - auroc(labels, scores))


def test_missing_scores_are_left_out_and_counted() -> None:
    labels, scores = drawn(60)
    holes = scores.copy()
    holes[[3, 11]] = NAN
    found = detection(labels, holes)
    kept = np.delete(np.arange(60), [3, 11])
    assert found.auroc == replace(detection(labels[kept], scores[kept]).auroc, missing=2)
    assert found.auroc.n == 58


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_one_class_gives_no_figure_but_calibration(labels: list[int]) -> None:
    found = detection(labels, [0.2, 0.5, 0.8])
    assert all(math.isnan(getattr(found, name).estimate) for name in FIGURES[:4])
    assert all(math.isnan(getattr(found, name).low) for name in FIGURES[:4])
    assert found.ece.estimate == pytest.approx(abs(sum(np.array([0.2, 0.5, 0.8]) - labels)) / 3)
    assert math.isnan(auroc(labels, [0.2, 0.5, 0.8]))
    assert f1_threshold(labels, [0.2, 0.5, 0.8]) == 0.5


def test_no_score_at_all() -> None:
    found = detection([0, 1], [NAN, NAN])
    assert all(math.isnan(getattr(found, name).estimate) for name in FIGURES)
    assert (found.auroc.n, found.auroc.missing) == (0, 2)
    assert math.isnan(compare([0, 1], [NAN, NAN], [0.1, 0.2]).p)


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    labels, scores = drawn(80)
    rng, areas = np.random.default_rng(1), []
    while len(areas) < 3000:
        rows = rng.integers(80, size=80)
        if 0 < labels[rows].sum() < 80:
            areas.append(roc_auc_score(labels[rows], scores[rows]))
    found = detection(labels, scores, resamples=4000).auroc
    assert_allclose([found.low, found.high], np.quantile(areas, [0.025, 0.975]), atol=0.01)


def test_groups_are_drawn_whole() -> None:
    """Every example twice under one group is the same evidence as once: the interval must not shrink."""
    labels, scores = drawn(60)
    once = detection(labels, scores)
    twice = detection(np.repeat(labels, 2), np.repeat(scores, 2), groups=np.repeat(np.arange(60), 2))
    apart = detection(np.repeat(labels, 2), np.repeat(scores, 2))
    for name in FIGURES:
        left, right = getattr(once, name), getattr(twice, name)
        assert_allclose([left.estimate, left.low, left.high], [right.estimate, right.low, right.high], atol=1e-12)
    assert apart.auroc.high - apart.auroc.low < 0.85 * (twice.auroc.high - twice.auroc.low)
    assert (twice.groups, apart.groups) == (60, 120)


def test_one_group_has_no_interval() -> None:
    found = detection(LABELS, SCORES, groups=["same prompt"] * 6)
    assert found.auroc.estimate == pytest.approx(6.5 / 9)
    assert math.isnan(found.auroc.low)


def test_rows_are_seeds() -> None:
    labels, scores = drawn()
    rows = np.stack([scores, 1 - scores, np.clip(scores + 0.1 * labels, 0, 1)])
    found = detection(labels, rows, threshold=[0.5, 0.6, 0.7])
    alone = [detection(labels, row, threshold=cut) for row, cut in zip(rows, (0.5, 0.6, 0.7), strict=True)]
    for name in FIGURES:
        each = [getattr(one, name).estimate for one in alone]
        assert_allclose(found.seeds[name], each, atol=1e-12)
        assert getattr(found, name).estimate == pytest.approx(np.mean(each))
    pair = detection(labels, rows[:2])  # mirrored scores: their mean area is 1/2 in every resample
    assert_allclose([pair.auroc.low, pair.auroc.high], 0.5, atol=1e-12)


def test_equal_detectors_do_not_differ() -> None:
    labels, scores = drawn()
    found = compare(labels, scores, scores)
    assert (found.difference.estimate, found.difference.low, found.difference.high, found.p) == (0, 0, 0, 1)
    assert found.first == found.second == detection(labels, scores).auroc


def test_a_better_detector_is_told_from_a_worse_one() -> None:
    labels, scores = drawn(300)
    better = np.clip(scores + 0.1 * labels, 0, 1)
    found = compare(labels, better, scores)
    assert found.difference.estimate == pytest.approx(roc_auc_score(labels, better) - roc_auc_score(labels, scores))
    assert found.difference.low > 0
    assert found.p < 0.01
    turned = compare(labels, scores, better)
    assert turned.difference.high == pytest.approx(-found.difference.low)
    unpaired = found.first.high - found.first.low  # the two share their examples, so their difference is surer
    assert found.difference.high - found.difference.low < unpaired


def test_p_is_uniform_enough_without_a_difference() -> None:
    """Two scorings of the same noise level: p below 0.1 about one time in ten."""
    rng, small = np.random.default_rng(3), 0
    for _ in range(60):
        labels = np.repeat([0, 1], 40)
        left, right = (0.5 * labels + rng.normal(size=80) for _ in range(2))
        small += compare(labels, left, right, resamples=300).p < 0.1
    assert 1 <= small <= 14


def test_pairs_that_either_leaves_unscored_are_left_out() -> None:
    labels, scores = drawn(50)
    left, right = scores.copy(), scores[::-1].copy()
    left[0], right[1] = NAN, NAN
    found = compare(labels, left, right)
    assert (found.difference.n, found.difference.missing) == (48, 2)
    assert found.first.estimate == pytest.approx(auroc(labels[2:], left[2:]))


def test_f1_threshold_has_the_highest_f1() -> None:
    labels, scores = drawn(100)
    cut = f1_threshold(labels, scores)
    best = max(f1_score(labels, scores >= level) for level in set(scores.tolist()))
    assert f1_score(labels, scores >= cut) == pytest.approx(best)
    assert f1_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == pytest.approx(0.4)


def test_same_seed_same_interval() -> None:
    labels, scores = drawn(50)
    assert detection(labels, scores, seed=1) == detection(labels, scores, seed=1)
    assert detection(labels, scores, seed=1) != detection(labels, scores, seed=2)


def test_examples_are_grouped_by_prompt() -> None:
    prompts = ["Who?", "", "who? ", "Why?", ""]
    assert by_prompt([Example(prompt, "r", 0) for prompt in prompts]).tolist() == [0, 1, 0, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([0, 2], [0.1, 0.2]), "labels"),
        (([0, 1], [0.1]), "scores"),
        (([0, 1], [0.1, 1.5]), "P(violating)"),
        (([0, 1], [0.1, math.inf]), "infinity"),
    ],
)
def test_wrong_input_is_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ArgumentError) as error:
        detection(*arguments)
    assert named in str(error.value)


def test_wrong_groups_and_thresholds_are_named() -> None:
    with pytest.raises(ArgumentError, match="groups: got 1"):
        detection([0, 1], [0.1, 0.2], groups=[1])
    with pytest.raises(ArgumentError, match="threshold"):
        detection([0, 1], [0.1, 0.2], threshold=[0.1, 0.2])
    with pytest.raises(ArgumentError, match="one \\[n\\]"):
        f1_threshold([0, 1], [[0.1, 0.2], [0.1, 0.2]])
