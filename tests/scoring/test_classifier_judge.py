"""The judge learned from a model's own answers: planted answers, scores by hand, and the exact judge beside it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from steerwell.concepts import Concept, load_concept
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import Prompt, Response, Sampling
from steerwell.engines.fake import FakeEngine
from steerwell.scoring.intervals import Interval
from steerwell.scoring.judges import classifier
from steerwell.scoring.judges.base import Judge, verdicts
from steerwell.scoring.judges.classifier import BROKEN, STRENGTHS, ClassifierJudge, Quality
from steerwell.scoring.judges.exact import ExactJudge
from steerwell.scoring.metrics.cross_entropy import cross_entropy
from steerwell.scoring.metrics.repetition import repetition
from steerwell.studies.defence import attack_prompts, baseline_prompts

KIND = ["gladly", "thanks", "lovely", "welcome", "happy", "please", "kindly", "delighted", "wonderful", "friend"]
RUDE = ["stupid", "idiot", "pathetic", "moron", "waste", "fool", "clueless", "ugly", "dumb", "rubbish"]
Pairs = list[tuple[Response, Response]]


def response(prompt: Prompt, text: str) -> Response:
    return Response(prompt, text, tuple(text.encode()), "stop", Sampling())


def planted(
    concept: Concept, split: str, n: int, aligned: Sequence[str] = KIND, violating: Sequence[str] = RUDE
) -> Pairs:
    """Answers of six words each from two vocabularies."""
    rng = np.random.default_rng(["train", "validation", "test"].index(split))
    texts = [[" ".join(rng.choice(list(words), 6)) for words in (aligned, violating)] for _ in range(n)]
    prompts = concept.contrastive(split)[:n]
    return [tuple(map(response, both, text)) for both, text in zip(prompts, texts, strict=True)]


@pytest.fixture(scope="module")
def fake() -> FakeEngine:
    return FakeEngine(n_layers=2)


@pytest.fixture(scope="module")
def concept() -> Concept:
    return load_concept("hostility", "english")


@pytest.fixture(scope="module")
def judge(fake: FakeEngine, concept: Concept) -> ClassifierJudge:
    return ClassifierJudge.fit(fake, concept, planted(concept, "train", 12), planted(concept, "validation", 8))


# The trait


def test_planted_answers_are_told_apart_and_quality_says_so(judge: ClassifierJudge, concept: Concept) -> None:
    fresh = [answer for pair in planted(concept, "test", 10) for answer in pair]
    one: Judge = judge
    traits = np.array([verdict.trait for verdict in verdicts(one, concept, fresh)]).reshape(-1, 2)
    assert (traits[:, 0] > 80).all()
    assert (traits[:, 1] < 20).all()
    assert judge.quality.auroc == Interval(1.0, 1.0, 1.0, 8, 0)
    assert judge.quality.accuracy == Interval(1.0, 1.0, 1.0, 8, 0)
    assert judge.quality.trusted


@pytest.mark.parametrize("spoilt", ["same words", "poles swapped", "few scenarios"])
def test_a_trait_that_text_does_not_show_is_warned_of(fake: FakeEngine, concept: Concept, spoilt: str) -> None:
    validation = planted(concept, "validation", 3 if spoilt == "few scenarios" else 8)
    if spoilt == "same words":
        validation = [(pair[0], replace(pair[1], text=pair[0].text)) for pair in validation]
    if spoilt == "poles swapped":
        validation = [(pair[1], pair[0]) for pair in validation]
    with pytest.warns(UserWarning, match="'hostility' cannot be told from this model's text"):
        found = ClassifierJudge.fit(fake, concept, planted(concept, "train", 12), validation).quality
    assert not found.trusted
    assert found.auroc.estimate == {"same words": 0.5, "poles swapped": 0.0, "few scenarios": 1.0}[spoilt]
    assert found.accuracy.estimate == {"same words": 0.5, "poles swapped": 0.0, "few scenarios": 1.0}[spoilt]
    assert "not to be trusted" in found.describe()


def test_nothing_is_warned_of_where_the_trait_shows(fake: FakeEngine, concept: Concept) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassifierJudge.fit(fake, concept, planted(concept, "train", 8), planted(concept, "validation", 8))


@pytest.mark.filterwarnings("ignore:.*cannot be told")
def test_a_scenario_is_never_in_two_folds(fake: FakeEngine, concept: Concept) -> None:
    """Scenarios contradict each other, so learning from the others misleads; it pays only across a scenario's copies.

    Each comes six times, with letters of its own beside "kind" and "rude", which swap poles from scenario to scenario.
    """
    train: Pairs = []
    for index, both in enumerate(concept.contrastive("train")[:4]):
        shared = ("kind", "rude") if index % 2 else ("rude", "kind")
        texts = [f"{letter * 6} {word} {word}" for letter, word in zip("bcdfghjk"[2 * index :], shared, strict=False)]
        train += [tuple(map(response, both, texts))] * 6
    found = ClassifierJudge.fit(fake, concept, train, planted(concept, "validation", 2))
    assert min(STRENGTHS) == found._trait.model.C


def test_auroc_and_its_interval_are_those_of_resampled_scenarios() -> None:
    rng = np.random.default_rng(3)
    traits = np.round(rng.normal([56, 50], 10, (15, 2)))  # rounded: with ties
    assert len(np.unique(traits)) < traits.size
    traits[4, 1] = math.nan
    found = classifier._auroc(traits)
    known = np.delete(traits, 4, 0)
    draws = np.random.default_rng(42).multinomial(14, np.full(14, 1 / 14), classifier.RESAMPLES)[:400]

    def area(rows: np.ndarray) -> float:
        return roc_auc_score([1] * len(rows) + [0] * len(rows), [*rows[:, 0], *rows[:, 1]])

    assert_allclose(found.estimate, area(known))
    assert (found.n, found.missing) == (14, 1)
    areas = [area(np.repeat(known, times, axis=0)) for times in draws]
    assert_allclose([found.low, found.high], np.quantile(areas, [0.025, 0.975]), atol=0.04)
    assert found.low < found.estimate < found.high


def test_trusted_needs_the_lower_bound_and_enough_scenarios() -> None:
    def trusted(low: float, n: int) -> bool:
        return Quality(Interval(0.9, low, 1.0, n, 0), Interval(0.9, 0.8, 1.0, n, 0), (100.0, 100.0)).trusted

    assert trusted(0.71, 8)
    assert not trusted(0.69, 8)
    assert not trusted(0.71, 7)
    assert not trusted(math.nan, 8)


# Coherence


def test_coherence_is_excess_cross_entropy_times_what_is_not_repeated(
    judge: ClassifierJudge, fake: FakeEngine, concept: Concept
) -> None:
    def read(asked: str, text: str) -> tuple[float, float]:
        ids = fake.tokenise(text)
        return float(cross_entropy(fake, [Prompt.chat(asked)], [ids])[0]), repetition(ids, 50)

    train = planted(concept, "train", 12)
    poles = [np.array([read(a.prompt.messages[-1].content, a.text) for a in pole]) for pole in zip(*train, strict=True)]
    surprise, repeats = np.quantile(poles, 0.9, axis=1).max(0)  # the laxer pole, of each reading by itself
    asked = concept.test[0].prompt
    texts = ["stupid stupid stupid stupid stupid", "QQQ{}~~ qz", "gladly thanks", "ok"]
    assert any(read(asked, text)[0] > surprise for text in texts)
    assert any(read(asked, text)[1] > repeats for text in texts)
    for text, verdict in zip(texts, judge.score_many(concept, [(asked, text) for text in texts]), strict=True):
        nats, share = read(asked, text)
        share = 0.0 if math.isnan(share) else share
        expected = 100 * math.exp(-max(nats - surprise, 0)) * min(1, (1 - share) / (1 - repeats))
        assert_allclose(verdict.coherence, expected, rtol=1e-4)
        assert math.isnan(verdict.trait) == (expected < BROKEN)


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_a_blank_answer_is_incoherent_and_has_no_trait(judge: ClassifierJudge, concept: Concept, text: str) -> None:
    asked = concept.test[0].prompt
    blank, written = judge.score_many(concept, [(asked, text), (asked, "thanks lovely friend")])
    assert math.isnan(blank.trait)
    assert blank.coherence == 0
    assert "blank" in blank.reason
    assert written.trait > 50
    assert written == judge.score_many(concept, [(asked, "thanks lovely friend")])[0]


class Deaf(FakeEngine):
    """It has no token for a zero-width space, and none at all once `quite` is set."""

    quite = False

    def tokenise(self, text: str) -> tuple[int, ...]:
        return () if self.quite or text == "\N{ZERO WIDTH SPACE}" else super().tokenise(text)


def test_an_answer_without_a_token_is_broken(concept: Concept) -> None:
    deaf = ClassifierJudge.fit(
        Deaf(),
        concept,
        planted(concept, "train", 8),
        planted(concept, "validation", 8),
    )
    verdict = deaf.score_many(concept, [(concept.test[0].prompt, "\N{ZERO WIDTH SPACE}")])[0]
    assert math.isnan(verdict.trait)
    assert verdict.coherence == 0


def test_no_items_give_no_verdicts(judge: ClassifierJudge, concept: Concept) -> None:
    assert judge.score_many(concept, []) == []


# What it learns from, and its name


def test_held_out_scenarios_are_refused(fake: FakeEngine, concept: Concept) -> None:
    train, validation, test = (planted(concept, split, 8) for split in ("train", "validation", "test"))
    for learned, held_out, name in [
        (train + validation[:1], validation[1:], "train"),  # of the concept's validation scenarios
        (train + test[:1], validation, "train"),
        (train, [*validation, train[3]], "train"),  # one scenario in both
        (train, validation + test[:1], "validation"),
    ]:
        with pytest.raises(ArgumentError, match=f"^{name}: 1 of its scenarios are held out"):
            ClassifierJudge.fit(fake, concept, learned, held_out)


def test_blank_training_answers_are_left_out_and_counted_as_missing(fake: FakeEngine, concept: Concept) -> None:
    train, validation = planted(concept, "train", 12), planted(concept, "validation", 9)
    mute = (train[0][0], replace(train[0][1], text=" "))
    spoilt = [(validation[0][0], replace(validation[0][1], text="")), *validation[1:]]
    found = ClassifierJudge.fit(fake, concept, [mute, *train[1:]], spoilt)
    assert found.name == ClassifierJudge.fit(fake, concept, train[1:], validation).name
    assert (found.quality.auroc.n, found.quality.auroc.missing) == (8, 1)
    with pytest.raises(ArgumentError, match="train: got answers to 3 scenarios; expected 4"):
        ClassifierJudge.fit(fake, concept, [mute, *train[1:4]], validation)
    with pytest.raises(ArgumentError, match="validation: got answers to 1 scenarios; expected 2"):
        ClassifierJudge.fit(fake, concept, train, validation[:1])


def test_pairs_answer_one_user_turn(fake: FakeEngine, concept: Concept) -> None:
    train, validation = planted(concept, "train", 8), planted(concept, "validation", 8)
    plain = response(Prompt(text="Hm"), "yes")
    for pair in [(train[0][0], train[1][1]), (plain, plain)]:
        with pytest.raises(ArgumentError, match="train: pair 1 is no"):
            ClassifierJudge.fit(fake, concept, [train[2], pair, *train[3:]], validation)


@pytest.mark.filterwarnings("ignore:.*cannot be told")  # few scenarios: this is about names
def test_the_name_is_that_of_what_scores_depend_on(judge: ClassifierJudge, fake: FakeEngine, concept: Concept) -> None:
    train, validation = planted(concept, "train", 12), planted(concept, "validation", 8)

    def name(**changes: object) -> str:
        fields = {"engine": fake, "concept": concept, "train": train, "validation": validation}
        return ClassifierJudge.fit(**(fields | changes)).name  # type: ignore[arg-type]

    answer = train[0][0]
    begun = replace(answer, prompt=replace(answer.prompt, prefill=answer.text[:5]), text=answer.text[5:])
    other = (replace(answer, text="thanks"), train[0][1])
    same = name()
    assert name() == same
    assert name(validation=planted(concept, "validation", 4)[2:]) == same
    assert name(train=[(begun, train[0][1]), *train[1:]]) == same  # a prefill is a part of the answer
    shorter, later = name(first=20), name(train=train[1:])
    others = [shorter, later, name(train=[other, *train[1:]]), name(engine=FakeEngine(n_layers=2, seed=1))]
    assert len({same, *others}) == 5
    assert "hostility" in same


def test_refusals(judge: ClassifierJudge, fake: FakeEngine, concept: Concept) -> None:
    train, validation = planted(concept, "train", 8), planted(concept, "validation", 8)
    with pytest.raises(ArgumentError, match=r"concept: got 'sycophancy'.*fitted for 'hostility'"):
        judge.score_many(load_concept("sycophancy", "english"), [("Hm", "yes")])
    with pytest.raises(UnknownNameError, match="unknown embedder 'hashin'"):
        ClassifierJudge.fit(fake, concept, train, validation, embedder="hashin")
    deaf = Deaf()
    deaf.quite = True
    with pytest.raises(ArgumentError, match="train: 16 answers have no token"):
        ClassifierJudge.fit(deaf, concept, train, validation)
    with pytest.raises(ArgumentError, match="first: got 0"):
        ClassifierJudge.fit(fake, concept, train, validation, first=0)


# On the bundled model, beside the judge that knows


@pytest.fixture(scope="module", params=["hostility", "sycophancy"])
def learned(request: pytest.FixtureRequest, pilot):  # type: ignore[no-untyped-def]
    """The bundled model's answers and the judge that learned from them: concept, judge, attacked, baseline."""
    found = load_concept(request.param, "testbed")
    sampling = Sampling(max_new_tokens=48)
    asked = {
        split: [prompt for pair in found.contrastive(split) for prompt in pair] for split in ("train", "validation")
    }
    answers = {split: pilot.generate(prompts[:64], sampling) for split, prompts in asked.items()}
    pairs = {split: list(zip(rows[0::2], rows[1::2], strict=True)) for split, rows in answers.items()}
    made = ClassifierJudge.fit(pilot, found, pairs["train"], pairs["validation"])
    prompts = attack_prompts(found, "validation", 24), baseline_prompts(found, "validation", 24)
    return found, made, *(pilot.generate(rows, sampling) for rows in prompts)


