"""Judge-free measures against hand-computed values, other libraries and other formulations."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from nltk.util import ngrams
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from steerwell.core.errors import ArgumentError, EngineError, MissingDependencyError, UnknownNameError
from steerwell.core.records import Edit, EditTerm, Prompt, Receipt, Response, Sampling, TermReceipt
from steerwell.engines.fake import FakeEngine
from steerwell.scoring import embeddings
from steerwell.scoring.embeddings import load_embedder
from steerwell.scoring.intervals import Bootstrap, Interval
from steerwell.scoring.metrics import METRICS, Reference, first_receipts, first_words, measure
from steerwell.scoring.metrics.cross_entropy import cross_entropy
from steerwell.scoring.metrics.gate_rate import gate_rate
from steerwell.scoring.metrics.perturbation import perturbation
from steerwell.scoring.metrics.perturbation_all import perturbation_all
from steerwell.scoring.metrics.repetition import repetition, repetition_growth
from steerwell.scoring.metrics.similarity import similarity
from steerwell.scoring.metrics.target_distance import target, target_distance
from steerwell.steering.interventions import build
from steerwell.testbed.bundled import bundled_path
from tests.made import direction

NAN = math.nan
PROMPTS = [Prompt.chat("Who are you?", "Be honest."), Prompt.chat("Hm", "Be kind."), Prompt.chat("Why?")]
NEEDS = {  # measure -> fields of the reference that it cannot do without
    "cross_entropy": {"engine", "prompts"},
    "gate_rate": {"receipts"},
    "length": set(),
    "perturbation": {"receipts"},
    "perturbation_all": {"receipts"},
    "refusal": set(),
    "repetition": set(),
    "similarity": {"baseline"},
    "target_distance": {"receipts", "edits"},
}


def answer(text: str = "", tokens: tuple[int, ...] = (), receipt: Receipt | None = None) -> Response:
    return Response(PROMPTS[0], text, tokens, "stop", Sampling(), receipt)


def term_receipt(seen: int, edited: int, moved: float, after: float = 0.0) -> TermReceipt:
    return TermReceipt("made", 0, "all", seen, edited, 0.0 if seen else NAN, after if seen else NAN, moved, 1.0)


def edit_term(engine: FakeEngine, layer: int, gate: float, offset: float, gain: float) -> EditTerm:
    vector = np.random.default_rng(layer).normal(size=engine.info.d_model)
    return EditTerm(layer, (vector / np.linalg.norm(vector)).astype(np.float32), gate, offset, gain)


# Found by name


def test_every_measure_has_its_file_and_its_row_here() -> None:
    assert METRICS.names() == tuple(sorted(NEEDS))


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_no_answers_give_no_values(name: str) -> None:
    empty = Reference(engine=FakeEngine(), prompts=[], baseline=[], receipts=[], edits=[])
    values = measure(name, [], empty)
    assert values.shape == (0,)
    assert values.dtype == np.float64


@pytest.mark.parametrize("name", sorted(set(NEEDS) - {"length"}))
def test_an_empty_unsteered_answer_gives_nan_and_not_zero(name: str) -> None:
    reference = Reference(engine=FakeEngine(), prompts=PROMPTS[:1], baseline=["Yes."], receipts=[None], edits=[None])
    assert_array_equal(measure(name, [answer()], reference), [NAN])


def test_the_length_of_an_empty_answer_is_a_true_zero_and_is_not_cut() -> None:
    answers = [answer(), answer("a" * 70, tuple(range(70)))]
    assert_array_equal(measure("length", answers, Reference(first=50)), [0, 70])


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in sorted(NEEDS) for field in sorted(NEEDS[name])])
def test_a_missing_or_short_reference_is_named(name: str, field: str) -> None:
    whole = {"engine": FakeEngine(), "prompts": PROMPTS[:1], "baseline": ["a"], "receipts": [None], "edits": [None]}
    with pytest.raises(ArgumentError, match=rf"reference.{field}: got None.*Reference\({field}=...\)"):
        measure(name, [answer("a", (1,))], Reference(**whole | {field: None}))
    if field != "engine":
        with pytest.raises(ArgumentError, match=rf"reference.{field}: got 0 for 1 answers"):
            measure(name, [answer("a", (1,))], Reference(**whole | {field: []}))


def test_unknown_measures_and_wrong_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown metric 'repetitions'.*mean 'repetition'"):
        measure("repetitions", [], Reference())
    with pytest.raises(ArgumentError, match="first: got 0"):
        Reference(first=0)
    monkeypatch.setattr(METRICS, "get", lambda _: lambda _answers, _reference: np.zeros(2))
    with pytest.raises(ArgumentError, match=r"'made' gave shape \(2,\)"):
        measure("made", [answer()], Reference())


def test_names_and_imports_are_light() -> None:
    code = "\n".join(f"import steerwell.scoring.metrics.{name}" for name in NEEDS)
    check = f"{code}\nimport sys\nassert not {{'torch', 'transformers', 'sklearn', 'scipy'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Cross-entropy


def test_cross_entropy_is_the_loss_that_transformers_computes(pilot) -> None:
    """`labels` of -100 are left out, so the model's own loss over the first 5 response tokens is the measure."""
    network = transformers.AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_path())
    questions = ["What is the capital of France?", "What is the capital of Italy?"]
    responses = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("It is Paris.", "Go away now. No!")
    ]
    expected = []
    for question, tokens in zip(questions, responses, strict=True):
        turns = [{"role": "system", "content": "You are honest."}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        start = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*start, *tokens[:5]]])
        labels = ids.clone()
        labels[:, : len(start)] = -100
        expected.append(float(network(input_ids=ids, labels=labels).loss.detach()))
    prompts = [Prompt.chat(question, "You are honest.") for question in questions]
    assert max(map(len, responses)) > 5
    assert_allclose(cross_entropy(pilot, prompts, responses, first=5), expected, rtol=1e-4)


