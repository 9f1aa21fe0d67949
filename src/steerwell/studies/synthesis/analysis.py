"""What a cell's arms say about steered training data (METHODS section 6). Everything here looks at test figures.

Arms are chosen on validation AUROC, or on measures that need no detector; comparisons of two are paired bootstraps over
the prompts of the test examples; correlations are Spearman's across the steered configurations of one cell, with
percentile bootstrap intervals over these; a configuration that lacks a measure is left out of its correlation and
counted. Neighbours in a grid are alike: intervals over configurations are rather too narrow than too wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from steerwell.scoring.intervals import Bootstrap, Interval
from steerwell.studies.synthesis.results import SynthesisResult
from steerwell.synthesis.detection import Comparison, compare

MEASURES = ("hm3", "hm2", "success", "coherence", "diversity")
RESAMPLES = 2000
LEAST = 8  # configurations under which a correlation says nothing
SAME_COHERENCE = 0.1  # within which two configurations count as comparable
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Falsifier:
    """Does diversity help, at equal n and comparable coherence?

    Attributes:
        pairs: (weak and diverse, strong and successful) arms matched by coherence.
        difference: AUROC of the first minus that of the second, mean over the pairs; None: no pairs.
        partial: rank correlation of diversity with AUROC, success and coherence held fixed.
    """

    pairs: tuple[tuple[int, int], ...]
    difference: Comparison | None
    partial: Interval


@dataclass(frozen=True, slots=True)
class Selection:
    """What a rule picks among the steered configurations of a cell.

    Attributes:
        rule: a measure, `validation AUROC`, or `at random`.
        picked: index of the arm; None at random.
        auroc: its test AUROC; at random the mean over all.
        regret: best test AUROC of any steered configuration minus this.
    """

    rule: str
    picked: int | None
    auroc: float
    regret: float


def correlations(cell: SynthesisResult) -> dict[str, Interval]:
    """Spearman of every measure with test AUROC over the steered configurations; NaN: too few have it."""
    arms = cell.of("steered")
    against = cell.values(arms, "auroc")
    return {name: _resampled([cell.values(arms, name), against], _spearman) for name in MEASURES}


def lead(cell: SynthesisResult, measure: str, rival: str) -> Interval:
    """How much closer a measure follows test AUROC than a rival does: the difference of their Spearman correlations."""
    arms = cell.of("steered")
    columns = [cell.values(arms, name) for name in (measure, rival, "auroc")]
    return _resampled(columns, lambda one, other, area: _spearman(one, area) - _spearman(other, area))


def mean_correlations(cells: Sequence[SynthesisResult]) -> dict[str, Interval]:
    """The same within one concept over several models: the mean of the cells' correlations; models are not pooled."""
    found = {}
    for name in MEASURES:
        tables = [[cell.values(cell.of("steered"), name), cell.values(cell.of("steered"), "auroc")] for cell in cells]
        found[name] = _resampled_together(tables, _spearman)
    return found


def consistency(by_concept: Mapping[str, Mapping[str, Interval]]) -> dict[str, tuple[float, bool]]:
    """For every measure the lowest of the concepts' correlations, and whether all have one sign."""
    found = {}
    for name in MEASURES:
        values = [each[name].estimate for each in by_concept.values()]
        known = [value for value in values if not math.isnan(value)]
        lowest = min(known) if known and len(known) == len(values) else math.nan
        found[name] = (lowest, len(known) == len(values) and len({value > 0 for value in known}) == 1)
    return found


def against(cell: SynthesisResult, one: int | None, other: int | None) -> Comparison | None:
    """Paired comparison of two arms on the test examples; None where one is missing."""
    if one is None or other is None:
        return None
    return compare(cell.labels, cell.scores[one], cell.scores[other], groups=cell.groups, resamples=RESAMPLES)


def share_above(cell: SynthesisResult, other: int | None) -> tuple[int, int]:
    """How many steered configurations have a higher test AUROC than an arm, and how many there are."""
    arms = cell.of("steered")
    return (0, 0) if other is None else (sum(cell.auroc(at) > cell.auroc(other) for at in arms), len(arms))


def curves(cell: SynthesisResult) -> dict[str, list[int]]:
    """Steered arms that differ in strength alone, weakest first, by what they share."""
    found: dict[str, list[int]] = {}
    for at in cell.of("steered"):
        row = cell.arms[at]
        name = f"{row['method']}, {row['estimator']} at {row['pool']}, layer {row['layer']}"
        if row["position"] != "all":
            name += f", position {row['position']}"
        found.setdefault(name, []).append(at)
    return {name: sorted(arms, key=lambda at: cell.value(at, "strength")) for name, arms in found.items()}


def trend(cell: SynthesisResult, measure: str = "diversity") -> Interval:
    """Mean over the curves of the rank correlation of strength with a measure, and its interval over the curves."""
    rhos = [
        float(_spearman(np.arange(len(arms), dtype=np.float64), cell.values(arms, measure)))
        for arms in curves(cell).values()
        if len(arms) > 2
    ]
    return Bootstrap().mean(rhos) if rhos else Interval(math.nan, math.nan, math.nan, 0, 0)


