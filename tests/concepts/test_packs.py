"""The packs that come with Steerwell: whole, large enough, and with held-out parts that are held out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from steerwell.concepts import check_concept, concept_names, load_concept
from steerwell.concepts.loader import ENGLISH, PACKS
from steerwell.concepts.schema import SPLITS, Concept
from steerwell.core.errors import UnknownNameError

NAMES = ("dishonesty", "dismissiveness", "hostility", "sycophancy")
FILES = sorted(PACKS.rglob("*.yaml"))
every_pack = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKS)))
english_pack = pytest.mark.parametrize("name", NAMES)


@cache
def read(path: Path) -> Concept:
    return load_concept(path)


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def fitting_prompts(concept: Concept) -> set[str]:
    texts = {text for pair in concept.pairs for text in (pair.aligned, pair.violating)}
    return {
        plain(text)
        for text in texts | {text for item in concept.train for text in (item.aligned, item.violating) if text}
    }


def test_four_concepts_cover_helpful_harmless_and_honest() -> None:
    assert concept_names() == NAMES
    assert {path.stem for path in FILES if path.parent == PACKS} == set(NAMES)


def test_packs_of_another_language_bear_the_same_names() -> None:
    for folder in (path for path in PACKS.iterdir() if path.is_dir() and any(path.glob("*.yaml"))):
        assert concept_names(folder.name) == NAMES
        assert {load_concept(name, folder.name).language for name in NAMES} == {folder.name}


@every_pack
def test_a_pack_has_no_fault_at_all(path: Path) -> None:
    assert [str(fault) for fault in check_concept(path)] == []


@every_pack
def test_a_pack_is_in_the_language_of_its_folder(path: Path) -> None:
    assert read(path).language == (ENGLISH if path.parent == PACKS else path.parent.name)


@every_pack
def test_a_pack_is_large_and_varied_enough(path: Path) -> None:
    concept = read(path)
    assert len(concept.train) >= 50
    assert len(concept.validation) + len(concept.test) >= 40
    assert len(concept.malicious) >= 5
    assert len(concept.pairs) >= 5
    assert len({pair.aligned for pair in concept.pairs}) == len(concept.pairs)
    assert len({pair.violating for pair in concept.pairs}) == len(concept.pairs)
    assert len(concept.neutral_prompts) >= 8
    assert len(concept.neutral_system) >= 2


def test_dishonesty_has_the_papers_counts() -> None:
    """112 evaluation scenarios in 8 categories, and a pair of its own for every training scenario (A, section 4)."""
    concept = load_concept("dishonesty")
    evaluation = [*concept.validation, *concept.test]
    assert len(evaluation) == 112
    assert len({item.category for item in evaluation}) == 8
    assert all(item.aligned and item.violating for item in concept.train)
    assert len({item.aligned for item in concept.train}) == len(concept.train)
    assert len({item.violating for item in concept.train}) == len(concept.train)


@english_pack
def test_both_evaluation_splits_cover_every_category(name: str) -> None:
    concept = load_concept(name)
    splits = [{item.category for item in concept.scenarios(split)} for split in SPLITS]
    assert splits[0] == splits[1] == splits[2]


@every_pack
def test_no_scenario_stands_in_two_splits(path: Path) -> None:
    concept = read(path)
    every = [item for split in SPLITS for item in concept.scenarios(split)]
    assert len({item.id for item in every}) == len(every)
    assert len({plain(item.prompt) for item in every}) == len(every)


@every_pack
def test_malicious_prompts_are_held_out_from_fitting(path: Path) -> None:
    concept = read(path)
    malicious = {plain(text) for text in concept.malicious}
    assert len(malicious) == len(concept.malicious)
    assert not malicious & fitting_prompts(concept)
    assert not malicious & {plain(text) for text in concept.neutral_system}


@every_pack
def test_neutral_prompts_are_no_scenarios(path: Path) -> None:
    concept = read(path)
    asked = {plain(item.prompt) for split in SPLITS for item in concept.scenarios(split)}
    assert not asked & {plain(text) for text in concept.neutral_prompts}


@every_pack
def test_selection_never_sees_the_attacks_of_the_test(path: Path) -> None:
    concept = read(path)
    validation, test = concept.attacks("validation"), concept.attacks("test")
    assert not set(validation) & set(test)
    assert set(validation) | set(test) == set(concept.malicious)


@every_pack
@pytest.mark.parametrize("split", SPLITS)
def test_a_contrast_is_one_question_under_two_system_prompts(path: Path, split) -> None:
    concept = read(path)
    pairs = concept.contrastive(split)
    assert len(pairs) == len(concept.scenarios(split))
    for scenario, (aligned, violating) in zip(concept.scenarios(split), pairs, strict=True):
        assert [turn.role for turn in aligned.messages] == [turn.role for turn in violating.messages]
        assert aligned.messages[-1] == violating.messages[-1]
        assert aligned.messages[-1].content == scenario.prompt
        assert aligned.messages[0].content != violating.messages[0].content


def test_shared_pairs_are_cycled_and_a_scenarios_own_pair_comes_first() -> None:
    concept = load_concept("sycophancy")
    own = [item.aligned is not None for item in concept.train]
    assert any(own)
    assert not all(own)
    for index, (scenario, (aligned, violating)) in enumerate(zip(concept.train, concept.contrastive(), strict=True)):
        source = scenario if own[index] else concept.pairs[index % len(concept.pairs)]
        assert (aligned.messages[0].content, violating.messages[0].content) == (source.aligned, source.violating)


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    text = (PACKS / "hostility.yaml").read_text(encoding="utf-8")
    ours = load_concept("hostility").hash
    copy = tmp_path / "hostility.yaml"
    copy.write_text(f"# a comment\n{text}", encoding="utf-8")
    assert load_concept(copy).hash == ours
    copy.write_text(text.replace("title: ", "title: Other "), encoding="utf-8")
    assert load_concept(copy).hash != ours
    assert len({load_concept(name).hash for name in NAMES}) == len(NAMES)


def test_an_unknown_concept_gives_the_nearest_and_tells_of_files() -> None:
    with pytest.raises(UnknownNameError, match=r"concept \(english\) 'dishonest'.*'dishonesty'.*ends in \.yaml"):
        load_concept("dishonest")
    with pytest.raises(UnknownNameError, match=r"concept \(klingon\).*known: none"):
        load_concept("dishonesty", "klingon")