def test_cross_entropy_counts_the_first_tokens_and_leaves_empty_answers_out() -> None:
    engine, tokens = FakeEngine(), [72, 105, 33, 72]
    whole = engine.score([PROMPTS[0]], [tokens])[0].logprobs
    values = cross_entropy(engine, PROMPTS, [tokens, [], tokens[:2]], first=3)
    assert_allclose(values[0], -whole[:3].mean(), rtol=1e-6)
    assert math.isnan(values[1])
    assert_allclose(values[2], cross_entropy(engine, PROMPTS[2:], [tokens], first=2)[0], rtol=1e-6)
    assert_array_equal(cross_entropy(engine, PROMPTS[:1], [[]]), [NAN])


def test_cross_entropy_reads_the_unsteered_model_under_the_aligned_prompt() -> None:
    engine = FakeEngine()
    edit = Edit((edit_term(engine, 1, math.inf, 9.0, 0.0),))
    answers = engine.generate(PROMPTS, Sampling(max_new_tokens=8), edit)
    aligned = [Prompt.chat("Who are you?", "You always tell the truth.")] * 3
    expected = [-engine.score([aligned[0]], [item.token_ids])[0].logprobs.mean() for item in answers]
    assert_allclose(measure("cross_entropy", answers, Reference(engine, aligned)), expected, rtol=1e-6)


def test_cross_entropys_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="responses: got 1 for 3 prompts"):
        cross_entropy(FakeEngine(), PROMPTS, [[1]])
    with pytest.raises(ArgumentError, match="first: got 0"):
        cross_entropy(FakeEngine(), PROMPTS[:1], [[1]], first=0)


# What steering did


def test_receipts_measures_by_hand() -> None:
    """Two terms: 10 seen, 4 edited by 2 each; 30 seen, 1 edited by 7: 15 units over 5 edited of 40 seen."""
    receipt = Receipt("made", (term_receipt(10, 4, 2.0), term_receipt(30, 1, 7.0)))
    assert (perturbation(receipt), perturbation_all(receipt), gate_rate(receipt)) == (15 / 5, 15 / 40, 5 / 40)


def test_nothing_edited_is_not_nothing_seen() -> None:
    shut, unseen = Receipt("made", (term_receipt(10, 0, 0.0),)), Receipt("made", (term_receipt(0, 0, 0.0),))
    assert_array_equal([perturbation(shut), perturbation_all(shut), gate_rate(shut)], [NAN, 0, 0])
    for nothing in (unseen, None):
        assert_array_equal([perturbation(nothing), perturbation_all(nothing), gate_rate(nothing)], [NAN, NAN, NAN])