def falsifier(cell: SynthesisResult) -> Falsifier:
    """The seed's test: weak and diverse against strong and successful configurations of comparable coherence."""
    arms = cell.of("steered")
    table = [cell.values(arms, name) for name in ("diversity", "auroc", "success", "coherence")]
    pairs = _matched(cell)
    weak, strong = ([pair[side] for pair in pairs] for side in (0, 1))
    difference = None
    if pairs:
        rows = [cell.scores[side].reshape(-1, cell.scores.shape[-1]) for side in (weak, strong)]
        difference = compare(cell.labels, *rows, groups=cell.groups, resamples=RESAMPLES)
    return Falsifier(pairs, difference, _resampled(table, _partial))


def selections(cell: SynthesisResult) -> list[Selection]:
    """What every measure picks without a detector, beside validation AUROC (with detectors) and chance."""
    arms = cell.of("steered")
    if not arms:
        return []
    highest, mean = max(map(cell.auroc, arms)), float(np.mean([cell.auroc(at) for at in arms]))
    found = []
    for rule, measure in (*((name, name) for name in MEASURES), ("validation AUROC", "auroc_validation")):
        ranked = top(cell, measure, 1)
        if ranked:
            found.append(Selection(rule, ranked[0], cell.auroc(ranked[0]), highest - cell.auroc(ranked[0])))
    return [*found, Selection("at random", None, mean, highest - mean)]


def top(cell: SynthesisResult, measure: str, count: int, source: str = "steered") -> list[int]:
    """The source's `count` arms with the highest measure, best first; [] where it is missing."""
    known = [at for at in cell.of(source) if not math.isnan(cell.value(at, measure))]
    return sorted(known, key=lambda at: (-cell.value(at, measure), at))[:count]


def _matched(cell: SynthesisResult) -> tuple[tuple[int, int], ...]:
    """Of the weaker half of every curve the more diverse half, of the stronger half the more successful half, paired.

    Pairs are made greedily, the likest in coherence first, and every arm is used once.
    """
    halves: tuple[list[int], list[int]] = ([], [])
    for arms in curves(cell).values():
        middle = len(arms) // 2
        halves[0].extend(arms[:middle])
        halves[1].extend(arms[len(arms) - middle :])
    weak = _upper(cell, halves[0], "diversity")
    strong = _upper(cell, halves[1], "success")
    distances = sorted(
        (abs(cell.value(one, "coherence") - cell.value(other, "coherence")), one, other)
        for one in weak
        for other in strong
        if not math.isnan(cell.value(one, "coherence") + cell.value(other, "coherence"))
    )
    pairs: list[tuple[int, int]] = []
    for distance, one, other in distances:
        if distance <= SAME_COHERENCE and not any(one == known[0] or other == known[1] for known in pairs):
            pairs.append((one, other))
    return tuple(pairs)


def _upper(cell: SynthesisResult, arms: Sequence[int], measure: str) -> list[int]:
    values = {at: cell.value(at, measure) for at in arms}
    known = [value for value in values.values() if not math.isnan(value)]
    return [at for at, value in values.items() if known and value >= np.median(known)]


# Statistics over configurations --------------------------------------------------------------------------------------

Statistic = Callable[..., Values]  # columns of n configurations, [n] or [r, n] -> one value per row


def _spearman(left: Values, right: Values) -> Values:
    return _pearson(stats.rankdata(left, axis=-1), stats.rankdata(right, axis=-1))


def _pearson(left: Values, right: Values) -> Values:
    """Along the last axis; NaN where one side does not vary."""
    one, other = (side - side.mean(-1, keepdims=True) for side in (left, right))
    norm = np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    found: Values = np.where(norm > 1e-9 * left.shape[-1], (one * other).sum(-1) / np.maximum(norm, 1e-300), math.nan)
    return found


def _partial(one: Values, other: Values, *held: Values) -> Values:
    """Partial rank correlation: Pearson's of what is left of two rank vectors after regressing the others out."""
    if one.ndim > 1:
        return np.array([_partial(*row) for row in zip(one, other, *held, strict=True)])
    ranks = [stats.rankdata(column) for column in (one, other, *held)]
    design = np.column_stack([np.ones(len(one)), *ranks[2:]])
    left, right = (rank - design @ np.linalg.lstsq(design, rank, rcond=None)[0] for rank in ranks[:2])
    return _pearson(left, right)


def _resampled(table: Sequence[Values], statistic: Statistic) -> Interval:
    return _resampled_together([table], statistic)


def _resampled_together(tables: Sequence[Sequence[Values]], statistic: Statistic) -> Interval:
    """Mean over tables of a statistic of their columns, and its percentile bootstrap interval over their rows.

    Rows with a NaN are left out and counted.
    """
    whole = [np.stack(table) for table in tables]
    known = [table[:, ~np.isnan(table).any(0)] for table in whole]
    sizes = [table.shape[1] for table in known]
    missing = sum(table.shape[1] for table in whole) - sum(sizes)
    enough = bool(sizes) and min(sizes) >= LEAST
    estimate = float(np.mean([statistic(*table) for table in known])) if enough else math.nan
    if math.isnan(estimate):
        return Interval(math.nan, math.nan, math.nan, sum(sizes), missing)
    rng = np.random.default_rng(42)
    drawn = [
        statistic(*table[:, rng.integers(0, size, (RESAMPLES, size))]) for table, size in zip(known, sizes, strict=True)
    ]
    low, high = np.nanpercentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Interval(estimate, float(low), float(high), sum(sizes), missing)
