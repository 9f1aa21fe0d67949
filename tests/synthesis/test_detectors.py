"""Every kind of detector keeps the same promises; then what each kind promises alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from steerwell.core.artifacts import save_direction
from steerwell.core.errors import ArgumentError, ArtifactError, EngineError, ModelMismatchError, UnknownNameError
from steerwell.core.records import Direction, Prompt
from steerwell.engines.fake import FakeEngine
from steerwell.steering.directions import estimate
from steerwell.synthesis.detection import auroc, by_prompt
from steerwell.synthesis.detectors import DETECTORS, load_detector, train_detector, train_detectors, trial
from steerwell.synthesis.detectors._training import folds, held_out, kept_rows
from steerwell.synthesis.detectors.linear import LinearHead, features, fit_linear
from steerwell.synthesis.examples import Example, labels

KIND_WORDS = ["thanks", "gladly", "warm", "friend", "lovely", "please", "happy", "welcome"]
RUDE_WORDS = ["stupid", "idiot", "hate", "shut", "fool", "ugly", "awful", "dumb"]
TOPICS = ["bread", "trains", "rain", "music", "chess", "paint"]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def planted(prompts: int, seed: int) -> list[Example]:
    """Two answers to every prompt; the words of the violating one never stand in a benign one."""
    rng, found = np.random.default_rng(seed), []
    for at in range(prompts):
        prompt = f"tell me of {rng.choice(TOPICS)} {seed} {at}"
        for label, words in enumerate((KIND_WORDS, RUDE_WORDS)):
            found.append(Example(prompt, " ".join(rng.choice(words, 5)), label, concept="rude"))
    return found


TRAIN, VALIDATION, TEST = planted(24, 1), planted(8, 2), planted(10, 3)
BLANK = Example("tell me", " \n", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random encoder of two layers with a vocabulary of words."""
    folder = tmp_path_factory.mktemp("base")
    numbers = [str(number) for number in range(30)]
    words = [*MARKS, "tell", "me", "of", *TOPICS, *KIND_WORDS, *RUDE_WORDS, *numbers]
    plain = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    marks = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), MARKS, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=32, **marks).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, pad_token_id=0, **shape)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def direction_of(engine: FakeEngine, examples: list[Example], **provenance: Any) -> Direction:
    """The direction between the classes' states."""
    states = [
        engine.capture([Prompt.chat(item.prompt) for item in part], [engine.tokenise(item.response) for item in part])
        for part in ([item for item in examples if item.label == label] for label in (0, 1))
    ]
    return estimate(*states, engine.info, method="mean_difference", concept="rude", provenance=provenance)


@pytest.fixture(scope="module")
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def direction(fake: FakeEngine) -> Direction:
    return direction_of(fake, planted(12, 4))


@pytest.fixture(scope="module")
def options(base: str, fake: FakeEngine, direction: Direction) -> dict[str, dict[str, Any]]:
    return {
        "linear": {"embedder": "hashing"},
        "encoder": {"base": base, "learning_rate": 1e-2, "epochs": 4, "batch_size": 8},
        "probe": {"engine": fake, "direction": direction},
    }