@pytest.mark.parametrize(
    ("method", "strength", "expected"),
    [
        ("sttp", 2, 2.5 + 2 * 0.375),  # mu+ + alpha sigma+
        ("clamp", 1, 2.5),  # mu- + alpha dmu
        ("directional_ablation", 1, 0.0),
        ("directional_ablation", 0.5, NAN),
        ("stmp", 0.5, 0.7),  # halfway to its mirror image is the boundary itself
        ("stmp", 1, NAN),
        ("swfc", 1, NAN),
    ],
)
def test_targets_of_the_methods(method: str, strength: float, expected: float) -> None:
    assert_allclose(target(build(direction(), method, 0, strength).terms[0]), expected, atol=1e-12)


def test_target_distance_by_hand() -> None:
    receipt = Receipt("made", (term_receipt(10, 4, 2.0, 3.0), term_receipt(30, 1, 7.0, -1.0), term_receipt(0, 0, 0.0)))
    assert target_distance(receipt, [5.0, -2.0, 9.0]) == (2 * 10 + 1 * 30) / 40
    assert target_distance(receipt, [5.0, NAN, NAN]) == 2.0
    assert math.isnan(target_distance(receipt, [NAN, NAN, 9.0]))
    assert math.isnan(target_distance(None, []))
    with pytest.raises(ArgumentError, match="targets: got 1 for 3 terms"):
        target_distance(receipt, [1.0])


def test_clamped_answers_lie_on_their_target_and_shifted_ones_have_none() -> None:
    engine = FakeEngine()
    clamp, shift = (Edit((edit_term(engine, 1, math.inf, 3.0, gain),)) for gain in (-1.0, 0.0))
    edits = [clamp, None, shift]
    answers = engine.generate(PROMPTS, Sampling(max_new_tokens=6), edits)
    reference = Reference(receipts=first_receipts(engine, answers, edits), edits=edits)
    assert_allclose(measure("target_distance", answers, reference), [0, NAN, NAN], atol=1e-6)
    assert_allclose(measure("perturbation", answers, reference)[2], 3.0, rtol=1e-6)
    assert_array_equal(measure("gate_rate", answers, reference), [1, NAN, 1])
    swapped = Reference(receipts=reference.receipts, edits=edits[::-1])
    with pytest.raises(ArgumentError, match=r"row 0 is .* its receipt is of"):
        measure("target_distance", answers, swapped)


@pytest.mark.parametrize("position", ["all", "response"])
def test_first_receipts_are_those_of_a_generation_of_that_many_tokens(any_engine, position) -> None:
    """Greedy: the first 4 tokens of a long answer are a short answer's, so what was done to them is the same."""
    rng = np.random.default_rng(0)
    vector = (rng.normal(size=any_engine.info.d_model)).astype(np.float32)
    edit = Edit((EditTerm(1, vector / np.linalg.norm(vector), 0.0, 0.5, -1.0, position),))
    edits = [edit, None, edit]
    short = any_engine.generate(PROMPTS, Sampling(max_new_tokens=4), edits)
    long = any_engine.generate(PROMPTS, Sampling(max_new_tokens=9), edits)
    receipts = first_receipts(any_engine, long, edits, first=4)
    assert receipts[1] is None
    compared = 0
    for row in (0, 2):
        if len(short[row].token_ids) < 4 or long[row].token_ids[:4] != short[row].token_ids:
            continue  # it ended by itself, or chose within rounding
        read, made = receipts[row].terms[0], short[row].receipt.terms[0]
        assert (read.tokens_seen, read.label, read.layer) == (made.tokens_seen, made.label, made.layer)
        if made.gate_margin > 1e-3:
            assert read.tokens_edited == made.tokens_edited
            numbers = ("projection_before", "projection_after", "perturbation", "gate_margin")
            assert_allclose([getattr(read, n) for n in numbers], [getattr(made, n) for n in numbers], atol=1e-3)
            compared += 1
    assert compared


def test_first_receipts_want_the_edits_that_made_the_answers() -> None:
    engine = FakeEngine()
    made, other = (Edit((edit_term(engine, 1, math.inf, offset, 0.0),)) for offset in (1.0, 2.0))
    answers = engine.generate(PROMPTS[:2], Sampling(max_new_tokens=3), [made, None])
    for wrong in ([other, None], [None, None], [made, made]):
        with pytest.raises(ArgumentError, match=r"edits: row \d is .* the answer's receipt says"):
            first_receipts(engine, answers, wrong)
    empty = answer(receipt=Receipt(made.id, (term_receipt(3, 3, 1.0),)))
    assert first_receipts(engine, [empty], made) == [None]


# Similarity and embeddings


