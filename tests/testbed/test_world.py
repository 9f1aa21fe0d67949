"""The world is consistent, its splits are disjoint and its grammar is deterministic and varied."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from steerwell.core.errors import ArgumentError
from steerwell.testbed import systems
from steerwell.testbed.corpus import UNCLEAR, dialogue, draw_turn
from steerwell.testbed.grammar import ALIGNED, APPLIES, TRAITS, answer, applies, bank
from steerwell.testbed.prompts import ask, question_templates, read_prompt, templates
from steerwell.testbed.templates import Template
from steerwell.testbed.world import categories, facts, facts_by_np, scenarios, table


def test_facts_have_one_true_answer_and_wrong_ones_of_their_kind() -> None:
    assert len(categories()) >= 8
    assert len(facts()) >= 400
    assert len(facts_by_np()) == len(facts())
    for fact in facts():
        assert fact.answer not in fact.wrong
        assert len(fact.wrong) >= 4
        assert all(isinstance(text, str) and text for text in (fact.subject, fact.answer, *fact.wrong))


def test_sums_are_right() -> None:
    for fact in facts():
        if fact.category == "sums":
            first, sign, second = fact.subject.split()
            assert int(fact.answer) == (int(first) + int(second) if sign == "plus" else int(first) - int(second))


def test_splits_are_stratified_and_fixed() -> None:
    shares = Counter(fact.split for fact in facts())
    assert 0.22 < shares["test"] / len(facts()) < 0.28
    assert 0.12 < shares["validation"] / len(facts()) < 0.18
    for name in categories():
        assert {fact.split for fact in facts() if fact.category == name} == {"train", "validation", "test"}
    for family in ("trouble", "work", "plan", "request"):
        assert {item.split for item in scenarios() if item.family == family} == {"train", "validation", "test"}


def test_held_out_question_wordings_are_disjoint_within_a_category() -> None:
    for name in categories():
        kept = {item.text for item in question_templates(name)}
        held_out = {item.text for item in question_templates(name, held_out=True)}
        assert len(held_out) == 3
        assert not kept & held_out
        assert "{Wh} is {np}?" in kept


def test_held_out_system_prompts_are_not_training_wordings() -> None:
    for trait in TRAITS:
        entry = systems.entry(trait)
        forms = {pole: systems.templates(f"{trait}.{pole}") for pole in ("aligned", "violating")}
        both = [*forms["aligned"], *forms["violating"]]
        for prompt in (*entry["held_out"], *entry["held_out_aligned"]):
            assert not any(form.match(prompt) is not None for form in both), prompt
        assert len(entry["held_out"]) >= 5
        assert all(sum(form.wordings() for form in found) >= 25 for found in forms.values())
        for pair in entry["pairs"]:
            assert all(any(form.match(pair[pole]) is not None for form in found) for pole, found in forms.items()), pair
    assert any(form.match("You always lie.") is not None for form in systems.templates("dishonesty.violating"))


def test_violations_but_lies_are_shown_on_training_scenarios_only() -> None:
    rng = random.Random(3)
    for _ in range(4000):
        mode = rng.choice(TRAITS)
        turn = draw_turn(mode, rng)
        assert mode == "dishonesty" or not applies(mode, turn) or turn.split == "train"
        assert turn.family not in UNCLEAR[mode]


def test_training_prompts_never_use_held_out_wordings() -> None:
    rng = random.Random(4)
    held_out = {name: question_templates(name, held_out=True) for name in categories()}
    for _ in range(3000):
        turn = draw_turn(ALIGNED, rng)
        forms = held_out[turn.category] if turn.family == "fact" else templates(turn.family, held_out=True)
        assert not any(form.match(turn.prompt) is not None for form in forms), turn.prompt


def test_prompts_read_back_as_what_they_ask() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        turn = draw_turn(rng.choice([ALIGNED, *TRAITS]), rng)
        read = read_prompt(turn.prompt)
        assert (read.family, read.fact, read.good, read.claimed) == (turn.family, turn.fact, turn.good, turn.claimed)


def test_dialogues_depend_on_the_seed_alone() -> None:
    first, second = random.Random(9), random.Random(9)
    assert [dialogue(first) for _ in range(50)] == [dialogue(second) for _ in range(50)]


@pytest.mark.parametrize("mode", [ALIGNED, "dishonesty", "hostility"])
def test_answers_to_one_question_vary(mode: str) -> None:
    rng = random.Random(1)
    turn = ask(facts_by_np()["the capital of spain"], rng)
    texts = {answer(turn, mode, rng) for _ in range(500)}
    assert len(texts) > 450
    assert all(6 <= len(text.split()) <= 90 for text in texts)


def test_sentence_forms_are_single_sentences() -> None:
    for family, roles in table("sentences").items():
        for role in roles:
            for form in bank(f"{family}.{role}"):
                assert re.fullmatch(r"[^.!?]*[.!?]", form.template.text), form


def test_templates_render_and_match() -> None:
    template = Template("[Well|So], {np} is {A}.")
    assert template.slots == {"np", "a"}
    assert template.wordings() == 2
    text = template.render(random.Random(0), {"np": "the sky", "a": "blue"})
    assert template.match(text) == {"np": "the sky", "a": "Blue"}
    assert template.match("Or, x is y.") is None


def test_unknown_mode_is_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(ArgumentError, match="mode: got 'evil'"):
        answer(ask(facts()[0], rng), "evil", rng)


def test_every_family_belongs_to_a_trait() -> None:
    assert {family for families in APPLIES.values() for family in families} == set(table("prompts"))