@pytest.fixture(scope="module", params=["linear", "encoder", "probe"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(options):
    """A function: kind -> its detectors of seeds 0 and 1, trained once."""
    known: dict[str, list] = {}

    def detectors(kind: str) -> list:
        if kind not in known:
            known[kind] = list(train_detectors(kind, [*TRAIN, BLANK], VALIDATION, (0, 1), **options[kind]))
        return known[kind]

    return detectors


def loading(kind: str, fake: FakeEngine) -> dict[str, Any]:
    return {"engine": fake} if kind == "probe" else {}


def test_every_kind_is_under_contract() -> None:
    assert set(DETECTORS.names()) == {"linear", "encoder", "probe"}


def test_a_planted_difference_is_found(kind: str, made) -> None:
    for detector in made(kind):
        scores = detector.scores(TEST)
        assert scores.dtype == np.float64
        assert ((scores >= 0) & (scores <= 1)).all()
        assert auroc(labels(TEST), scores) > 0.97
        assert ((scores >= detector.threshold) == labels(TEST)).mean() > 0.9


def test_saved_and_loaded_it_gives_the_same_scores(kind: str, made, fake: FakeEngine, tmp_path: Path) -> None:
    detector = made(kind)[0]
    place = detector.save(tmp_path / "it")
    again = load_detector(place, **loading(kind, fake))
    assert_array_equal(again.scores(TEST), detector.scores(TEST))
    assert (again.name, again.threshold, dict(again.provenance)) == (kind, detector.threshold, detector.provenance)
    names = {file.suffix for file in place.rglob("*") if file.is_file()}
    assert names <= {".json", ".safetensors", ".txt", ".jinja"}
    made(kind)[1].save(place)  # another one takes its place whole
    assert_array_equal(load_detector(place, **loading(kind, fake)).scores(TEST), made(kind)[1].scores(TEST))


def test_a_seed_makes_one_detector(kind: str, made, options) -> None:
    first, second = made(kind)
    again = train_detector(kind, [*TRAIN, BLANK], VALIDATION, 1, **options[kind])
    assert_array_equal(again.scores(TEST), second.scores(TEST))
    assert not np.array_equal(first.scores(TEST), second.scores(TEST))
    assert [first.provenance["seed"], second.provenance["seed"]] == [0, 1]


def test_it_knows_what_it_was_trained_on(kind: str, made) -> None:
    told = made(kind)[0].provenance
    assert told["concepts"] == ["rude"]
    assert (told["train_blank"], told["validation"]) == (1, len(VALIDATION))
    assert told["train_violating"] * 2 == told["train"] == told["train_sources"]["original"]
    assert told["train"] == (len(TRAIN) if kind == "encoder" else len(TRAIN) - 2 * (24 // 10))
    assert told["validation_auroc"] == pytest.approx(auroc(labels(VALIDATION), made(kind)[0].scores(VALIDATION)))
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_a_blank_response_has_no_score(kind: str, made) -> None:
    detector = made(kind)[0]
    scores = detector.scores([TEST[0], BLANK, TEST[1]])
    assert np.isnan(scores).tolist() == [False, True, False]
    assert_allclose(scores[[0, 2]], detector.scores(TEST[:2]), atol=1e-6)
    assert np.isnan(detector.scores([BLANK])).all()
    assert detector.scores([]).shape == (0,)


def test_labels_and_system_prompts_are_not_read(kind: str, made) -> None:
    detector = made(kind)[0]
    other = [replace(example, label=1 - example.label, system="Be rude.") for example in TEST]
    assert_array_equal(detector.scores(other), detector.scores(TEST))


def test_responses_without_prompts_are_read(kind: str, made) -> None:
    bare = [replace(example, prompt="") for example in TEST]
    assert not np.isnan(made(kind)[0].scores(bare)).any()


@pytest.mark.parametrize("role", ["train", "validation"])
def test_one_class_is_an_error(kind: str, role: str, options) -> None:
    parts = {"train": TRAIN, "validation": VALIDATION}
    parts[role] = [*(item for item in parts[role] if item.label == 0), BLANK]
    with pytest.raises(ArgumentError, match=f"{role}: got 0 violating"):
        train_detector(kind, parts["train"], parts["validation"], **options[kind])


def test_without_validation_it_trains_all_the_same(kind: str, options) -> None:
    detector = train_detector(kind, TRAIN, **options[kind])
    assert auroc(labels(TEST), detector.scores(TEST)) > 0.97


def test_damage_is_told(kind: str, made, fake: FakeEngine, tmp_path: Path) -> None:
    place = made(kind)[0].save(tmp_path / "it")
    manifest = place / "artifact.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace(f'"detector": "{kind}"', '"detector": "linear_2"'))
    with pytest.raises(ArtifactError, match="altered"):
        load_detector(place, **loading(kind, fake))
    manifest.write_text(whole[:50])
    with pytest.raises(ArtifactError, match="damaged"):
        load_detector(place, **loading(kind, fake))
    manifest.unlink()
    with pytest.raises(ArtifactError, match="no saved detector"):
        load_detector(place, **loading(kind, fake))


def test_it_replaces_nothing_but_a_detector(kind: str, made, direction: Direction, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="exists and is no Steerwell detector"):
        made(kind)[0].save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    save_direction(direction, tmp_path / "direction")
    with pytest.raises(ArtifactError, match="kind 'direction', expected 'detector'"):
        load_detector(tmp_path / "direction")


def test_one_kind_is_not_loaded_as_another(made, tmp_path: Path) -> None:
    made("linear")[0].save(tmp_path / "it")
    for other in ("encoder", "probe"):
        with pytest.raises(ArtifactError, match="holds a 'linear' detector"):
            DETECTORS.get(other).load(tmp_path / "it")


def test_an_unknown_kind_is_told() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'linear'"):
        train_detector("linaer", TRAIN)


def test_a_trial_is_the_mean_of_its_seeds(options) -> None:
    told: list[int] = []
    found = trial("linear", TRAIN, VALIDATION, [*TEST, BLANK], (0, 1), told.append, **options["linear"])
    each = list(train_detectors("linear", TRAIN, VALIDATION, (0, 1), **options["linear"]))
    assert_array_equal(found.scores, [one.scores([*TEST, BLANK]) for one in each])
    assert found.figures.thresholds == tuple(one.threshold for one in each)
    assert found.figures.seeds["auroc"] == tuple(auroc(labels(TEST), row[:-1]) for row in found.scores)
    assert (found.figures.groups, found.figures.auroc.missing, told) == (10, 1, [1, 1])
    assert found.detector.provenance["seed"] == 0
    with pytest.raises(ArgumentError, match="seeds: got none"):
        trial("linear", TRAIN, VALIDATION, TEST, (), **options["linear"])


# What a seed leaves out, and folds


def test_a_seed_leaves_out_a_tenth_of_each_kind_of_prompt() -> None:
    groups = np.concatenate([np.repeat(np.arange(40), 2), np.arange(40, 60), np.arange(60, 70)])
    truth = np.concatenate([np.tile([0, 1], 40), np.zeros(20, int), np.ones(10, int)])
    rows = kept_rows(truth, groups, 0)
    out = np.setdiff1d(np.arange(len(truth)), rows)
    assert len(out) == 2 * 4 + 2 + 1
    assert not set(groups[out]) & set(groups[rows])
    assert_array_equal(rows, kept_rows(truth, groups, 0))
    assert not np.array_equal(rows, kept_rows(truth, groups, 1))
    assert len(kept_rows(np.array([0, 1, 0, 1]), np.arange(4), 0)) == 4  # two of a class: none can be spared


def test_folds_share_no_prompt_and_hold_both_classes() -> None:
    truth, groups = labels(TRAIN), by_prompt(TRAIN)
    found = folds(truth, groups)
    assert sorted(row for _, outside in found for row in outside) == list(range(len(TRAIN)))
    for inside, outside in found:
        assert not set(groups[inside]) & set(groups[outside])
        assert set(truth[outside]) == set(truth[inside]) == {0, 1}
    assert folds(np.array([0, 1]), np.array([0, 0])) == []
    inside, outside = held_out(TRAIN)
    assert not {item.prompt for item in inside} & {item.prompt for item in outside}
    assert 0.1 < len(outside) / len(TRAIN) < 0.3
    with pytest.raises(ArgumentError, match="give validation examples"):
        held_out(TRAIN[:2])


# linear


def test_features_are_response_beside_prompt_and_each_text_is_embedded_once() -> None:
    asked: list[str] = []

    def embed(texts):
        asked.extend(texts)
        return np.array([[len(text), text.count("e")] for text in texts], np.float32)

    examples = [Example("one", "three", 0), Example("one", "seven", 1), Example("", "three", 1)]
    assert features(examples, embed).tolist() == [[5, 2, 3, 1], [5, 2, 3, 1], [5, 2, 0, 0]]
    assert sorted(asked) == ["", "one", "seven", "three"]
    assert features(examples, embed).dtype == np.float32


def test_fit_linear_is_scikit_learns_on_the_rows_that_the_seed_leaves() -> None:
    rng = np.random.default_rng(0)
    inputs, truth = rng.normal(size=(60, 5)).astype(np.float32), np.repeat([0, 1], [45, 15])
    inputs[:, 0] += 2 * truth
    rows = kept_rows(truth, np.arange(60), 3)
    assert len(rows) == 60 - 4 - 1
    model = LogisticRegression(C=0.5, class_weight="balanced", max_iter=10_000).fit(inputs[rows], truth[rows])
    head = fit_linear(inputs, truth, 3, 0.5)
    assert_allclose(head.scores(inputs), model.predict_proba(inputs)[:, 1], atol=1e-6)


def test_a_linear_head_by_hand() -> None:
    head = LinearHead(np.array([1.0, -2.0]), 0.5)
    assert head.scores(np.array([[1, 1]], np.float32))[0] == pytest.approx(1 / (1 + math.exp(0.5)))


def test_the_other_embedders_vectors_are_refused(made, tmp_path: Path) -> None:
    made("linear")[0].save(tmp_path / "it")
    narrow = replace(load_detector(tmp_path / "it"), embed=lambda texts: np.zeros((len(texts), 7), np.float32))
    with pytest.raises(ArgumentError, match="14 features"):
        narrow.scores(TEST)


def test_c_is_chosen_or_given() -> None:
    """Separable classes want a weak penalty, labels by chance a strong one; what was asked for is taken."""
    assert train_detector("linear", TRAIN, VALIDATION, embedder="hashing").c >= 100
    assert train_detector("linear", TRAIN, VALIDATION, embedder="hashing", c=0.3).c == 0.3
    rng = np.random.default_rng(0)
    mixed = [replace(item, label=int(label)) for item, label in zip(TRAIN, rng.integers(0, 2, 48), strict=True)]
    assert train_detector("linear", mixed, embedder="hashing").c <= 0.1


# encoder


def test_an_altered_encoder_is_refused(made, tmp_path: Path) -> None:
    place = made("encoder")[0].save(tmp_path / "it")
    (folder,) = place.glob("model-*")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="altered"):
        load_detector(place)


def test_an_encoder_reads_prompt_and_response(made) -> None:
    detector = made("encoder")[0]
    long = replace(TEST[0], response=" ".join([TEST[0].response] * 50))
    assert not np.isnan(detector.scores([long])).any()  # cut, not refused
    other = replace(TEST[0], prompt=TEST[1].response)
    assert detector.scores([other])[0] != detector.scores([TEST[0]])[0]


def test_an_encoders_scores_do_not_depend_on_the_batch(made) -> None:
    detector = made("encoder")[0]
    alone = np.concatenate([detector.scores([example]) for example in TEST])
    assert_allclose(detector.scores(TEST), alone, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"base": "/nowhere"}, EngineError), ({"epochs": 0}, ArgumentError), ({"learning_rate": 0.0}, ArgumentError)],
)
def test_a_wrong_recipe_is_told(wrong: dict[str, Any], error: type[Exception], base: str) -> None:
    with pytest.raises(error, match=next(iter(wrong))):
        train_detector("encoder", TRAIN, VALIDATION, **({"base": base} | wrong))


