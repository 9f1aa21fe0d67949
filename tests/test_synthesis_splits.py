"""A synthesis study's splits share no prompt, no template, no near-duplicate; and what is asked leaks into none.

Likeness is computed here by comparing every pair of shingle sets, which is neither how splits are made nor how the
study checks them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from steerwell.concepts import load_concept
from steerwell.core.errors import ArgumentError
from steerwell.studies.synthesis.config import SynthesisConfig
from steerwell.studies.synthesis.real import Real, real_examples
from steerwell.synthesis.examples import VIOLATING, Example
from steerwell.synthesis.leaks import leaks
from steerwell.synthesis.near import NEAR, jaccard, response_shingles, shingles
from steerwell.testbed.prompts import question_templates, read_prompt
from steerwell.testbed.prompts import templates as wordings_of
from tests.synthesis_run import concept_of, settings, write_labelled


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Real:
    config = settings(tmp_path_factory.mktemp("data"))
    return real_examples(config, concept_of(config))


def likest(left: Sequence[Example], right: Sequence[Example]) -> float:
    """The highest likeness of a prompt or a response of one side to one of the other."""
    found = 0.0
    for sets in (lambda item: shingles(item.prompt, NEAR.size), lambda item: response_shingles(item, NEAR)):
        one, other = ([sets(item) for item in part] for part in (left, right))
        found = max(found, *(jaccard(a, b) for a in one for b in other))
    return found


@pytest.mark.parametrize("trait", ["dishonesty", "dismissiveness", "hostility", "sycophancy"])
def test_the_bundled_worlds_splits_and_generation_prompts_share_nothing(trait: str) -> None:
    concept = load_concept(trait, "testbed")
    given = {
        "models": ["pilot"],
        "concepts": [trait],
        "originals": 50,
        "few": [10],
        "benign": 50,
        "validation": 40,
        "test": 60,
    }
    real = real_examples(SynthesisConfig.model_validate(given), concept)
    train = [*real.violating, *real.benign]
    assert [len(part) for part in (real.violating, real.benign, real.validation, real.test)] == [50, 50, 80, 120]
    assert leaks(train, real.validation, real.test) == []
    asked = [Example(text, "", VIOLATING) for text in real.asked]
    assert len(asked) >= 50
    assert not {item.prompt for item in asked} & {item.prompt for item in (*real.validation, *real.test)}
    for part in (real.validation, real.test):
        assert likest([*train, *asked], part) < 0.8
        held_out = {item.template for item in part}
        assert all(held_out)
        assert not held_out & {item.template for item in train}
        assert not held_out & {wording(item.prompt) for item in asked}
    assert likest(real.validation, real.test) < 0.8
    assert {read_prompt(text).split for text in real.asked} == {"train"}


def wording(prompt: str) -> str:
    """The wording of the training split that gives a prompt, as examples name it."""
    turn = read_prompt(prompt)
    if turn.family != "fact":
        return next(item.text for item in wordings_of(turn.family) if item.match(prompt))
    return next(f"{turn.category}: {item.text}" for item in question_templates(turn.category) if item.match(prompt))


def test_a_files_splits_and_generation_prompts_share_nothing(real: Real) -> None:
    train = [*real.violating, *real.benign]
    assert leaks(train, real.validation, real.test) == []
    assert likest(train, [*real.validation, *real.test]) < 0.8
    assert likest(real.validation, real.test) < 0.8
    assert list(real.asked) == list(dict.fromkeys(item.prompt for item in train))
    templates = [{item.template for item in part} for part in (train, real.validation, real.test)]
    for one, other in combinations(templates, 2):
        assert not one & other


def test_files_that_share_something_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    other = write_labelled(tmp_path / "other.csv", seed=9)
    third = write_labelled(tmp_path / "third.csv", seed=10)
    files = config.data.model_copy(update={"validation": str(other), "test": str(third)})
    fine = config.model_copy(update={"data": files})
    assert len(real_examples(fine, concept_of(config)).test) == 20
    same = config.model_copy(
        update={"data": files.model_copy(update={"test": str(other)}), "validation": 60, "test": 60}
    )
    with pytest.raises(ArgumentError, match=r"data: validation and test share .* prompts"):
        real_examples(same, concept_of(config))


def test_prompts_that_are_asked_are_held_against_the_test_set_too(tmp_path: Path) -> None:
    """A training file without prompts has the concept's scenarios asked; a test set that holds one of them leaks."""
    config = settings(tmp_path)
    concept = concept_of(config)
    paths = {}
    for name, prompts in (
        ("train", ["", ""]),
        ("validation", ["left", "right"]),
        ("test", [concept.train[0].prompt, "up"]),
    ):
        draw = random.Random(name)
        lines = ["answer,verdict,question"]
        for at in range(24):
            words = " ".join(draw.choice("abcdefghijklmnopqrstuvw") * 3 + str(draw.random())[2:6] for _ in range(10))
            lines.append(f"{words},{('fine', 'rude')[at % 2]},{prompts[at % 2]}")
        paths[name] = tmp_path / f"{name}.csv"
        paths[name].write_text("\n".join(lines))
    files = config.data.model_copy(update={name: str(path) for name, path in paths.items()})
    with pytest.raises(ArgumentError, match=r"train and test share 1 prompts, such as 'river train'"):
        real_examples(config.model_copy(update={"data": files}), concept)
    paths["test"].write_text(paths["test"].read_text().replace(concept.train[0].prompt, "down"))
    real = real_examples(config.model_copy(update={"data": files}), concept)
    assert real.asked == tuple(scenario.prompt for scenario in concept.train)


def test_too_few_examples_and_no_examples_at_all(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with pytest.raises(ArgumentError, match=r"data: train has .* violating examples; the study needs 500"):
        real_examples(config.model_copy(update={"originals": 500}), concept_of(config))
    assert len(real_examples(config.model_copy(update={"test": 500}), concept_of(config)).test) < 60  # all there are
    with pytest.raises(ArgumentError, match="data: got none, and only the bundled model's world"):
        real_examples(config.model_copy(update={"data": None}), concept_of(config))


def test_the_same_file_gives_the_same_examples(tmp_path: Path, real: Real) -> None:
    config = settings(tmp_path)
    again = real_examples(config, concept_of(config))
    assert (again.violating, again.test, again.fingerprint) == (real.violating, real.test, real.fingerprint)
    fewer = real_examples(config.model_copy(update={"test": 6}), concept_of(config))
    assert fewer.fingerprint != real.fingerprint
