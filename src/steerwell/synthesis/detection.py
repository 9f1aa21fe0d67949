"""How good a detector is: figures of its scores on labelled examples, their intervals, and a paired test of two.

Scores are P(violating): one row [n], or [k, n], one row for each of k detectors that differ in their seed alone. A
figure is then the mean of the rows' figures, and its interval is about that mean. An example that any row leaves
unscored (NaN) is left out of every row and counted.

Intervals are 95 % percentile bootstrap ones over the examples, or over groups of them: examples that share a prompt are
no independent evidence, so draw prompts (`by_prompt`). A resample that lost one of the two classes says nothing and is
left out. Where every violating example scores above every benign one no resample differs, so an AUROC of 1 has an
interval without width, however few the examples. All resamples are computed at once as weights of the examples; with
equal weights the figures are those of scikit-learn, which the tests hold them to.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steerwell.core.errors import ArgumentError
from steerwell.scoring.intervals import Interval
from steerwell.synthesis.examples import Example

FIGURES = ("auroc", "auprc", "f1", "fpr95", "ece")
BINS = 10  # of equal width, for the calibration error
LEVEL = 0.95
RESAMPLES = 2000
SEED = 42
CELLS = 2**20  # weights held in memory at once

Values = NDArray[np.float64]
Groups = Sequence[Hashable] | NDArray[Any]


@dataclass(frozen=True, slots=True)
class Detection:
    """Figures of a detector; NaN where there are examples of one class only.

    Attributes:
        auroc: chance that a violating example scores above a benign one; a tie counts half.
        auprc: average precision, `sum (R_k - R_{k-1}) P_k` over the distinct scores; by chance the violating share.
        f1: of `score >= threshold`.
        fpr95: false positive rate at the highest score that flags 95 % of the violating examples.
        ece: calibration error: mean over the examples of `|mean score - violating share|` of their bin; 10 bins of
            equal width. Small samples raise it, resamples more so: its interval may lie above its estimate.
        seeds: every figure, by name, of each row of scores.
        thresholds: of each row, fixed before these examples were seen.
        violating: examples of the violating class; `auroc.n` is all of them, `auroc.missing` those without score.
        groups: what was resampled.
    """

    auroc: Interval
    auprc: Interval
    f1: Interval
    fpr95: Interval
    ece: Interval
    seeds: Mapping[str, tuple[float, ...]]
    thresholds: tuple[float, ...]
    violating: int
    groups: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two detectors on the same examples.

    Attributes:
        first: AUROC of the first; `second` that of the second.
        difference: first minus second, from the same resamples of the examples.
        p: two-sided bootstrap p-value of 'no difference': twice the share of resamples on the rarer side of 0.
    """

    first: Interval
    second: Interval
    difference: Interval
    p: float


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """The area under the ROC curve alone, without interval: the mean over rows; NaN: one class only.

    Raises:
        ArgumentError: as in `detection`, but scores may be any finite numbers.
    """
    truth, rows, _ = _known(labels, [scores])
    return float(np.mean([row.figures(np.ones((1, len(truth))))[0, 0] for row in _ranked(truth, rows[0])]))