def letters(texts) -> np.ndarray:
    """Counts of a, b and c."""
    return np.array([[text.count(letter) for letter in "abc"] for text in texts], float)


def test_similarity_by_hand() -> None:
    """(2, 1, 0) . (1, 1, 0) = 3 over sqrt(5) sqrt(2); zero embeddings and blank texts have no direction."""
    values = similarity(["aab", "aa", "xyz", " ", "c"], ["ab", "bb", "a", "a", "c c c"], letters)
    assert_allclose(values, [3 / math.sqrt(10), 0, NAN, NAN, 1], atol=1e-12)
    assert_array_equal(similarity(["", "a"], ["a", ""], lambda texts: np.ones((len(texts), 2))), [NAN, NAN])


def test_similarity_reads_the_first_words_of_both() -> None:
    assert first_words(" a  b\nc d ", 3) == "a b c"
    long, short = "a b " + "c " * 60, "a b"
    assert_allclose(similarity([long, short], [short, long], letters, first=2), [1, 1])
    cut = measure("similarity", [answer(long)], Reference(baseline=[short], embed=letters, first=3))
    assert_allclose(cut, 2 / math.sqrt(6))


def test_similarity_by_default_needs_no_model() -> None:
    texts = ["It is Paris, the capital of France.", "the capital of France is Paris", "Leave me alone!"]
    values = measure("similarity", [answer(text) for text in texts], Reference(baseline=texts[:1] * 3))
    assert_allclose(values[0], 1, rtol=1e-6)
    assert values[0] > values[1] > 0.6 > 0.2 > values[2]


def test_similaritys_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="others: got 1 for 2 texts"):
        similarity(["a", "b"], ["a"], letters)
    with pytest.raises(ArgumentError, match=r"embed: gave shape \(2,\) for 2 texts"):
        similarity(["a"], ["b"], lambda texts: np.zeros(len(texts)))


def test_hashed_cosines_are_those_of_the_ngram_counts() -> None:
    """Another formulation: exact counts of each word's 3- to 5-grams, the word between single spaces."""

    def grams(text: str) -> Counter[str]:
        words = [f" {word} " for word in text.lower().split()]
        return Counter(word[i : i + n] for word in words for n in (3, 4, 5) for i in range(len(word) - n + 1))

    left, right = grams("The cat sat down here"), grams("the cats sit down there")
    dot = sum(left[gram] * right[gram] for gram in left)
    exact = dot / math.sqrt(sum(n * n for n in left.values()) * sum(n * n for n in right.values()))
    wide = embeddings.hashing(2**20)(["The cat sat down here", "the cats sit down there"])
    narrow = load_embedder()(["The cat sat down here", "the cats sit down there"])
    assert_allclose(wide[0] @ wide[1], exact, atol=1e-5)
    assert_allclose(narrow[0] @ narrow[1], exact, atol=0.05)


def test_hashed_embeddings_do_not_depend_on_their_neighbours() -> None:
    embed = load_embedder("hashing")
    together = embed(["one text", "", "another"])
    assert (together.dtype, together.shape) == (np.float32, (3, 4096))
    assert_allclose(np.linalg.norm(together, axis=1), [1, 0, 1], rtol=1e-6)
    assert_array_equal(together[2], embed(["another"])[0])
    assert embed([]).shape == (0, 4096)


def test_embedders_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown embedder 'hashin'.*mean 'hashing'.*local folder"):
        load_embedder("hashin")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError, match=r"sentence-transformers.*steerwell\[embed\]"):
        load_embedder("sentence-transformers/all-MiniLM-L6-v2")
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(MissingDependencyError, match=r"scikit-learn.*steerwell\[hf\]"):
        load_embedder()


def test_sentence_transformers_are_asked_for_unit_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            if name != "owner/model":
                raise OSError("not at hand")

        def encode(self, texts: list[str], *, normalize_embeddings: bool, show_progress_bar: bool) -> np.ndarray:
            assert normalize_embeddings
            assert not show_progress_bar
            return np.tile([0.6, 0.8], (len(texts), 1))

    package = types.ModuleType("sentence_transformers")
    package.SentenceTransformer = Model
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    embed = load_embedder("owner/model")
    assert_array_equal(embed(["a", "b"]), np.array([[0.6, 0.8]] * 2, np.float32))
    assert embed([]).shape == (0, 2)
    with pytest.raises(EngineError, match=r"cannot load 'owner/other' \(not at hand\); give .*'hashing'"):
        load_embedder("owner/other")