# probe


def projections(engine: FakeEngine, direction: Direction, examples: list[Example]) -> np.ndarray:
    prompts = [Prompt.chat(item.prompt) for item in examples]
    states = engine.capture(prompts, [engine.tokenise(item.response) for item in examples])
    return np.einsum("nld,ld->nl", states, direction.vectors)


def test_a_probe_without_examples_is_the_directions_own_calibration(fake: FakeEngine, direction: Direction) -> None:
    detector = train_detector("probe", [], engine=fake, direction=direction)
    layer = max(range(4), key=lambda at: direction.calibration[at].cohens_d)
    own = direction.calibration[layer]
    slope = (own.mu_aligned - own.mu_violating) / ((own.sigma_aligned**2 + own.sigma_violating**2) / 2)
    along = projections(fake, direction, TEST)[:, layer]
    assert detector.layer == layer
    assert_allclose(detector.scores(TEST), 1 / (1 + np.exp(slope * (along - own.boundary))), rtol=1e-4)
    assert detector.provenance["calibration"] == "the direction's own"
    assert detector.threshold == 0.5


def test_a_probe_refits_middle_and_slope_alone(fake: FakeEngine, direction: Direction) -> None:
    detector = train_detector("probe", TRAIN, engine=fake, direction=direction, layer=2)
    along = projections(fake, direction, TEST)[:, 2]
    scores = detector.scores(TEST)
    assert_array_equal(np.argsort(scores), np.argsort(-along))
    assert detector.provenance["calibration"] == "training examples"
    odds = np.log(scores / (1 - scores))
    assert_allclose(odds, detector.slope * (detector.boundary - along), rtol=1e-3)


