"""The world's own labelled exchanges: labels hold, splits share nothing, the same seed gives the same."""

import pytest

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.testbed.grammar import TRAITS
from steerwell.testbed.judge import ExactJudge
from steerwell.testbed.prompts import read_prompt
from steerwell.testbed.violations import SEEN, exchanges


@pytest.mark.parametrize("trait", TRAITS)
def test_labels_are_what_the_judge_reads(trait):
    for item in exchanges(trait, "train", 20, 20):
        found = ExactJudge().score(trait, item.prompt, item.response).trait
        assert found <= SEEN if item.violating else found == 100


@pytest.mark.parametrize("trait", TRAITS)
def test_splits_share_no_prompt_scenario_or_wording(trait):
    made = {split: exchanges(trait, split, 30, 30) for split in ("train", "validation", "test")}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not {item.prompt for item in made[one]} & {item.prompt for item in made[other]}
        assert not {item.template for item in made[one]} & {item.template for item in made[other]}
        assert not {item.response for item in made[one]} & {item.response for item in made[other]}
    for split, items in made.items():
        assert {read_prompt(item.prompt).split for item in items} == {split}


def test_the_same_seed_gives_the_same_exchanges_and_another_one_others():
    first = exchanges("hostility", "test", 5, 5)
    assert first == exchanges("hostility", "test", 5, 5)
    assert first != exchanges("hostility", "test", 5, 5, seed=1)


def test_more_than_the_world_holds_and_unknown_names_are_errors(monkeypatch):
    with pytest.raises(UnknownNameError, match="train, validation, test"):
        exchanges("hostility", "tests", 1, 1)
    with pytest.raises(UnknownNameError, match="hostility"):
        exchanges("honesty", "test", 1, 1)
    monkeypatch.setattr("steerwell.testbed.violations._answer", lambda *_: "always the same")
    with pytest.raises(ArgumentError, match="no more than 1 different"):
        exchanges("hostility", "test", 2, 0)