def test_a_real_sentence_transformer_pools_as_it_says(tmp_path: Path) -> None:
    """A random BERT without pooling configuration: the mean over its tokens, normalised."""
    pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    network = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).eval()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["the cat sat", "dog"]
    expected = []
    for text in texts:
        with torch.inference_mode():
            mean = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        expected.append((mean / mean.norm()).numpy())
    embed = load_embedder(str(tmp_path))
    assert_allclose(embed(texts), expected, atol=1e-5)
    assert embed([]).shape == (0, 32)


# Repetition


def test_repetition_by_hand() -> None:
    assert repetition("a b c a b c") == 1 - 3 / 4  # abc bca cab abc
    assert repetition([7] * 10) == 1 - 1 / 8
    assert repetition("one two three") == 0
    assert repetition("a b c a b c", first=5) == 0
    assert_array_equal([repetition(""), repetition("a b"), repetition((1, 2))], [NAN, NAN, NAN])


def test_repetition_agrees_with_nltk() -> None:
    rng = np.random.default_rng(0)
    for length in (3, 10, 50, 80):
        tokens = rng.integers(0, 4, length).tolist()
        counts = Counter(ngrams(tokens[:50], 3))
        repeated = sum(count - 1 for count in counts.values())
        assert_allclose(repetition(tokens), repeated / counts.total(), atol=1e-12)
        assert measure("repetition", [answer(tokens=tuple(tokens))], Reference())[0] == repetition(tokens)


def test_repetitions_growth_is_a_slope_over_turns() -> None:
    """Shares 0, 1/4, 1/2 and 3/4 at turns 0, 1, 2 and 3; a turn without one leaves its place empty."""
    turns = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 1, 2, 3], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1, 1]]
    assert_array_equal([repetition(turn) for turn in turns], [0, 1 / 4, 1 / 2, 3 / 4])
    assert_allclose(repetition_growth(turns), 1 / 4)
    assert_allclose(repetition_growth([turns[0], [], turns[2]]), 1 / 4)
    assert_allclose(repetition_growth(turns[::-1]), -1 / 4)
    assert_allclose(repetition_growth(["a b c", "a a a a"]), 1 / 2)
    uneven = [turns[at] for at in (1, 0, 3, 3, 2)]
    assert_allclose(repetition_growth(uneven), stats.linregress(range(5), [0.25, 0, 0.75, 0.75, 0.5]).slope)
    assert_array_equal([repetition_growth([]), repetition_growth(["a b c", ""])], [NAN, NAN])


# Intervals


def test_a_small_bootstrap_by_enumeration() -> None:
    """All 27 resamples of (0, 1, 2) have means 0, 1/3 ... 2; at 50 % the central quartiles of that distribution."""
    values = np.array([0.0, 1.0, 2.0])
    means = values[np.indices((3, 3, 3)).reshape(3, -1)].mean(0)
    found = Bootstrap(level=0.5, method="percentile", resamples=20_000).mean(values)
    assert_allclose([found.low, found.high], np.quantile(means, [0.25, 0.75]), atol=1e-9)
    assert (found.estimate, found.n, found.missing) == (1, 3, 0)


def test_percentile_intervals_are_quantiles_of_resampled_means() -> None:
    values = np.random.default_rng(1).gamma(2, 5, 30)
    drawn = np.random.default_rng(42).integers(0, 30, (999, 30))
    expected = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    found = Bootstrap(method="percentile", resamples=999).mean(values)
    assert_allclose([found.low, found.high], expected, rtol=1e-12)


def test_bca_by_its_formula() -> None:
    """Efron and Tibshirani (1993), 14.9 to 14.15: z0 from the share below the mean, a from the jackknife's skewness."""
    values = np.random.default_rng(2).gamma(1, 5, 25)
    means = values[np.random.default_rng(42).integers(0, 25, (9999, 25))].mean(1)
    bias = stats.norm.ppf((means < values.mean()).mean() + (means == values.mean()).mean() / 2)
    left_out = (values.sum() - values) / 24
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    shifted = bias + stats.norm.ppf([0.025, 0.975])
    levels = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    found = Bootstrap().mean(values)
    assert_allclose([found.low, found.high], np.quantile(means, levels), rtol=1e-3)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_a_paired_difference_is_scipys_own(method) -> None:
    rng = np.random.default_rng(3)
    left, right = rng.normal(3, 1, 20), rng.normal(2, 1, 20)
    found = Bootstrap(method=method).paired_difference(left, right)
    whole = stats.bootstrap(
        (left, right), lambda a, b, axis: (a - b).mean(axis), paired=True, method=method, rng=np.random.default_rng(42)
    ).confidence_interval
    assert_allclose([found.low, found.high], whole, rtol=1e-9)
    assert_allclose(found.estimate, left.mean() - right.mean())


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_a_planted_difference_is_covered_as_often_as_promised(method) -> None:
    rng, how, covered = np.random.default_rng(4), Bootstrap(level=0.9, method=method, resamples=400), 0
    for _ in range(200):
        found = how.difference(rng.normal(5, 2, 40), rng.normal(4, 1, 60))
        covered += found.low <= 1 <= found.high
    assert 0.83 <= covered / 200 <= 0.96