def test_a_probe_takes_the_layer_with_the_highest_validation_auroc(fake: FakeEngine, direction: Direction) -> None:
    """All layers but one point across the classes."""
    vectors = np.random.default_rng(0).normal(size=direction.vectors.shape).astype(np.float32)
    for layer in range(4):
        vectors[layer] -= (vectors[layer] @ direction.vectors[layer]) * direction.vectors[layer]
    vectors[1] = direction.vectors[1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lone = replace(direction, vectors=vectors)
    along = projections(fake, lone, VALIDATION)
    best = int(np.argmax([auroc(labels(VALIDATION), -along[:, layer]) for layer in range(4)]))
    assert best == 1
    assert train_detector("probe", TRAIN, VALIDATION, engine=fake, direction=lone).layer == 1


def test_a_direction_is_not_turned_round(fake: FakeEngine, direction: Direction) -> None:
    turned = replace(direction, vectors=-direction.vectors)
    detector = train_detector("probe", TRAIN, VALIDATION, engine=fake, direction=turned)
    assert auroc(labels(TEST), detector.scores(TEST)) < 0.03
    assert detector.provenance["calibration"] == "the direction's own"


def test_a_direction_read_elsewhere_gives_no_calibration(fake: FakeEngine) -> None:
    read = direction_of(fake, planted(12, 4), pool="prompt_last")
    with pytest.raises(ArgumentError, match="prompt_last"):
        train_detector("probe", [], engine=fake, direction=read)
    assert train_detector("probe", TRAIN, engine=fake, direction=read).slope > 0


def test_a_probe_is_refused_on_another_model(made, direction: Direction, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatchError, match="the direction was made for 'fake-0'"):
        train_detector("probe", TRAIN, engine=FakeEngine(seed=1), direction=direction)
    made("probe")[0].save(tmp_path / "it")
    for other in (FakeEngine(seed=1), FakeEngine(n_layers=3)):
        with pytest.raises(ModelMismatchError, match="the detector was made for"):
            load_detector(tmp_path / "it", engine=other)
    with pytest.raises(EngineError, match="fake-0"):  # without an engine the model is loaded by its name
        load_detector(tmp_path / "it")


def test_a_probe_of_the_bundled_model_is_found_by_name(pilot, tmp_path: Path) -> None:
    states = pilot.capture([Prompt.chat("Hi")] * 4, [pilot.tokenise(text) for text in ("yes", "good", "no", "bad")])
    direction = estimate(states[:2], states[2:], pilot.info, method="mean_difference")
    examples = [Example("Hi", text, label) for text, label in (("yes", 0), ("good", 0), ("no", 1), ("bad", 1))]
    detector = train_detector("probe", examples, engine=pilot, direction=direction)
    place = detector.save(tmp_path / "it")
    assert json.loads((place / "artifact.json").read_text())["content"]["model"]["name"] == "pilot"
    assert_allclose(load_detector(place).scores(examples), detector.scores(examples), atol=1e-6)