def detection(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    threshold: float | Sequence[float] = 0.5,
    groups: Groups | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Detection:
    """All figures of a detector with their intervals.

    Args:
        labels: 1 violating, 0 benign, [n].
        scores: P(violating), [n] or [k, n]; NaN: not scored.
        threshold: of F1, one for all rows or one per row; choose it on other examples (`f1_threshold`), or leave 0.5.
        groups: what each example belongs to, [n]; groups are resampled whole. None: every example by itself.
        resamples: bootstrap samples; `seed` is theirs.

    Raises:
        ArgumentError: shapes do not fit, a label is neither 0 nor 1, or a score is no probability.
    """
    truth, (rows,), known = _known(labels, [scores])
    if rows.size and not (rows.min() >= 0 and rows.max() <= 1):
        raise ArgumentError(f"scores: got {rows.min():.3g} to {rows.max():.3g}; expected P(violating), 0 to 1, or NaN")
    cuts = np.asarray(threshold, np.float64)
    if cuts.shape not in ((), (len(rows),)):
        raise ArgumentError(f"threshold: got {cuts.shape}; expected one number, or one for each of {len(rows)} rows")
    thresholds = np.broadcast_to(cuts, len(rows))
    ranked = _ranked(truth, rows, thresholds)
    drawn = _draws(groups, known)
    points, resampled = _bootstrap(ranked, drawn, resamples, seed)
    found = {
        name: _interval(points[:, at].mean(), resampled[:, :, at].mean(1), known)
        for at, name in enumerate(FIGURES)
    }  # fmt: skip
    seeds = {name: tuple(points[:, at].tolist()) for at, name in enumerate(FIGURES)}
    count = int(drawn.max()) + 1 if len(drawn) else 0
    return Detection(
        **found, seeds=seeds, thresholds=tuple(thresholds.tolist()), violating=int(truth.sum()), groups=count
    )


def compare(
    labels: ArrayLike,
    scores: ArrayLike,
    others: ArrayLike,
    *,
    groups: Groups | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Whether one detector's AUROC differs from another's on the same examples (paired bootstrap).

    Args:
        labels: 1 violating, 0 benign, [n].
        scores: of the first, [n] or [k, n], any finite numbers; `others` of the second, with as many rows as it has.
            An example that either leaves unscored is left out of both.
        groups: as in `detection`; `resamples` and `seed` too.

    Raises:
        ArgumentError: shapes do not fit, or a label is neither 0 nor 1.
    """
    truth, (left, right), known = _known(labels, [scores, others])
    points, resampled = _bootstrap(_ranked(truth, np.vstack([left, right])), _draws(groups, known), resamples, seed)
    areas, spread = points[:, 0], resampled[:, :, 0]
    first, second = (slice(None, len(left)), slice(len(left), None))
    apart = spread[:, first].mean(1) - spread[:, second].mean(1)
    apart = np.where(np.abs(apart) < 1e-12, 0.0, apart)  # rounding is no difference
    sure = apart[~np.isnan(apart)]
    sides = [1 + int((sure <= 0).sum()), 1 + int((sure >= 0).sum())]
    return Comparison(
        _interval(areas[first].mean(), spread[:, first].mean(1), known),
        _interval(areas[second].mean(), spread[:, second].mean(1), known),
        _interval(areas[first].mean() - areas[second].mean(), apart, known),
        min(1.0, 2 * min(sides) / (1 + len(sure))) if len(sure) else math.nan,
    )


def f1_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold with the highest F1, halfway to the next lower score; 0.5 where there is one class only.

    Raises:
        ArgumentError: as in `detection`.
    """
    truth, (rows,), _ = _known(labels, [scores])
    if len(rows) != 1:
        raise ArgumentError(f"scores: got {len(rows)} rows; expected one [n]")
    if len(set(truth.tolist())) < 2:
        return 0.5
    row = _ranked(truth, rows)[0]
    hits = row.truth.cumsum()[row.ends]
    best = int((2 * hits / (row.ends + 1 + hits[-1])).argmax())
    levels = np.append(rows[0][row.order][row.ends], 0.0)
    return float(levels[best : best + 2].mean()) if best + 2 < len(levels) else float(levels[best])


def by_prompt(examples: Sequence[Example]) -> NDArray[np.int64]:
    """The prompt that each example belongs to, as a number from 0, [n]; one without prompt is on its own."""
    seen: dict[object, int] = {}
    keys = [" ".join(item.prompt.casefold().split()) or at for at, item in enumerate(examples)]
    return np.array([seen.setdefault(key, len(seen)) for key in keys], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Ranked:
    """A row of scores, highest first, with all that does not depend on the examples' weights.

    Attributes:
        order: [n], indices; `truth` is in this order.
        ends: [levels], the last place of every run of equal scores.
        flagged: [n, 2]: at or above the threshold, and of them the violating ones; in the examples' own order.
        gaps: [n, bins]: score minus label in the column of the score's bin.
    """

    order: NDArray[np.int64]
    truth: Values
    ends: NDArray[np.int64]
    flagged: Values
    gaps: Values

    @classmethod
    def of(cls, truth: Values, scores: Values, threshold: float) -> Self:
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)[: len(scores)])
        high = scores >= threshold
        bins = np.clip((scores * BINS).astype(np.int64), 0, BINS - 1)
        gaps = (bins[:, None] == np.arange(BINS)) * (scores - truth)[:, None]
        return cls(order, truth[order], ends, np.stack([high, high * truth], 1).astype(np.float64), gaps)

    def figures(self, weights: Values) -> Values:
        """Every figure under each row of whole-numbered weights [r, n]: [r, 5] in the order of `FIGURES`."""
        if not weights.shape[1]:
            return np.full((len(weights), len(FIGURES)), math.nan)
        weighed = weights[:, self.order]
        hits = (weighed * self.truth).cumsum(1)[:, self.ends]
        alarms = weighed.cumsum(1)[:, self.ends] - hits
        both = (hits[:, -1] > 0) & (alarms[:, -1] > 0)
        violating, benign = np.where(both, hits[:, -1], math.nan), np.where(both, alarms[:, -1], math.nan)
        rises = np.diff(hits, axis=1, prepend=0)
        area = (np.diff(alarms, axis=1, prepend=0) * (hits - rises / 2)).sum(1) / (violating * benign)
        precision = (rises * hits / np.maximum(hits + alarms, 1)).sum(1) / violating
        flagged, right = (weights @ self.flagged).T
        reached = (20 * hits >= 19 * hits[:, -1:]).argmax(1)
        false_rate = alarms[np.arange(len(alarms)), reached] / benign
        error = np.abs(weights @ self.gaps).sum(1) / weights.sum(1)
        return np.stack([area, precision, 2 * right / (flagged + violating), false_rate, error], 1)


def _ranked(truth: Values, rows: Values, thresholds: Values | None = None) -> list[_Ranked]:
    cuts = np.full(len(rows), 0.5) if thresholds is None else thresholds
    return [_Ranked.of(truth, row, float(cut)) for row, cut in zip(rows, cuts, strict=True)]


def _known(labels: ArrayLike, scores: Sequence[ArrayLike]) -> tuple[Values, list[Values], NDArray[np.bool_]]:
    """Labels [m] and rows [k, m] of the m examples that every row scores, and which those are, [n]."""
    truth = np.asarray(labels, np.float64)
    if truth.ndim != 1 or not np.isin(truth, (0, 1)).all():
        raise ArgumentError(f"labels: got shape {truth.shape}; expected one row of 1 (violating) and 0 (benign)")
    rows = [np.atleast_2d(np.asarray(each, np.float64)) for each in scores]
    for each in rows:
        if each.ndim != 2 or each.shape[1] != len(truth) or not len(each):
            raise ArgumentError(f"scores: got shape {each.shape}; expected [n] or [k, n] with n = {len(truth)} labels")
        if np.isinf(each).any():
            raise ArgumentError("scores: hold infinity; expected finite numbers, or NaN for 'not scored'")
    known: NDArray[np.bool_] = np.logical_and.reduce(~np.isnan(np.vstack(rows)), axis=0)
    return truth[known], [each[:, known] for each in rows], known


def _draws(groups: Groups | None, known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The group of every known example, numbered from 0."""
    if groups is None:
        return np.arange(int(known.sum()))
    if len(groups) != len(known):
        raise ArgumentError(f"groups: got {len(groups)} for {len(known)} examples; give one per example")
    numbers: dict[Hashable, int] = {}
    listed = [group for group, there in zip(groups, known, strict=True) if there]
    return np.array([numbers.setdefault(group, len(numbers)) for group in listed], np.int64)


def _bootstrap(rows: list[_Ranked], groups: NDArray[np.int64], resamples: int, seed: int) -> tuple[Values, Values]:
    """Figures of every row, [k, 5], and of every resample, [resamples, k, 5]; fewer than 2 groups give none."""
    points = np.concatenate([row.figures(np.ones((1, len(groups)))) for row in rows])
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < 2:
        return points, np.zeros((0, len(rows), len(FIGURES)))
    batches = [
        np.stack([row.figures(weights) for row in rows], 1) for weights in _weights(groups, count, resamples, seed)
    ]
    return points, np.concatenate(batches)


def _weights(groups: NDArray[np.int64], count: int, resamples: int, seed: int) -> Iterator[Values]:
    """How often each example was drawn in each resample, [r, n] at a time."""
    rng, most = np.random.default_rng(seed), max(1, CELLS // len(groups))
    for start in range(0, resamples, most):
        size = min(most, resamples - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield times[:, groups].astype(np.float64)


def _interval(estimate: Any, resampled: Values, known: NDArray[np.bool_]) -> Interval:
    n, sure = int(known.sum()), resampled[~np.isnan(resampled)]
    low, high = np.quantile(sure, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(sure) else (math.nan, math.nan)
    return Interval(float(estimate), float(low), float(high), n, len(known) - n)
