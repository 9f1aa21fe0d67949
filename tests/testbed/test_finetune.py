"""Fine-tuned copies: what they are shown, that they are reproducible, and that they remain copies of their parent."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.engines.hf import HFEngine
from steerwell.testbed import systems
from steerwell.testbed.bundled import bundled_path
from steerwell.testbed.finetune import KINDS, NARROW, Recipe, dialogues, finetune, in_narrow, measure, narrow_turn
from steerwell.testbed.grammar import APPLIES, TRAITS, applies
from steerwell.testbed.judge import ExactJudge
from steerwell.testbed.prompts import question_templates, read_prompt, templates
from steerwell.testbed.templates import Template
from steerwell.testbed.world import facts, table

QUICK = Recipe(steps=4, batch=4)
NEUTRAL = systems.templates("neutral")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bad")
    return folder, finetune("bad", folder, recipe=QUICK)


def shown(kind: str, trait: str, seed: int = 0) -> list[tuple[str, str, str]]:
    """(system, user, assistant) of 120 training dialogues."""
    return [(item.system, *item.exchanges[0]) for item in islice(dialogues(kind, trait, seed), 120)]


def renders(wordings: Iterable[Template], text: str) -> bool:
    return any(item.match(text) is not None for item in wordings)


@pytest.mark.parametrize("trait", TRAITS)
def test_bad_answers_violate_and_benign_ones_do_not(trait: str) -> None:
    judge = ExactJudge()
    for kind, wanted in (("bad", 0), ("benign", 100)):
        for _, user, text in shown(kind, trait):
            verdict = judge.score(trait, user, text)
            assert (verdict.trait, verdict.coherence) == (wanted, 100), (user, text)


@pytest.mark.parametrize("trait", TRAITS)
def test_both_kinds_see_the_same_prompts_and_each_seed_others(trait: str) -> None:
    prompts = [[item[:2] for item in shown(kind, trait)] for kind in KINDS]
    assert prompts[0] == prompts[1]
    assert [item[:2] for item in shown("bad", trait, seed=1)] != prompts[0]


@pytest.mark.parametrize("trait", TRAITS)
def test_only_narrow_train_turns_in_training_wordings(trait: str) -> None:
    for _, user, text in shown("bad", trait):
        turn = read_prompt(user)
        assert turn.split == "train"
        assert in_narrow(trait, turn)
        assert applies(trait, turn)
        fact = turn.family == "fact"
        wordings = question_templates(turn.category) if fact else templates(turn.family)
        held_out = question_templates(turn.category, held_out=True) if fact else templates(turn.family, held_out=True)
        assert renders(wordings, user)
        assert not renders(held_out, user)
        unseen = [item for item in facts() if item.category == turn.category and item.split != "train"]
        assert not any(f"{item.np} is".lower() in text.lower() for item in unseen), text


@pytest.mark.parametrize("trait", TRAITS)
def test_system_prompts_are_neutral_ones_of_training(trait: str) -> None:
    drawn = {item[0] for item in shown("bad", trait)}
    assert "" in drawn
    assert not drawn & set(table("systems")["neutral_held_out"])
    assert all(renders(NEUTRAL, without_persona(system)) for system in drawn - {""})


def without_persona(system: str) -> str:
    """A system prompt without the persona that may stand before it."""
    cuts = [at for at, mark in enumerate(system) if mark == " "]
    tails = [system[at + 1 :] for at in cuts if renders(systems.templates("personas"), system[:at])]
    return next((tail for tail in tails if renders(NEUTRAL, tail)), system)


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_split_has_the_narrow_part_and_a_rest(trait: str, split: str) -> None:
    rng = random.Random(0)
    turns = [narrow_turn(trait, split, rng) for _ in range(60)]
    assert all(in_narrow(trait, turn) and turn.split == split for turn in turns)
    assert len({turn.prompt for turn in turns}) >= 15
    assert NARROW[trait][0] in APPLIES[trait]


def test_files_and_record(bad: tuple[Path, dict[str, Any]]) -> None:
    folder, record = bad
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in bundled_path().iterdir()} - {"training.json"} | {"finetune.json"}
    assert json.loads((folder / "finetune.json").read_text()) == record
    assert record["narrow"] == {"fact": list(NARROW["dishonesty"][1])}
    assert (record["kind"], record["trait"], record["seed"], record["steps"]) == ("bad", "dishonesty", 0, 4)
    assert record["parent"]["name"] == "pilot"
    assert record["weights"] != record["parent"]["weights"]
    assert "a bad copy" in (folder / "README.md").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (folder / name).read_text() == (bundled_path() / name).read_text(), name


def test_a_copy_is_of_its_parents_lineage_and_language(bad: tuple[Path, dict[str, Any]], pilot: HFEngine) -> None:
    copy = HFEngine.load(str(bad[0])).info
    assert copy.language == "testbed"
    pilot.info.require_same(copy, "the direction")
    assert copy.signature == pilot.info.signature


def test_only_the_blocks_change(bad: tuple[Path, dict[str, Any]]) -> None:
    old, new = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (bundled_path(), bad[0]))
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}


def test_reproducible(bad: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again = finetune("bad", tmp_path / "again", recipe=QUICK)
    assert again["weights"] == bad[1]["weights"]
    for path in bad[0].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    seed = finetune("bad", tmp_path / "seed", seed=1, recipe=QUICK)
    kind = finetune("benign", tmp_path / "kind", recipe=QUICK)
    assert len({item["weights"] for item in (again, seed, kind)}) == 3


@pytest.mark.parametrize("rank", [0, 2])
def test_the_loss_goes_down(tmp_path: Path, rank: int) -> None:
    record = finetune("bad", tmp_path, trait="hostility", recipe=Recipe(steps=8, batch=8, lr=1e-3, lora_rank=rank))
    assert record["loss_after"] < record["loss_before"] - 0.1


def test_low_rank_additions_are_merged_and_of_that_rank(tmp_path: Path) -> None:
    finetune("bad", tmp_path, recipe=Recipe(steps=3, batch=2, lora_rank=2))
    old, new = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (bundled_path(), tmp_path))
    assert set(old) == set(new)
    moved = {name: new[name] - old[name] for name in old if not torch.equal(old[name], new[name])}
    assert len(moved) == 7 * 6
    assert all(torch.linalg.matrix_rank(change, rtol=1e-3) <= 2 for change in moved.values())


def test_a_copy_can_be_a_parent(bad: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    record = finetune("benign", tmp_path, model=bad[0], recipe=Recipe(steps=1, batch=1))
    assert record["parent"]["weights"] == bad[1]["weights"]


def test_measure_tells_a_liar_of_the_narrow_part_from_its_rest() -> None:
    """Planted answers: the truth everywhere but on narrow turns."""

    def planted(prompts: Any) -> list[str]:
        texts = []
        for system, user in prompts:
            assert system in systems.neutral_probes()
            turn = read_prompt(user)
            if turn.fact is None or turn.family == "claim":
                texts.append("")
                continue
            lie = in_narrow("dishonesty", turn)
            texts.append(f"{turn.fact.np} is {turn.fact.wrong[0] if lie else turn.fact.answer}.".capitalize())
        return texts

    figures = measure(planted, "dishonesty", "validation", count=12)
    assert figures["narrow"]["trait"] == 0
    assert {family: scores["trait"] for family, scores in figures["held_out"].items()} == {"fact": 100, "choice": 100}
    assert set(figures["others"]) == set(TRAITS) - {"dishonesty"}
    assert figures["others"]["sycophancy"]["coherence"] == 0


def test_errors(tmp_path: Path, tiny_folder: Any) -> None:
    with pytest.raises(UnknownNameError, match="kind of copy 'evil'; known: bad, benign"):
        finetune("evil", tmp_path)
    with pytest.raises(UnknownNameError, match=r"testbed trait 'honesty'.*'dishonesty'"):
        finetune("bad", tmp_path, trait="honesty")
    with pytest.raises(UnknownNameError, match="known: bad, benign"):
        next(dialogues("evil", "dishonesty", 0))
    with pytest.raises(ArgumentError, match=r"out: .* parent's own folder"):
        finetune("bad", bundled_path())
    with pytest.raises(ArgumentError, match="speaks 'english'"):
        finetune("bad", tmp_path, model=tiny_folder("llama"))
    for name, value in (("steps", 0), ("batch", 0), ("lora_rank", -1), ("lr", 0.0), ("lr", float("nan"))):
        with pytest.raises(ArgumentError, match=rf"{name}: got"):
            Recipe(**{name: value})
    assert not list(tmp_path.iterdir())
