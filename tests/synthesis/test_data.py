"""Filters count why, duplicates go, splits share nothing (checked exactly, by another way than they were made)."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from steerwell.core.errors import ArgumentError
from steerwell.synthesis.data import SPLITS, Split, keep, leaks, split, templates_of, unique
from steerwell.synthesis.examples import Example
from steerwell.synthesis.files import read_examples
from steerwell.synthesis.near import Near, jaccard, linked, normal, shingles, similar, words
from tests.conftest import SHARED

NAN = math.nan
VOCABULARY = [f"w{number}" for number in range(400)]


def text(rng: random.Random, length: int = 30) -> str:
    return " ".join(rng.choices(VOCABULARY, k=length))


def made(count: int, seed: int = 0, **fields: object) -> list[Example]:
    """Examples that share nothing, every fourth violating."""
    rng = random.Random(seed)
    return [replace(Example(text(rng), text(rng), int(i % 4 == 0)), **fields) for i in range(count)]


def altered(response: str, at: int) -> str:
    """One word of a text replaced: of 30 words, 3 of 28 shingles of three differ, so the similarity is 25 / 31."""
    found = response.split()
    return " ".join([*found[:at], "other", *found[at + 1 :]])


class TestKeep:
    def test_a_reason_for_every_one_that_falls(self) -> None:
        good = Example("p", "one two three", 1, success=0.9, coherence=0.9)
        fallen = [
            (replace(good, success=NAN), "success missing"),
            (replace(good, success=0.7), "success too low"),
            (replace(good, coherence=NAN), "coherence missing"),
            (replace(good, coherence=0.1), "coherence too low"),
            (replace(good, response="one"), "too short"),
            (replace(good, response="a " * 9), "too long"),
            (replace(good, success=0.1, coherence=0.1), "success too low"),
        ]
        kept = keep([good, *(one for one, _ in fallen)], success=0.8, coherence=0.5, words=(2, 8))
        assert kept.examples == [good]
        assert kept.dropped == Counter(reason for _, reason in fallen)

    def test_success_is_not_asked_of_benign_ones_and_bounds_are_inclusive(self) -> None:
        found = [Example("p", "r", 0, success=0.0, coherence=0.5), Example("p", "r", 1, success=0.5, coherence=0.5)]
        assert keep(found, success=0.5, coherence=0.5, words=(1, 1)).examples == found

    def test_nothing_asked_nothing_dropped(self) -> None:
        found = [Example("p", "", 1)]
        assert keep(found).examples == found
        assert not keep(found).dropped

    @pytest.mark.parametrize("asked", [{"success": 80}, {"coherence": -0.1}, {"words": (5, 2)}, {"success": NAN}])
    def test_a_limit_that_cannot_be_meant_is_refused(self, asked: dict[str, float]) -> None:
        with pytest.raises(ArgumentError, match=f"{next(iter(asked))}: got"):
            keep([], **asked)  # type: ignore[arg-type]


class TestNear:
    def test_by_hand(self) -> None:
        left, right = shingles("The cat sat on the mat.", 3), shingles("the CAT sat, on the rug", 3)
        assert left == {"the cat sat", "cat sat on", "sat on the", "on the mat"}
        assert jaccard(left, right) == 3 / 5

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("Don't STOP_it", ["don", "t", "stop", "it"]),
            ("", []),
            ("  🙂 !!", ["🙂", "!!"]),
            ("我不知道 ok", ["我", "不", "知", "道", "ok"]),
            ("Größe Ёлка", ["grösse", "ёлка"]),
        ],
    )
    def test_words_of_any_language(self, given: str, expected: list[str]) -> None:
        assert words(given) == expected

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.lists(st.sampled_from("abcde"), max_size=9), max_size=25), st.sampled_from([0.5, 0.8, 1.0]))
    def test_the_index_finds_what_comparing_all_finds(self, found: list[list[str]], threshold: float) -> None:
        sets = [shingles(" ".join(one), 2) for one in found]
        alike = [(a, b) for a, b in combinations(range(len(sets)), 2) if jaccard(sets[a], sets[b]) >= threshold]
        assert sorted(similar(sets, threshold)) == alike
        kept = set(range(len(sets))) - {later for _, later in similar(sets, threshold, first=True)}
        assert not any({a, b} <= kept for a, b in alike)
        joined = {frozenset(pair) for pair in linked(sets, threshold)}
        assert joined <= {frozenset(pair) for pair in alike}

    def test_what_cannot_be_meant_is_refused(self) -> None:
        for wrong in ({"threshold": 0}, {"threshold": 1.1}, {"threshold": NAN}, {"size": 0}, {"short": -1}):
            with pytest.raises(ArgumentError):
                Near(**wrong)


class TestUnique:
    def test_planted_copies_go_and_the_first_stays(self) -> None:
        found = made(20)
        copy = replace(found[3], prompt="another prompt", response=f"  {found[3].response.upper()}! ")
        almost = replace(found[5], prompt="yet another", response=altered(found[5].response, 10))
        far = replace(found[6], response=altered(altered(found[6].response, 10), 20))  # 22 / 34 < 0.8
        kept = unique([*found, copy, almost, far])
        assert kept.examples == [*found, far]
        assert kept.dropped == {"duplicate": 1, "near-duplicate": 1}

    def test_the_other_label_is_told_apart_and_may_stay(self) -> None:
        one = made(1)[0]
        found = [one, replace(one, label=0), replace(one, label=0, response=altered(one.response, 9))]
        assert unique(found).dropped == {
            "duplicate of the other label": 1,
            "near-duplicate of the other label": 1,
        }
        kept = unique(found, across=False)
        assert kept.examples == found[:2]
        assert kept.dropped == {"near-duplicate": 1}

    def test_without_near_only_equal_ones_go(self) -> None:
        one = made(1)[0]
        found = [one, replace(one, response=altered(one.response, 9)), one]
        assert unique(found, None).examples == found[:2]
        assert unique(found, Near(threshold=1)).examples == found[:2]

    def test_short_responses_count_with_their_prompts(self) -> None:
        rng = random.Random(1)
        long = text(rng)
        found = [
            Example("Is the sky blue?", "Yes.", 0),
            Example("Is grass green?", "Yes.", 0),  # another question: stays
            Example("is the sky blue", "yes", 0),  # the same exchange: goes
            Example("Is the sky blue?", "No.", 1),  # another answer: stays
            Example(long, "Never ever.", 1),
            Example(altered(long, 10), "Never ever.", 1),  # nearly the same exchange: goes
            Example(altered(long, 10), "Never.", 1),
            Example("", "Yes.", 0),
            Example("", "", 0),
            Example("", "?", 0),
        ]
        kept = unique(found)
        assert [found.index(one) for one in kept.examples] == [0, 1, 3, 4, 6, 7, 8, 9]
        assert kept.dropped == {"duplicate": 1, "near-duplicate": 1}

    def test_a_copy_of_a_dropped_one_goes_too(self) -> None:
        one = made(1)[0]
        almost = replace(one, response=altered(one.response, 9))
        assert unique([one, almost, almost, almost]).examples == [one]

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.lists(st.sampled_from("abc"), max_size=6), st.booleans()), max_size=15))
    def test_what_is_left_has_no_near_duplicate_and_stays_as_it_is(self, drawn: list[tuple[list[str], bool]]) -> None:
        found = [Example("", " ".join(letters), int(label)) for letters, label in drawn]
        near = Near(0.6, size=2, short=0)
        kept = unique(found, near)
        sets = [shingles(one.response, 2) for one in kept.examples]
        assert all(jaccard(a, b) < 0.6 for a, b in combinations(sets, 2))
        assert len(found) == len(kept.examples) + sum(kept.dropped.values())
        assert unique(kept.examples, near).examples == kept.examples


def shown(parts: dict[Split, list[Example]]) -> list[int]:
    return [len(parts[name]) for name in SPLITS]


class TestSplit:
    def test_free_examples_meet_the_shares_in_both_labels(self) -> None:
        found = made(400)
        parts = split(found, (0.7, 0.1, 0.2), seed=3)
        assert shown(parts) == [280, 40, 80]
        assert [sum(one.label for one in parts[name]) for name in SPLITS] == [70, 10, 20]
        position = {one.response: number for number, one in enumerate(found)}
        for part in parts.values():
            assert [position[one.response] for one in part] == sorted(position[one.response] for one in part)

    def test_the_seed_decides_and_nothing_else_does(self) -> None:
        found = made(60)
        assert split(found, seed=1) == split(found, seed=1)
        assert split(found, seed=1) != split(found, seed=2)

    @pytest.mark.parametrize(
        "planted",
        [
            lambda one, rng: replace(one, response=text(rng), label=1 - one.label),  # the same prompt
            lambda one, rng: replace(one, prompt=one.prompt.upper() + "?!", response=text(rng)),
            lambda one, rng: Example(text(rng), text(rng), 1, template=one.template),
            lambda one, rng: Example(text(rng), altered(one.response, 15), 1),
            lambda one, rng: Example(altered(one.prompt, 15), text(rng), 0),
        ],
    )
    def test_a_planted_pair_stays_together_and_apart_it_is_a_leak(self, planted) -> None:
        rng = random.Random(5)
        found = [replace(one, template=f"t{number}") for number, one in enumerate(made(60))]
        pairs = [(one, planted(one, rng)) for one in found[:20]]
        for seed in range(3):
            parts = split([*found, *(other for _, other in pairs)], seed=seed, guess=False)
            assert leaks(parts["train"], parts["validation"], parts["test"]) == []
            for one, other in pairs:
                assert [one in part for part in parts.values()] == [other in part for part in parts.values()]
        one, other = pairs[0]
        assert len(leaks(found[1:], [], [one])) == 0
        assert "train and test share 1 " in "".join(leaks([*found[1:], other], [], [one]))
        assert "validation and test share 1 " in "".join(leaks([], [other], [one]))

    def test_a_chain_of_links_is_followed(self) -> None:
        rng = random.Random(2)
        a = Example(text(rng), text(rng), 0, template="a")
        b = replace(a, prompt=text(rng), response=text(rng))  # by template
        c = replace(b, response=text(rng), template="c")  # by prompt
        d = Example(text(rng), altered(c.response, 4), 1, template="d")  # by response
        for seed in range(5):
            parts = split([a, b, c, d, *made(40)], seed=seed)
            assert sorted(sum(one in part for one in (a, b, c, d)) for part in parts.values()) == [0, 0, 4]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(st.data())
    def test_never_a_leak(self, data: st.DataObject) -> None:
        rng = random.Random(data.draw(st.integers(0, 10**6)))
        pool = [text(rng, length) for length in (1, 2, 5, 9, 12, 30, 30)]
        pool += [altered(one, 4) for one in pool[3:]]
        name = st.sampled_from(["", "", "", *"abcdefgh"])
        fresh = st.sampled_from(["old", "new", "new", "new"])
        found = []
        for _ in range(data.draw(st.integers(12, 40))):
            prompt, response = (rng.choice(pool) if data.draw(fresh) == "old" else text(rng) for _ in range(2))
            found.append(Example(prompt, response, rng.randrange(2), template=data.draw(name)))
        near = data.draw(st.sampled_from([Near(), Near(0.6, 2, 3), None]))
        shares = data.draw(st.sampled_from([(0.6, 0.2, 0.2), (0.5, 0.0, 0.5), (0.34, 0.33, 0.33)]))
        try:
            parts = split(found, shares, seed=data.draw(st.integers(0, 3)), near=near)
        except ArgumentError:
            reject()  # the groups are too large, which other tests are about
        assert leaks(parts["train"], parts["validation"], parts["test"], near=near) == []
        bare = Counter((one.prompt, one.response, one.label) for part in parts.values() for one in part)
        assert bare == Counter((one.prompt, one.response, one.label) for one in found)
        assert all(len(parts[part]) >= share * len(found) / 2 for part, share in zip(SPLITS, shares, strict=True))

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda i, rng: Example("same prompt", text(rng), i % 2), "equal prompts join 40, such as 'same prompt'"),
            (lambda i, rng: Example(text(rng), text(rng), i % 2, template="t"), "equal templates join 40.*guess=False"),
            (lambda i, rng: Example(altered(LONG, i % 30), text(rng), i % 2), "near-duplicate prompts join 40"),
            (lambda i, rng: Example(text(rng), altered(LONG, i % 30), i % 2), "near-duplicate responses join 40.*uniq"),
        ],
    )
    def test_one_group_of_all_is_an_error_that_names_the_cause(self, make, told: str) -> None:
        rng = random.Random(0)
        with pytest.raises(ArgumentError, match=f"validation would hold 0 instead of about 4.*{told}"):
            split([make(i, rng) for i in range(40)], near=Near(0.6), guess=False)

    def test_a_label_in_one_group_only_is_an_error(self) -> None:
        found = [replace(one, template="bad" if one.label else "") for one in made(80)]
        with pytest.raises(ArgumentError, match=r"would hold no violating example.*equal templates join 20"):
            split(found)

    def test_too_few_examples_are_told(self) -> None:
        with pytest.raises(ArgumentError, match=r"examples: 2 cannot be split.*give more examples"):
            split(made(2))
        with pytest.raises(ArgumentError, match="examples: 0 cannot be split"):
            split([])
        assert shown(split(made(2), (1.0, 0.0, 0.0))) == [2, 0, 0]

    @pytest.mark.parametrize("shares", [(0.8, 0.1), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (NAN, 0.5, 0.5)])
    def test_shares_that_are_none_are_refused(self, shares: tuple[float, ...]) -> None:
        with pytest.raises(ArgumentError, match="shares: got"):
            split(made(10), shares)  # type: ignore[arg-type]

    def test_guessed_templates_keep_prompts_together_and_are_recorded(self) -> None:
        rng = random.Random(0)
        frames = [f"{' '.join(VOCABULARY[8 * i : 8 * i + 4])} {{}} {VOCABULARY[8 * i + 5]}?" for i in range(30)]
        found = [Example(one.format(VOCABULARY[-j]), text(rng), j % 2) for one in frames for j in range(1, 5)]
        parts = split(found, (0.5, 0.25, 0.25))
        where = {one.prompt.split()[0]: name for name, part in parts.items() for one in part}
        assert len(where) == 30
        for name, part in parts.items():
            assert {where[one.prompt.split()[0]] for one in part} == {name}
            assert all(one.template for one in part)
        free = split(found, (0.5, 0.25, 0.25), guess=False, near=None)
        assert [one.template for part in free.values() for one in part] == [""] * 120
        assert len({(one.prompt.split()[0], name) for name, part in free.items() for one in part}) > 30


LONG = text(random.Random(99))


class TestLeaks:
    def test_of_empty_splits_and_texts(self) -> None:
        assert leaks([], [], []) == []
        assert leaks([Example("", "", 0)], [Example("", "", 1)], []) == [
            "train and validation share 1 near-duplicate responses, such as ''"
        ]

    def test_counts_every_pair_and_near_may_be_left_out(self) -> None:
        found = made(6)
        others = [Example("q", altered(one.response, 3), 0) for one in found[:3]]
        told = leaks(found, others, [found[0]])
        assert told[0] == "train and validation share 3 near-duplicate responses, such as " + repr(
            found[0].response[:60]
        )
        assert [line.split(", such")[0] for line in told[1:]] == [
            "train and test share 1 prompts",
            "train and test share 1 near-duplicate prompts",
            "train and test share 1 near-duplicate responses",
            "validation and test share 1 near-duplicate responses",
        ]
        assert leaks(found, others, [], near=None) == []

    def test_the_threshold_is_met_exactly(self) -> None:
        one = made(1)[0]
        other = Example("q", altered(one.response, 15), 0)
        at = 25 / 31
        assert leaks([one], [other], [], near=Near(at)) != []
        assert leaks([one], [other], [], near=Near(float(np.nextafter(at, 1)))) == []


class TestTemplates:
    THINGS = ("wine", "green tea", "raw fish", "horses", "the night train")
    FRAMES = (
        "Is it true that {} can be bad for me?",
        "Please write a short note about {}.",
        "My friend likes {}. Tell me why.",
    )

    def test_planted_templates_are_found_and_kept_apart(self) -> None:
        prompts = [frame.format(thing) for frame in self.FRAMES for thing in self.THINGS]
        found = templates_of(prompts)
        assert len(set(found)) == 3
        assert [len(set(found[5 * i : 5 * i + 5])) for i in range(3)] == [1, 1, 1]

    def test_names_and_numbers_are_slots(self) -> None:
        prompts = [
            "How far is it from Rome to Oslo in 2020?",
            "How far is it from New York to Cape Town in 1999?",
            "How far is my house from yours?",
        ]
        found = templates_of(prompts)
        assert found[0] == found[1] == "how far is it from _ to _ in _ ?"
        assert found[2] == "how far is my house from yours ?"

    def test_little_in_common_is_no_template(self) -> None:
        prompts = ["What is love?", "What is a good name for my cat?", "WHAT IS THE TIME", "What Are Birds", "", "🙂"]
        found = templates_of(prompts)
        assert len(set(found)) == len(prompts)
        assert found[4] == ""

    def test_equal_prompts_get_one_name_in_any_order(self) -> None:
        prompts = ["Tell me a joke.", "Where do I live?", "tell me a JOKE."]
        assert templates_of(prompts) == ["tell me a joke .", "where do i live ?", "tell me a joke ."]
        assert templates_of([]) == []

    def test_natural_prompts_stay_apart(self) -> None:
        path = SHARED / "halueval" / "general_data.json"
        if not path.is_file():
            pytest.skip("HaluEval is not at hand")
        found = read_examples(path, text_col="chatgpt_response", label_col="hallucination", prompt_col="user_query")
        names = Counter(templates_of([one.prompt for one in found]))
        assert len(names) > 4000
        assert max(names.values()) < 45  # a hundredth of them


def test_halueval_splits_without_a_leak() -> None:
    path = SHARED / "halueval" / "general_data.json"
    if not path.is_file():
        pytest.skip("HaluEval is not at hand")
    found = read_examples(path, text_col="chatgpt_response", label_col="hallucination", prompt_col="user_query")
    parts = split(found, (0.6, 0.1, 0.3), seed=1)
    assert shown(parts) == [2704, 451, 1352]
    assert [sum(one.label for one in part) for part in parts.values()] == [489, 82, 244]
    assert leaks(parts["train"], parts["validation"], parts["test"]) == []
    assert normal(found[0].prompt) == "produce a list of common words in the english language"