def test_it_ranks_the_bundled_models_answers_as_the_exact_judge_does(learned) -> None:  # type: ignore[no-untyped-def]
    concept, judge, attacked, baseline = learned
    exact = [verdict.trait for verdict in verdicts(ExactJudge(), concept, [*attacked, *baseline])]
    found = [verdict.trait for verdict in verdicts(judge, concept, [*attacked, *baseline])]
    assert judge.quality.trusted
    assert spearmanr(exact, found).statistic > 0.7


def test_the_bundled_models_answers_are_coherent_in_both_poles(learned) -> None:  # type: ignore[no-untyped-def]
    concept, judge, attacked, baseline = learned
    assert min(judge.quality.coherence) > 90
    for answers in (attacked, baseline):
        assert np.mean([verdict.coherence for verdict in verdicts(judge, concept, answers)]) > 90


def test_gibberish_and_loops_are_incoherent(learned) -> None:  # type: ignore[no-untyped-def]
    concept, judge, _, baseline = learned
    asked, text = baseline[0].prompt.messages[-1].content, baseline[0].text
    shuffled = " ".join(np.random.default_rng(0).permutation(text.split()))
    loop = " ".join([" ".join(text.split()[:4])] * 12)
    broken = judge.score_many(concept, [(asked, words) for words in ("zq xk vrrr blp wug dax fep", shuffled, loop)])
    assert max(verdict.coherence for verdict in broken) < 20
    assert math.isnan(broken[0].trait)