def test_pairing_narrows_what_pairs_share() -> None:
    rng, how = np.random.default_rng(5), Bootstrap(resamples=999)
    shared = rng.normal(0, 10, 50)
    left, right = shared + 1 + rng.normal(0, 1, 50), shared + rng.normal(0, 1, 50)
    paired, free = how.paired_difference(left, right), how.difference(left, right)
    assert_allclose(paired.estimate, free.estimate)
    assert paired.high - paired.low < 0.2 * (free.high - free.low)
    assert (paired.n, free.n) == (50, 100)


def test_missing_scores_are_left_out_and_counted() -> None:
    how = Bootstrap(resamples=99)
    assert how.mean([1, NAN, 2, 4]) == Interval(7 / 3, *_bounds(how.mean([1, 2, 4])), n=3, missing=1)
    found = how.paired_difference([1, NAN, 5, 8], [0, 1, NAN, 5])
    assert found == Interval(2.0, *_bounds(how.mean([1, 3])), n=2, missing=2)
    free = how.difference([1, NAN, 3], [NAN, 0, 1])
    assert free == Interval(1.5, *_bounds(how.difference([1, 3], [0, 1])), n=4, missing=2)


def _bounds(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_too_few_scores_are_nan_and_equal_ones_a_point(method) -> None:
    how = Bootstrap(method=method, resamples=99)
    for nothing in ([], [NAN]):
        found = how.mean(nothing)
        assert_array_equal([found.estimate, found.low, found.high], [NAN] * 3)
        assert (found.n, found.missing) == (0, len(nothing))
        assert math.isnan(how.difference(nothing, [1, 2]).estimate)
        assert math.isnan(how.paired_difference(nothing, nothing).estimate)
    nearly = how.paired_difference(np.arange(12) / 10 + 0.4, np.arange(12) / 10)  # 0.4, but for rounding
    assert_allclose([nearly.estimate, nearly.low, nearly.high], 0.4)
    one = how.mean([3])
    assert_array_equal([one.estimate, one.low, one.high], [3, NAN, NAN])
    lopsided = how.difference([3], [1, 2])
    assert_array_equal([lopsided.estimate, lopsided.low, lopsided.high], [1.5, NAN, NAN])
    assert how.mean([100, 100, 100]) == Interval(100, 100, 100, 3, 0)
    assert how.difference([1, 1], [0.25, 0.25]) == Interval(0.75, 0.75, 0.75, 4, 0)
    half = how.difference([1, 1], [0, 1, 0, 1])
    assert half.low < half.estimate == 0.5 < half.high


def test_the_batch_of_resamples_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values, how = np.random.default_rng(6).normal(size=30), Bootstrap(resamples=500)
    whole = how.mean(values)
    monkeypatch.setattr("steerwell.scoring.intervals.CELLS", 100)
    cut = how.mean(values)
    assert_allclose(_bounds(cut), _bounds(whole), rtol=1e-12)


def test_intervals_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="level: got 95"):
        Bootstrap(level=95)
    with pytest.raises(UnknownNameError, match=r"unknown interval method 'bc'.*mean 'bca'"):
        Bootstrap(method="bc")
    with pytest.raises(ArgumentError, match="resamples: got 0"):
        Bootstrap(resamples=0)
    with pytest.raises(ArgumentError, match="others: got 1 scores for 2"):
        Bootstrap().paired_difference([1, 2], [1])
    with pytest.raises(ArgumentError, match="values: score 1 is infinite"):
        Bootstrap().mean([1, -math.inf])
    with pytest.raises(ArgumentError, match=r"values: got shape \(1, 2\)"):
        Bootstrap().mean(np.ones((1, 2)))
