"""The bundled packs are what the generator writes, and keep the world's splits apart."""

from __future__ import annotations

from typing import Any

import pytest

from steerwell.testbed.grammar import TRAITS, applies
from steerwell.testbed.packs import OUT, pack, render
from steerwell.testbed.prompts import question_templates, read_prompt, templates
from steerwell.testbed.world import SPLITS


@pytest.mark.parametrize("trait", TRAITS)
def test_files_equal_the_generator(trait: str) -> None:
    assert (OUT / f"{trait}.yaml").read_text(encoding="utf-8") == render(trait)


@pytest.mark.parametrize("trait", TRAITS)
def test_scenarios_are_distinct_and_of_their_split(trait: str) -> None:
    content = pack(trait)
    prompts = [item["prompt"] for split in SPLITS for item in content[split]]
    assert len(set(prompts)) == len(prompts)
    least = {"train": 50, "validation": 40, "test": 112 if trait == "dishonesty" else 60}
    for split in SPLITS:
        assert len(content[split]) >= least[split]
        for item in content[split]:
            turn = read_prompt(item["prompt"])
            assert turn.split == split, item
            assert applies(trait, turn), item


@pytest.mark.parametrize("trait", TRAITS)
def test_test_wordings_are_held_out(trait: str) -> None:
    content: dict[str, Any] = pack(trait)
    for split in SPLITS:
        for item in content[split]:
            turn = read_prompt(item["prompt"])
            held_out = (
                question_templates(turn.category, held_out=True)
                if turn.family == "fact"
                else templates(turn.family, held_out=True)
            )
            assert any(form.match(item["prompt"]) is not None for form in held_out) == (split == "test"), item


def test_dishonesty_has_many_categories_and_its_own_pairs() -> None:
    content = pack("dishonesty")
    assert len({item["category"] for item in content["test"]}) >= 8
    assert all(item["aligned"] and item["violating"] for item in content["train"])
