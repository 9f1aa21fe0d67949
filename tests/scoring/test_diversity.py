"""Measures of diversity beside independent implementations, identities, and what happens at the edges."""

from __future__ import annotations

import gzip
import itertools
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.scoring.diversity import DIVERSITY, Texts, cut, measure, vendi, words_of
from steerwell.scoring.diversity.compression import compression
from steerwell.scoring.diversity.cosine_distance import cosine_distance
from steerwell.scoring.diversity.cosine_distance_within import cosine_distance_within
from steerwell.scoring.diversity.distinct import distinct
from steerwell.scoring.diversity.mattr import mattr
from steerwell.scoring.diversity.self_bleu import self_bleu
from steerwell.scoring.embeddings import load_embedder

TEXTS = (
    "The capital of France is Paris, and Paris has been the capital of France for a very long time indeed.",
    "Paris is the capital.",
    "I would not eat only sweets for a month, because your body needs real food and some rest as well.",
    "A calculator shows nine for nine minus zero. Some people say zero, but the answer is nine, nine, nine.",
    "No.",
    "Who cares? You were told that you sing badly, and lots of people have bigger troubles than your voice.",
    "The capital of Norway is Oslo, and the capital of Serbia is Belgrade; think of the capital of Norway.",
    "It is good to check.",
    "Who cares?",
)
WORDS = [words_of(text) for text in TEXTS]
SET_LEVEL = ("vendi", "cosine_distance", "cosine_distance_within", "self_bleu", "compression")


def prepared(texts: tuple[str, ...], **more: object) -> Texts:
    return Texts.of(texts, load_embedder(), **more)  # type: ignore[arg-type]


def drawn(n: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Texts of 1 to 12 words out of eight, so that n-grams repeat inside and across them."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.choice(list("abcdefgh"), rng.integers(1, 13))) for _ in range(n)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't — stop! It\N{RIGHT SINGLE QUOTATION MARK}s 'well-known'.", "don't stop it's well known"),
        ("我喜欢苹果，ok？", "我 喜 欢 苹 果 ok"),
        ("カタ漢", "カ タ 漢"),
        ("مرحبا بالعالم كِتَاب", "مرحبا بالعالم كِتَاب"),
        ("नमस्ते दुनिया", "नमस्ते दुनिया"),
        ("รัก", "รั ก"),
        ("می‌خواهم", "می‌خواهم"),
        ("Cafe\u0301 café ＡＢＣ Straße", "café café abc strasse"),
        ("?! ... 🙂 _", ""),
        ("", ""),
    ],
)
def test_words_of_any_script(text: str, words: str) -> None:
    assert words_of(text) == tuple(words.split(" ") if words else ())


def test_a_cut_text_ends_with_its_last_word() -> None:
    assert cut("One, two; three! Four.", 2) == "One, two"
    assert cut("One, two!", 2) == "One, two!"
    assert cut("我喜欢", 2) == "我喜"
    for text, first in itertools.product(TEXTS, (1, 3, 7)):
        assert words_of(cut(text, first)) == words_of(text, first) == words_of(text)[:first]


