"""What a synthesis study's figures say: answers planted in made-up cells are found again, and no others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from steerwell.scoring.intervals import Interval
from steerwell.scoring.quality import harmonic_mean
from steerwell.studies.synthesis import analysis
from steerwell.studies.synthesis.analysis import (
    MEASURES,
    against,
    consistency,
    correlations,
    curves,
    falsifier,
    mean_correlations,
    selections,
    share_above,
    top,
    trend,
)
from steerwell.studies.synthesis.claims import claims_of, hm3_follows
from steerwell.studies.synthesis.results import SynthesisResult

N = 120  # test examples, half of them violating
LABELS = np.repeat([1, 0], N // 2)
NAN = math.nan


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "RESAMPLES", 300)


def scores_of(auroc: float, seed: int = 0) -> np.ndarray:
    """Scores [3, N] whose AUROC is near the one asked for; every cell's examples are equally hard in all of them."""
    shuffle, normal = np.random.default_rng(99).permutation, stats.norm.ppf((np.arange(N // 2) + 0.5) / (N // 2))
    noise = np.concatenate([shuffle(normal), shuffle(normal)])
    shift = math.sqrt(2) * stats.norm.ppf(auroc)
    wobble = np.random.default_rng(seed).normal(size=(3, N)) * 0.05
    return stats.norm.cdf(noise + shift * LABELS + wobble)


def area(scores: np.ndarray) -> float:
    """AUROC by comparing every pair."""
    return float(np.mean(scores[LABELS == 1][:, None] > scores[LABELS == 0]))


def made(arms: Sequence[Mapping[str, Any]], *, auroc_originals: float = 0.8, prompted: float = 0.7) -> SynthesisResult:
    """A cell: steered arms with planted `auroc`, one prompted arm and the originals; what is not given is harmless."""
    rows, scores = [], []
    blank = {"method": None, "layer": None, "strength": None, "position": None, "estimator": None, "pool": None}
    others = [{"arm": "told", "source": "prompted", "auroc": prompted} | blank]
    others += [{"arm": "original", "source": "original", "auroc": auroc_originals} | blank]
    for at, given in enumerate([*arms, *others]):
        row: dict[str, Any] = {"arm": f"way {at}", "source": "steered", "texts": 9, "blank": 0}
        row |= {"method": "swfc", "layer": 0, "strength": float(at), "position": "all"}
        row |= {"estimator": "logistic", "pool": "response_mean"}
        row |= {"success": 0.5, "coherence": 0.5, "diversity": 0.5} | given
        each = np.array([[row["success"]], [row["coherence"]], [row["diversity"]]], np.float64)
        row |= {"hm3": float(harmonic_mean(*each)[0]), "hm2": float(harmonic_mean(*each[:2])[0])} | given
        found = np.full((3, N), NAN) if math.isnan(row["auroc"]) else scores_of(row["auroc"], at)
        row["auroc"] = float(np.mean([area(each) for each in found])) if found[0, 0] > 0 else NAN
        rows.append(row | {"auroc_validation": given.get("auroc_validation", row["auroc"])})
        scores.append(found)
    cell = SynthesisResult(Path(), {"model": "made", "concept": "made"}, rows, np.array(scores), LABELS)
    cell.__dict__["groups"] = np.arange(N) // 2
    return cell


def ordered(count: int = 12) -> list[dict[str, float]]:
    """Arms whose HM3 orders exactly as their AUROC does, while success, coherence and diversity alone do not."""
    found = []
    for at, area in enumerate(np.linspace(0.62, 0.92, count)):
        high = 0.95 - 0.02 * (at * 5 % count)  # where the lack is changes from arm to arm, how much there is not
        axes = [high, high, high]
        axes[at % 3] = 1 / (3 / (0.3 + 0.4 * at / count) - 2 / high)  # the short one: so that HM3 is as planted
        found.append(dict(zip(("success", "coherence", "diversity"), axes, strict=True)) | {"auroc": float(area)})
    return found


def drawn(seed: int, count: int = 40) -> list[dict[str, float]]:
    """Arms whose measures have nothing to do with their AUROC."""
    rng = np.random.default_rng(seed)
    areas = rng.permutation(np.linspace(0.6, 0.9, count))
    return [
        {"success": a, "coherence": b, "diversity": c, "auroc": float(area)}
        for (a, b, c), area in zip(rng.uniform(0.2, 0.9, (count, 3)), areas, strict=True)
    ]


# Correlations --------------------------------------------------------------------------------------------------------


def test_hm3_that_orders_as_auroc_does_has_a_correlation_of_one_and_its_rivals_less() -> None:
    cell = made(ordered())
    found = correlations(cell)
    assert set(found) == set(MEASURES)
    assert found["hm3"].estimate == pytest.approx(1)
    assert (found["hm3"].low, found["hm3"].high, found["hm3"].n) == (pytest.approx(1), pytest.approx(1), 12)
    assert max(found[name].estimate for name in ("success", "coherence", "diversity")) < 0.8
    assert {claim.name: claim.tally for claim in claims_of([cell])}["HM3 follows AUROC"] == (1, 1)


def test_correlations_are_those_of_scipy() -> None:
    cell = made(drawn(1))
    arms = cell.of("steered")
    for name, found in correlations(cell).items():
        expected = stats.spearmanr(cell.values(arms, name), cell.values(arms, "auroc")).statistic
        assert found.estimate == pytest.approx(expected)
        assert found.low < found.estimate < found.high


def test_measures_that_say_nothing_have_intervals_around_zero() -> None:
    cells = [made(drawn(seed)) for seed in range(6)]
    covered = [found.low < 0 < found.high for cell in cells for found in correlations(cell).values()]
    assert sum(covered) >= 0.9 * len(covered)
    assert not any(hm3_follows(cell)[0] for cell in cells)


def test_an_arm_that_lacks_a_measure_is_left_out_and_counted() -> None:
    arms = ordered()
    gone = [arm for at, arm in enumerate(arms) if at not in (2, 7)]
    holed = [arm | ({"diversity": NAN, "hm3": NAN} if at in (2, 7) else {}) for at, arm in enumerate(arms)]
    found = correlations(made(holed))
    assert (found["hm3"].n, found["hm3"].missing, found["success"].n) == (10, 2, 12)
    assert found["diversity"].estimate == pytest.approx(correlations(made(gone))["diversity"].estimate)


def test_an_arm_without_detectors_is_no_arm() -> None:
    arms = [*ordered(), {"auroc": NAN, "success": 0.99, "hm3": 0.99}]
    cell = made(arms)
    assert cell.of("steered") == list(range(12))
    assert correlations(cell)["hm3"].n == 12
    assert top(cell, "hm3", 1) == [11]


def test_too_few_arms_and_measures_that_do_not_vary_have_no_correlation() -> None:
    assert math.isnan(correlations(made(ordered(7)))["hm3"].estimate)
    flat = made([arm | {"success": 0.5, "hm3": 0.5} for arm in ordered()])
    assert math.isnan(correlations(flat)["success"].estimate)


def test_models_are_averaged_not_pooled() -> None:
    """Within each model HM3 orders as AUROC does; between them it is the other way round."""
    low = made([arm | {"hm3": 0.1 + 0.01 * at} for at, arm in enumerate(ordered())])
    high = made([arm | {"hm3": 0.8 + 0.01 * at, "auroc": 0.5 + 0.01 * at} for at, arm in enumerate(ordered())])
    found = mean_correlations([low, high])
    assert found["hm3"].estimate == pytest.approx(1, abs=0.05)
    assert found["hm3"].n == 24
    for name in ("success", "diversity"):
        both = [correlations(cell)[name].estimate for cell in (low, high)]
        assert found[name].estimate == pytest.approx(np.mean(both))
    assert math.isnan(mean_correlations([])["hm3"].estimate)


def test_consistency_is_the_lowest_and_whether_all_have_one_sign() -> None:
    def told(*values: float) -> dict[str, dict[str, Interval]]:
        return {f"c{at}": {name: Interval(value, 0, 0, 9, 0) for name in MEASURES} for at, value in enumerate(values)}

    assert consistency(told(0.3, 0.8))["hm3"] == (0.3, True)
    assert consistency(told(-0.3, 0.8))["hm3"] == (-0.3, False)
    assert consistency(told(-0.3, -0.8))["hm3"] == (-0.8, True)
    lowest, same = consistency(told(0.3, NAN))["hm3"]
    assert (math.isnan(lowest), same) == (True, False)


def partial_by_hand(table: np.ndarray) -> float:
    """First with second, the rest held fixed: from the inverse of the matrix of Spearman's correlations."""
    inverse = np.linalg.inv(stats.spearmanr(table, axis=1).statistic)
    return float(-inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1]))


@pytest.mark.parametrize("seed", range(3))
def test_the_partial_correlation_is_that_of_the_inverse_matrix(seed: int) -> None:
    cell = made(drawn(seed))
    arms = cell.of("steered")
    table = np.stack([cell.values(arms, name) for name in ("diversity", "auroc", "success", "coherence")])
    assert falsifier(cell).partial.estimate == pytest.approx(partial_by_hand(table))


def test_diversity_that_only_goes_along_with_success_has_no_partial_correlation() -> None:
    rng = np.random.default_rng(5)
    success = rng.uniform(0.2, 0.9, 60)
    diversity, area = (success + rng.normal(size=60) * 0.05 for _ in range(2))
    arms = [
        {"success": float(s), "diversity": float(np.clip(d, 0, 1)), "auroc": float(0.6 + 0.3 * np.clip(a, 0, 1)),
         "coherence": float(c)}
        for s, d, a, c in zip(success, diversity, area, rng.uniform(0.3, 0.9, 60), strict=True)
    ]  # fmt: skip
    cell = made(arms)
    assert correlations(cell)["diversity"].low > 0.5
    partial = falsifier(cell).partial
    assert partial.low < 0 < partial.high


# Curves, and the falsifier's pairs -----------------------------------------------------------------------------------


def grid(cells: Mapping[tuple[str, int], Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Arms by (method, layer), weakest last: a curve is ordered by strength, not by place."""
    return [
        {"method": method, "layer": layer, "strength": float(at), "auroc": 0.7} | dict(given)
        for (method, layer), curve in cells.items()
        for at, given in reversed(list(enumerate(curve)))
    ]


def falls(*values: float) -> list[dict[str, float]]:
    return [{"diversity": value} for value in values]


def test_a_curve_has_one_method_direction_layer_and_position() -> None:
    cell = made([*grid({("swfc", 0): falls(1, 0.5), ("swfc", 2): falls(0.9), ("stmp", 0): falls(0.8)}),
                 {"method": "swfc", "layer": 0, "strength": 7.0, "position": "response", "auroc": 0.7},
                 {"method": "swfc", "layer": 0, "strength": 7.0, "estimator": "mean_difference", "auroc": 0.7},
                 {"method": "swfc", "layer": 0, "strength": 7.0, "pool": "prompt_last", "auroc": 0.7}])  # fmt: skip
    assert list(curves(cell).values()) == [[1, 0], [2], [3], [4], [5], [6]]  # weakest first


def test_the_trend_is_the_mean_over_curves() -> None:
    cell = made(
        grid({("swfc", 0): falls(0.9, 0.8, 0.7), ("swfc", 1): falls(0.7, 0.8, 0.6), ("stmp", 0): falls(0.1, 0.9)})
    )
    found = trend(cell)  # two strengths make no curve
    assert (found.estimate, found.n) == (pytest.approx(np.mean([-1, -0.5])), 2)
    assert trend(cell, "success").missing == 2  # the same everywhere
    steep = made(grid({("swfc", layer): falls(0.9, 0.8, 0.7) for layer in range(6)}))
    assert trend(steep).high == pytest.approx(-1)
    tallies = {claim.name: claim.findings[0].holds for claim in claims_of([steep])}
    assert tallies["diversity falls"] is True
    rising = made(grid({("swfc", layer): falls(0.7, 0.8, 0.9) for layer in range(6)}))
    assert {claim.name: claim.findings[0].holds for claim in claims_of([rising])}["diversity falls"] is False


@pytest.mark.parametrize("curves_known", [{("swfc", 0): falls(0.9, 0.8)}, {("swfc", 0): falls(0.9, 0.8, 0.7)}])
def test_one_curve_alone_or_none_does_not_decide(curves_known: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    (claim,) = [item for item in claims_of([made(grid(curves_known))]) if item.name == "diversity falls"]
    assert claim.findings[0].holds is None


def paired(weak: float, strong: float) -> SynthesisResult:
    """Two curves of four: the weak and diverse, at index 3, and the strong and successful, at 4, are as coherent."""
    one = [
        {"diversity": 0.95, "success": 0.1, "coherence": 0.80, "auroc": weak},
        {"diversity": 0.70, "success": 0.1, "coherence": 0.80, "auroc": 0.6},
        {"diversity": 0.50, "success": 0.2, "coherence": 0.20, "auroc": 0.6},
        {"diversity": 0.50, "success": 0.3, "coherence": 0.20, "auroc": 0.6},
    ]
    other = [
        {"diversity": 0.71, "success": 0.1, "coherence": 0.99, "auroc": 0.6},
        {"diversity": 0.90, "success": 0.1, "coherence": 0.50, "auroc": 0.6},
        {"diversity": 0.40, "success": 0.8, "coherence": 0.20, "auroc": 0.6},
        {"diversity": 0.30, "success": 0.9, "coherence": 0.75, "auroc": strong},
    ]
    return made(grid({("swfc", 0): one, ("stmp", 0): other}))


def test_pairs_are_alike_in_coherence_and_apart_in_strength() -> None:
    cell = paired(0.9, 0.7)
    found = falsifier(cell)
    # weaker halves 3, 2, 7, 6: the more diverse ones are 3 and 6; stronger ones 1, 0, 5, 4: the successful are 5 and 4
    assert found.pairs == ((3, 4),)
    expected = cell.auroc(3) - cell.auroc(4)
    assert found.difference.difference.estimate == pytest.approx(expected)
    assert found.difference.difference.low > 0.05
    assert falsifier(paired(0.7, 0.9)).difference.difference.high < -0.05


def test_pairs_use_no_arm_twice_and_take_the_likest_first() -> None:
    weak = [{"diversity": 0.9, "success": 0.1, "coherence": c, "auroc": 0.7} for c in (0.80, 0.84)]
    strong = [{"diversity": 0.2, "success": 0.9, "coherence": c, "auroc": 0.7} for c in (0.83, 0.71)]
    layers = {("swfc", at): [one, other] for at, (one, other) in enumerate(zip(weak, strong, strict=True))}
    cell = made(grid(layers))  # arms 0 and 2 are the strong ones, 1 and 3 the weak ones
    assert falsifier(cell).pairs == ((3, 0), (1, 2))


def test_without_pairs_nothing_is_compared() -> None:
    cell = made(grid({("swfc", 0): [{"coherence": 0.9}, {"coherence": 0.2}]}))
    assert (falsifier(cell).pairs, falsifier(cell).difference) == ((), None)
    (claim,) = [item for item in claims_of([cell]) if item.name == "diversity matters"]
    assert (claim.tally, claim.findings[0].holds) == ((0, 0), None)
    assert "is as coherent as" in claim.findings[0].detail


# Comparisons, shares and selections ----------------------------------------------------------------------------------


def test_two_arms_are_compared_on_the_same_examples() -> None:
    cell = made([{"auroc": 0.9}, {"auroc": 0.7}])
    found = against(cell, 0, 1)
    assert found.first.estimate == pytest.approx(cell.auroc(0))
    assert found.difference.estimate == pytest.approx(cell.auroc(0) - cell.auroc(1))
    widths = [each.high - each.low for each in (found.difference, found.first, found.second)]
    assert widths[0] < 0.9 * math.hypot(*widths[1:])  # paired: what is hard for one is hard for the other
    assert (against(cell, None, 1), against(cell, 0, None)) == (None, None)


def test_the_best_is_chosen_on_validation_and_reported_on_test() -> None:
    cell = made([
        {"auroc": 0.9, "auroc_validation": 0.6},
        {"auroc": 0.65, "auroc_validation": 0.95},
        {"auroc": 0.7, "auroc_validation": 0.95},
    ])  # fmt: skip
    assert cell.best("steered") == 1
    assert (cell.best("prompted"), cell.best("unsteered")) == (3, None)
    found = {claim.name: claim.findings[0] for claim in claims_of([cell])}
    assert found["steering beats prompting"].holds is False
    assert f"AUROC {cell.auroc(1):.3f} against {cell.auroc(3):.3f}" in found["steering beats prompting"].detail
    better = made([{"auroc": 0.9, "auroc_validation": 0.95}])
    assert {claim.name: claim.tally for claim in claims_of([better])}["steering beats prompting"] == (1, 1)


@pytest.mark.parametrize(("above", "holds"), [(3, False), (4, True)])
def test_the_share_that_beats_prompting(above: int, holds: bool) -> None:
    cell = made([{"auroc": 0.85}] * above + [{"auroc": 0.62}] * (10 - above), prompted=0.75)
    assert share_above(cell, cell.best("prompted")) == (above, 10)
    assert share_above(cell, None) == (0, 0)
    found = {claim.name: claim.findings[0] for claim in claims_of([cell])}["many configurations beat prompting"]
    assert (found.holds, found.detail) == (holds, f"{above} of 10 configurations ({above / 10:.0%})")


def test_selections_and_their_regret() -> None:
    cell = made([
        {"success": 0.9, "coherence": 0.2, "diversity": 0.5, "auroc": 0.7, "auroc_validation": 0.6},
        {"success": 0.6, "coherence": 0.6, "diversity": 0.6, "auroc": 0.8, "auroc_validation": 0.7},
        {"success": 0.3, "coherence": 0.9, "diversity": 0.9, "auroc": 0.9, "auroc_validation": 0.8},
    ])  # fmt: skip
    areas = [cell.auroc(at) for at in range(3)]
    assert {item.rule: item.picked for item in selections(cell)} == {
        "hm3": 1, "hm2": 1, "success": 0, "coherence": 2, "diversity": 2, "validation AUROC": 2, "at random": None,
    }  # fmt: skip
    for item in selections(cell):
        assert item.auroc == pytest.approx(np.mean(areas) if item.picked is None else areas[item.picked])
        assert item.regret == pytest.approx(max(areas) - item.auroc)
    assert top(cell, "coherence", 2) == [2, 1]
    assert selections(made([])) == []


# What was not measured -----------------------------------------------------------------------------------------------


def test_without_a_judge_nothing_about_success_is_said() -> None:
    missing = dict.fromkeys(("success", "coherence", "hm3", "hm2"), NAN)
    cell = made([arm | missing for arm in ordered()])
    found = correlations(cell)
    assert all(math.isnan(found[name].estimate) for name in missing)
    assert not math.isnan(found["diversity"].estimate)
    assert {item.rule for item in selections(cell)} == {"diversity", "validation AUROC", "at random"}
    assert falsifier(cell).pairs == ()
    assert math.isnan(falsifier(cell).partial.estimate)
    holds = {claim.name: claim.findings[0].holds for claim in claims_of([cell])}
    assert (holds["HM3 follows AUROC"], holds["diversity matters"]) == (None, None)


@pytest.mark.parametrize(("originals", "measurable"), [(0.55, False), (0.65, True), (0.95, True), (0.99, False)])
def test_where_originals_do_too_badly_or_too_well_nothing_can_be_told(originals: float, measurable: bool) -> None:
    cell = made(ordered(), auroc_originals=originals)
    assert cell.measurable is measurable
    for claim in claims_of([cell]):
        if claim.name in ("diversity falls", "diversity matters"):  # not about AUROC; no pairs in this cell
            continue
        assert (claim.findings[0].holds is not None) is measurable
        if not measurable:
            assert "not measurable: detectors trained on originals have AUROC" in claim.findings[0].detail
            assert claim.tally == (0, 0)
    pair = paired(0.9, 0.7)
    pair.arms[-1]["auroc"] = originals
    assert {c.name: c.findings[0].holds is not None for c in claims_of([pair])}["diversity matters"] is measurable
    assert not SynthesisResult(Path(), cell.about, cell.arms[:-1], cell.scores[:-1], LABELS).measurable


def test_diversity_matters_where_both_its_tests_say_so() -> None:
    """Curves in pairs: the weak one diverse and good, the strong one successful and worse; AUROC follows diversity."""
    rng = np.random.default_rng(0)
    layers = {}
    for at in range(12):
        wide, narrow = 0.9 - 0.01 * at, 0.5 - 0.01 * at
        layers["swfc", at] = [
            {"diversity": wide, "success": float(rng.uniform(0.3, 0.4)), "coherence": 0.8, "auroc": 0.9 - 0.01 * at},
            {"diversity": narrow, "success": float(rng.uniform(0.6, 0.7)), "coherence": 0.8, "auroc": 0.75 - 0.01 * at},
        ]
    every = [arm for pair in layers.values() for arm in pair]
    for arm, value in zip(every, rng.permutation(24), strict=True):
        arm["coherence"] = 0.78 + 0.001 * float(value)
    cell = made(grid(layers))
    found = falsifier(cell)
    assert len(found.pairs) == 6
    assert found.difference.difference.low > 0
    assert found.partial.low > 0
    assert {claim.name: claim.tally for claim in claims_of([cell])}["diversity matters"] == (1, 1)