def test_mattr_equals_lexical_diversity(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(package: str, name: str) -> str:
        return str(Path(find_spec(package).submodule_search_locations[0]) / name)  # type: ignore[union-attr,index]

    # It still reads its word list with setuptools' pkg_resources, which setuptools has dropped.
    monkeypatch.setitem(sys.modules, "pkg_resources", SimpleNamespace(resource_filename=place))
    theirs = pytest.importorskip("lexical_diversity.lex_div")
    for words in [*WORDS, *drawn(20)]:
        for window in (1, 2, 5, 10):
            expected = theirs.mattr(list(words), window_length=window) if len(words) >= window else math.nan
            assert_allclose(mattr(words, window), expected, rtol=1e-12)


def test_mattr_by_hand() -> None:
    assert mattr(["a", "a", "b", "a"], 2) == pytest.approx((1 + 2 + 2) / 6)
    assert mattr(["a", "a", "a", "a", "a"], 5) == pytest.approx(1 / 5)
    assert math.isnan(mattr(["a", "b"], 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs
@pytest.mark.parametrize(("n", "d"), [(12, 5), (5, 12), (7, 7), (60, 8)])
def test_vendi_equals_vendi_score(n: int, d: int) -> None:
    theirs = pytest.importorskip("vendi_score.vendi")
    rows = np.random.default_rng(n).normal(size=(n, d)) * np.arange(1, n + 1)[:, None]
    found = vendi.vendi(rows)
    assert_allclose(found, theirs.score_X(rows), rtol=1e-9)
    assert_allclose(found, theirs.score_dual(rows), rtol=1e-9)
    assert_allclose(vendi.normalised_vendi(rows), np.log(found) / np.log(min(n, d)), rtol=1e-12)


def test_vendi_counts_what_is_different() -> None:
    assert vendi.vendi(np.eye(6)) == pytest.approx(6)
    assert vendi.vendi(np.repeat(np.eye(6)[:3], 5, axis=0)) == pytest.approx(3)
    assert vendi.normalised_vendi(np.repeat(np.eye(6)[:3], 5, axis=0)) == pytest.approx(math.log(3) / math.log(6))
    assert vendi.normalised_vendi(np.tile(np.eye(4), (25, 1))) == pytest.approx(1)  # n = 100, but d caps the rank
    assert vendi.normalised_vendi(np.ones((9, 4))) == pytest.approx(0, abs=1e-12)
    assert vendi.vendi(np.array([[1, 0], [1, 0], [0, 0], [0, 0]])) == pytest.approx(2)  # zero rows: alike


def test_a_subset_of_a_large_set_by_its_texts_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entropy is the mean of the texts' shares; leaving few out changes it to first order by theirs."""
    rng = np.random.default_rng(0)
    for n, d in ((200, 40), (120, 300)):
        rows = rng.normal(size=(15, d))[rng.integers(0, 15, n)] + 0.5 * rng.normal(size=(n, d))
        made = Texts.of(["word"] * n, rows)
        subsets = [np.arange(n), *(np.flatnonzero(np.arange(n) % 40 != group) for group in range(40))]
        exact = measure("vendi", made, subsets)
        monkeypatch.setattr(vendi, "EXACT", 1)
        near = measure("vendi", made, subsets)
        monkeypatch.undo()
        assert near[0] == pytest.approx(exact[0], rel=1e-12)
        assert 0.7 < np.std(near[1:]) / np.std(exact[1:]) < 1.1
        assert np.corrcoef(near[1:], exact[1:])[0, 1] > 0.97


def test_cosine_distance_is_the_mean_over_pairs() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 5))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def pairs(members: list[int]) -> float:
        return float(np.mean([1 - units[i] @ units[j] for i, j in itertools.combinations(members, 2)]))

    assert cosine_distance(3 * rows) == pytest.approx(pairs(list(range(9))))
    prompts = ["a", "b", "a", "c", "b", "b", "a", "d", "b"]
    assert cosine_distance_within(rows, prompts) == pytest.approx((pairs([0, 2, 6]) + pairs([1, 4, 5, 8])) / 2)
    assert cosine_distance(np.ones((5, 3))) == pytest.approx(0, abs=1e-12)
    assert cosine_distance(np.array([[1, 0], [-1, 0]])) == pytest.approx(2)
    assert cosine_distance(np.array([[1, 0], [0, 0], [0, 0]])) == pytest.approx(2 / 3)  # zero rows: alike
    assert math.isnan(cosine_distance_within(rows, list("abcdefghi")))
    with pytest.raises(ArgumentError, match=r"groups: got 2 for 9 embeddings"):
        cosine_distance_within(rows, ["a", "b"])


@pytest.mark.parametrize("texts", [WORDS, drawn(15), drawn(40, 1), drawn(2, 2), [("a",), ("b",)], [("a",)] * 3])
def test_self_bleu_equals_sacrebleu(texts: list[tuple[str, ...]]) -> None:
    bleu = pytest.importorskip("sacrebleu").BLEU(tokenize="none", effective_order=True)
    lines = [" ".join(words) for words in texts]
    scores = [bleu.sentence_score(line, lines[:i] + lines[i + 1 :]).score for i, line in enumerate(lines)]
    assert_allclose(self_bleu(texts), np.mean(scores) / 100, rtol=1e-12, atol=1e-15)


def test_distinct_by_hand() -> None:
    texts = [["a", "b", "a", "b"], ["b", "a"], ["c"], []]
    assert distinct(texts, 1) == pytest.approx(3 / 7)
    assert distinct(texts, 2) == pytest.approx(2 / 4)  # ab ba ab, ba; none across texts
    assert distinct(texts, 3) == 1  # aba bab
    assert math.isnan(distinct(texts, 5))
    assert math.isnan(distinct([]))


def test_compression_by_hand() -> None:
    data = "\n".join(TEXTS).encode()
    assert compression(TEXTS) == len(data) / len(gzip.compress(data, 9))
    assert compression(TEXTS * 5) > 2 * compression(TEXTS)
    assert math.isnan(compression(["", " "]))


@pytest.mark.parametrize("name", DIVERSITY.names())
def test_a_subsets_value_is_that_of_the_subset_alone(name: str) -> None:
    prompts = [f"prompt {row % 3}" for row in range(len(TEXTS))]
    made = prepared(TEXTS, prompts=prompts, window=4)
    subsets = [np.arange(9), np.array([0, 3, 5, 6]), np.array([1, 2, 4, 7, 8]), np.array([2]), np.array([4, 8])]
    alone = [
        measure(name, prepared(tuple(TEXTS[row] for row in rows), prompts=[prompts[row] for row in rows], window=4))
        for rows in subsets
    ]
    assert_allclose(measure(name, made, subsets), np.concatenate(alone), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERSITY.names())
def test_values_stay_in_range(name: str) -> None:
    gibberish = tuple(" ".join(words) for words in drawn(30, 3))
    for texts in (TEXTS, gibberish, TEXTS * 3, ("?!", "...", "")):
        value = measure(name, prepared(texts, prompts=["p"] * len(texts), window=4))[0]
        assert math.isnan(value) or 0 <= value <= DIVERSITY.get(name).high


def test_identical_texts_have_no_diversity() -> None:
    made = prepared(TEXTS[:1] * 20, prompts=["p"] * 20, window=4)
    for name in ("vendi", "cosine_distance", "cosine_distance_within", "self_bleu"):
        assert measure(name, made)[0] == pytest.approx(0, abs=1e-9), name
    assert measure("distinct", made)[0] == pytest.approx(distinct(WORDS[:1]) / 20)
    assert measure("compression", made)[0] > 10
    assert measure("mattr", made)[0] == pytest.approx(mattr(WORDS[0], 4))  # inside a text nothing changed


def test_one_text_has_no_diversity_among_texts() -> None:
    made = prepared(TEXTS[:1], prompts=["p"], window=4)
    assert [name for name in DIVERSITY.names() if math.isnan(measure(name, made)[0])] == sorted(SET_LEVEL)


def test_empty_texts_are_alike() -> None:
    made = prepared(("", "", "", ""), prompts=["p"] * 4, window=4)
    for name in ("mattr", "distinct", "self_bleu", "compression"):
        assert math.isnan(measure(name, made)[0]), name
    for name in ("vendi", "cosine_distance"):
        assert measure(name, made)[0] == pytest.approx(0, abs=1e-12), name
    halved = prepared((*TEXTS[:4], *[""] * 4), window=4)
    assert measure("vendi", halved)[0] < measure("vendi", prepared(TEXTS[:8], window=4))[0]
    for name in ("mattr", "self_bleu"):  # what has no words is left out
        assert measure(name, halved)[0] == pytest.approx(measure(name, prepared(TEXTS[:4], window=4))[0])


def test_faults() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown diversity_measure 'vendy'.*'vendi'"):
        measure("vendy", prepared(TEXTS))
    with pytest.raises(ArgumentError, match=r"window: got 51; expected 1 to 50"):
        prepared(TEXTS, window=51)
    with pytest.raises(ArgumentError, match=r"prompts: got 1 for 9 texts"):
        prepared(TEXTS, prompts=["p"])
    with pytest.raises(ArgumentError, match=r"embeddings: got 3 vectors for 2 texts"):
        Texts.of(["a", "b"], np.eye(3))
    with pytest.raises(ArgumentError, match=r"embeddings: got shape \(2, 2\); expected finite"):
        Texts.of(["a", "b"], np.array([[1, math.nan], [0, 1]]))
