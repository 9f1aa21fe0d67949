"""Conversations on the fake engine: who is asked what, with which seed and edit, and what ends one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from steerwell.concepts import load_concept
from steerwell.concepts.schema import Scenario
from steerwell.core.errors import ArgumentError, ModelMismatchError, UnknownNameError
from steerwell.core.records import Edit, EditTerm, Message, Prompt, Response, Sampling
from steerwell.engines.fake import FakeEngine
from steerwell.scoring.judges.exact import ExactJudge
from steerwell.scoring.metrics.repetition import repetition
from steerwell.studies.conversation import (
    MEASURES,
    Conversation,
    ModelUsers,
    ScriptedUsers,
    converse,
    curve,
    echo,
    generate_each,
    openings,
    turn_rows,
)
from steerwell.studies.defence import attack_prompts, measure
from tests.made import direction
from tests.sweep_run import LetterJudge

WARM = Sampling(temperature=0.9, max_new_tokens=8, seed=7)
CONCEPT = load_concept("hostility")
SYSTEMS = ("Be rude.", "Lie.")
SCENARIOS = [Scenario(id=f"q{number}", category="made", prompt=f"Why {number}?") for number in range(12)]
USERS = ScriptedUsers(SCENARIOS)


def edit(layer: int = 1, offset: float = 3.0, d_model: int = 16) -> Edit:
    vector = np.random.default_rng(layer).normal(size=d_model)
    return Edit((EditTerm(layer, (vector / np.linalg.norm(vector)).astype(np.float32), math.inf, offset, 0.0),))


class Counting(FakeEngine):
    """Remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[Prompt], list[Sampling], list[Edit | None]]] = []

    def generate(self, prompts, sampling=WARM, edits=None, *, progress=None) -> list[Response]:
        answers = super().generate(prompts, sampling, edits)
        self.calls.append((list(prompts), list(sampling), list(edits)))
        return answers


class Narrow(Counting):
    """Takes prompts of so many characters at most, and lets answers fill what is left."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.attempts = room, 0

    def generate(self, prompts, sampling=WARM, edits=None, *, progress=None) -> list[Response]:
        self.attempts += 1
        left = [self.room - len(str([turn.content for turn in prompt.messages])) for prompt in prompts]
        if min(left) < 1:
            raise ArgumentError(f"prompt: {self.room - min(left)} characters do not fit; shorten it")
        short = [replace(how, max_new_tokens=min(how.max_new_tokens, room))
                 for how, room in zip(sampling, left, strict=True)]  # fmt: skip
        answers = super().generate(prompts, short, edits)
        return [replace(answer, sampling=how) for answer, how in zip(answers, sampling, strict=True)]


def texts(conversations: Sequence[Conversation]) -> list[list[tuple[str, str]]]:
    return [item.exchanges for item in conversations]


# Turns in lockstep


def test_a_turn_is_one_call_with_every_rows_own_edit() -> None:
    engine, steered = Counting(), edit()
    begun = openings(3, SYSTEMS, {"attacked": None, "steered": steered})
    assert [(item.condition, item.number) for item in begun] == [
        (name, number) for name in ("attacked", "steered") for number in range(3)
    ]
    finished = converse(engine, USERS, begun, 4, WARM)
    assert [len(prompts) for prompts, _, _ in engine.calls] == [6] * 4
    assert all(len(item.answers) == 4 and item.ended is None for item in finished)
    assert [answer.receipt.edit_id for answer in finished[4].answers] == [steered.id] * 4
    assert [answer.receipt for answer in finished[1].answers] == [None] * 4
    assert texts(finished[:3]) != texts(finished[3:])


def test_each_prompt_holds_the_whole_conversation() -> None:
    (item,) = converse(FakeEngine(), USERS, openings(1, ["Be rude."], {"": None}), 3, WARM)
    asked = [scenario.prompt for scenario in SCENARIOS[:3]]
    first, second, third = item.answers
    assert third.prompt.messages == (
        Message("system", "Be rude."),
        Message("user", asked[0]),
        Message("assistant", first.text),
        Message("user", asked[1]),
        Message("assistant", second.text),
        Message("user", asked[2]),
    )
    assert item.exchanges == list(zip(asked, [first.text, second.text, third.text], strict=True))
    (bare,) = converse(FakeEngine(), USERS, openings(1, [""], {"": None}), 1, WARM)
    assert bare.answers[0].prompt == Prompt.chat(asked[0])


@pytest.mark.parametrize("history", [0, 1, 2])
def test_a_short_history_shows_the_last_exchanges_alone(history: int) -> None:
    begun = openings(1, ["Hm."], {"a": None})
    (grown,) = converse(FakeEngine(), USERS, begun, 4, WARM, history=history)
    prompt = grown.answers[3].prompt.messages
    assert [turn.role for turn in prompt] == ["system", *["user", "assistant"] * history, "user"]
    seen = [turn.content for turn in prompt[1:-1]]
    assert seen == [text for pair in grown.exchanges[3 - history : 3] for text in pair]
    assert len(grown.exchanges) == 4


def test_first_turns_are_the_single_turn_study() -> None:
    steered, users = edit(), ScriptedUsers(CONCEPT.scenarios("test"))
    begun = openings(3, CONCEPT.attacks("test"), {"a": None, "b": steered})
    finished = converse(FakeEngine(), users, begun, 1, WARM)
    outcomes = measure(FakeEngine(), LetterJudge(), CONCEPT, attack_prompts(CONCEPT, "test", 3), [None, steered], WARM)
    assert [item.answers[0] for item in finished] == [answer for each in outcomes for answer in each.responses]


def test_seeds_differ_between_turns_and_conversations_and_agree_between_conditions() -> None:
    finished = converse(FakeEngine(), USERS, openings(4, SYSTEMS, {"a": None, "b": edit(), "c": None}), 4, WARM)
    seeds = [[answer.sampling.seed for answer in item.answers] for item in finished]
    assert seeds[:4] == seeds[4:8] == seeds[8:]
    assert len({seed for row in seeds[:4] for seed in row}) == 16
    assert texts(finished[:4]) == texts(finished[8:])


def test_together_is_alone_and_a_conversation_can_be_carried_on() -> None:
    begun = openings(3, SYSTEMS, {"a": None, "b": edit()})
    together = converse(FakeEngine(), USERS, begun, 4, WARM)
    alone = [converse(FakeEngine(), USERS, [item], 4, WARM)[0] for item in begun]
    assert together == alone
    half = converse(FakeEngine(), USERS, begun[:4], 2, WARM)
    assert converse(FakeEngine(), USERS, [*half, *begun[4:]], 4, WARM) == together
    assert converse(FakeEngine(), USERS, together, 3, WARM) == together  # has more turns already


def test_progress_counts_turns() -> None:
    done: list[int] = []
    converse(FakeEngine(), USERS, openings(3, SYSTEMS, {"a": None}), 2, WARM, progress=done.append)
    assert done == [3, 3]


# Users


@given(st.integers(0, 200), st.integers(1, 12), st.integers(1, 15))
def test_scripted_users_ask_consecutive_scenarios_and_none_twice_while_there_are_enough(
    number: int, count: int, turns: int
) -> None:
    users = ScriptedUsers(SCENARIOS[:count])
    prompts = [scenario.prompt for scenario in SCENARIOS[:count]]
    answer = Response(Prompt.chat("x"), "y", (1,), "stop", WARM)
    asked = [users.next_messages([Conversation(number, "", answers=(answer,) * turn)])[0] for turn in range(turns)]
    assert asked == [prompts[(number + turn) % count] for turn in range(turns)]
    assert len(set(asked)) == min(turns, count)


def test_with_as_many_conversations_as_scenarios_every_turn_asks_all_of_them() -> None:
    finished = converse(FakeEngine(), ScriptedUsers(SCENARIOS[:4]), openings(4, SYSTEMS, {"": None}), 6, WARM)
    for turn in range(6):
        assert sorted(item.exchanges[turn][0] for item in finished) == sorted(each.prompt for each in SCENARIOS[:4])


def test_a_model_plays_the_user_with_roles_swapped() -> None:
    player = Counting()
    users = ModelUsers(player, SCENARIOS, "You are a customer.", replace(WARM, seed=90))
    finished = converse(FakeEngine(seed=1), users, openings(2, SYSTEMS, {"a": None, "b": None}), 3, WARM)
    assert len(player.calls) == 2  # it says nothing on the first turn
    assert [row[0][0] for row in texts(finished)] == [SCENARIOS[number].prompt for number in (0, 1, 0, 1)]
    item = finished[1]
    last = users.asked(replace(item, answers=item.answers[:2]))
    assert last.messages == (
        Message("system", "You are a customer."),
        Message("user", "Begin the conversation."),
        Message("assistant", SCENARIOS[1].prompt),
        Message("user", item.answers[0].text),
        Message("assistant", item.exchanges[1][0]),
        Message("user", item.answers[1].text),
    )
    how = replace(WARM, seed=item.answers[2].sampling.seed + 90 - WARM.seed)
    assert FakeEngine().generate([last], how)[0].text == item.exchanges[2][0]
    assert texts(finished[:2]) == texts(finished[2:])  # equal conditions meet equal users
    assert all(edits == [None] * 4 for _, _, edits in player.calls)


# What ends a conversation


class Talkative:
    """Says one letter, but as user 1 a hundred."""

    def next_messages(self, conversations: Sequence[Conversation]) -> list[str]:
        return ["b" * 100 if item.number == 1 else "a" for item in conversations]


@pytest.mark.parametrize("room", [400, 410, 420])
def test_a_conversation_that_no_longer_fits_ends_and_loses_nobody_else(room: int) -> None:
    """What was said fits as in an engine without limit; user 1's conversations end, the others do not."""
    begun = openings(4, ["Hm."], {"a": None, "b": edit()})
    finished = converse(Narrow(room), Talkative(), begun, 6, WARM)
    for got, expected in zip(finished, converse(FakeEngine(), Talkative(), begun, 6, WARM), strict=True):
        reached = len(got.answers)
        assert got.answers == expected.answers[:reached]
        assert 1 <= reached < 4 if got.number == 1 else reached == 6
        assert (got.ended is None) == (got.number != 1)


def test_a_conversation_says_why_it_ended() -> None:
    def ended(room: int) -> tuple[int, str | None]:
        (item,) = converse(Narrow(room), Talkative(), [Conversation(1, "")], 2, WARM)
        return len(item.answers), item.ended

    (whole,) = converse(FakeEngine(), Talkative(), [Conversation(1, "")], 2, WARM)
    used = len(str([turn.content for turn in whole.answers[1].prompt.messages]))
    assert ended(used + WARM.max_new_tokens) == (2, None)
    assert ended(used + 3) == (1, "the context cut its answer short at 3 tokens")
    assert ended(used) == (1, "prompt: 0 characters do not fit; shorten it".replace("0", str(used)))


def test_a_short_answer_that_ended_by_itself_counts() -> None:
    (free,) = converse(FakeEngine(), Talkative(), [Conversation(0, "")], 1, WARM)
    stopping = replace(WARM, stop=(free.answers[0].text[2],))
    (item,) = converse(FakeEngine(), Talkative(), [Conversation(0, "")], 1, stopping)
    assert (len(item.answers), item.ended) == (1, None)
    assert len(item.answers[0].token_ids) < WARM.max_new_tokens


def test_a_prompt_that_never_fitted_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="do not fit"):
        converse(Narrow(50), Talkative(), openings(2, ["Hm."], {"a": None}), 3, WARM)


def test_an_edit_of_another_model_is_an_error_and_no_end() -> None:
    begun = openings(2, ["Hm."], {"a": None})
    begun = converse(FakeEngine(), USERS, begun, 1, WARM)
    strange = [replace(item, edit=Edit((EditTerm(0, direction().vectors[0], math.inf, 1.0, 0.0),))) for item in begun]
    with pytest.raises(ModelMismatchError):
        converse(FakeEngine(), USERS, strange, 2, WARM)


def test_refused_prompts_are_found_in_few_calls() -> None:
    """Refused rows lie together by length: at most two calls per halving for each end of their run."""
    lengths = [10 + (row * 37) % 64 for row in range(64)]
    prompts = [Prompt.chat("x" * length) for length in lengths]
    engine = Narrow(60)
    replies = generate_each(engine, prompts, [WARM] * 64, [None] * 64)
    fits = [len(str(["x" * length])) < 60 for length in lengths]
    assert [isinstance(reply, Response) for reply in replies] == fits
    assert [reply.prompt for reply in replies if isinstance(reply, Response)] == [
        prompt for prompt, fit in zip(prompts, fits, strict=True) if fit
    ]
    assert 0 < fits.count(False) < 64
    assert len(engine.calls) <= math.log2(64)
    assert generate_each(engine, [], [], []) == []


def test_a_user_who_falls_silent_or_cannot_go_on_ends_the_conversation() -> None:
    class Fickle:
        def next_messages(self, conversations: Sequence[Conversation]) -> list[str | ArgumentError]:
            return [
                "a" if len(item.answers) < 2 else (" ", ArgumentError("too long"), "b")[item.number]
                for item in conversations
            ]

    finished = converse(FakeEngine(), Fickle(), openings(3, ["Hm."], {"a": None}), 4, WARM)
    assert [(len(item.answers), item.ended) for item in finished] == [
        (2, "the user said nothing"),
        (2, "too long"),
        (4, None),
    ]


def test_a_player_out_of_room_ends_its_conversations() -> None:
    users = ModelUsers(Narrow(250), SCENARIOS, "Play.", WARM)
    finished = converse(FakeEngine(), users, openings(2, ["Hm."], {"a": None}), 30, WARM)
    assert all(1 < len(item.answers) < 30 for item in finished)
    assert all("do not fit" in item.ended for item in finished)


def test_wrong_arguments_are_named() -> None:
    begun = openings(1, ["Hm."], {"a": None})

    class Few:
        def next_messages(self, conversations: Sequence[Conversation]) -> list[str]:
            return []

    with pytest.raises(ArgumentError, match="turns, history: got 0, None"):
        converse(FakeEngine(), USERS, begun, 0, WARM)
    with pytest.raises(ArgumentError, match="turns, history: got 1, -1"):
        converse(FakeEngine(), USERS, begun, 1, WARM, history=-1)
    with pytest.raises(ArgumentError, match="users: got 0 messages for 1 conversations"):
        converse(FakeEngine(), Few(), begun, 1, WARM)
    with pytest.raises(ArgumentError, match="count, systems: got 0, 1"):
        openings(0, ["Hm."], {"a": None})
    with pytest.raises(ArgumentError, match="count, systems: got 1, 0"):
        openings(1, [], {"a": None})
    for make in (lambda: ScriptedUsers([]), lambda: ModelUsers(FakeEngine(), [], "Play.", WARM)):
        with pytest.raises(ArgumentError, match="scenarios: got none"):
            make()


# Rows and curves


def test_echo_is_the_share_of_grams_said_before() -> None:
    assert echo([1, 2, 3, 4, 5], [[9, 1, 2, 3], [3, 4, 5]]) == pytest.approx(2 / 3)  # 123 and 345 of 123, 234, 345
    assert echo([1, 1, 1, 1, 2], [[1, 1, 1]]) == pytest.approx(2 / 3)  # each occurrence counts
    assert echo([1, 2, 3], [[3, 2, 1]]) == 0
    assert math.isnan(echo([1, 2, 3], [[1, 2], [3]]))
    assert math.isnan(echo([1, 2], [[1, 2, 3]]))
    assert math.isnan(echo([1, 2, 3], []))
    assert echo([1, 2, 3, 9, 9, 9], [[9, 9, 9]], first=3) == 0
    assert echo([9, 9, 9], [[1, 2, 3, 9, 9, 9]], first=3) == 0


def test_rows_hold_what_was_said_and_measured() -> None:
    steered, turns = edit(), 4
    begun = openings(2, SYSTEMS, {"a": None, "b": steered})
    finished = converse(FakeEngine(), USERS, begun, turns, WARM)
    rows = turn_rows(LetterJudge(), CONCEPT, finished, turns)
    assert [(row["condition"], row["conversation"], row["turn"]) for row in rows] == [
        (name, number, turn) for name in "ab" for number in range(2) for turn in range(turns)
    ]
    assert json.loads(json.dumps(rows[1:4])) == rows[1:4]
    row, item = rows[2 * turns + turns + 2], finished[3]
    answer = item.answers[2]
    (verdict,) = LetterJudge().score_many(CONCEPT, [item.exchanges[2]])
    assert row == {
        "condition": "b",
        "conversation": 1,
        "turn": 2,
        "user": SCENARIOS[3].prompt,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "ended": None,
        "tokens": len(answer.token_ids),
        "trait": verdict.trait,
        "coherence": verdict.coherence,
        "repetition": repetition(answer.token_ids),
        "echo": echo(answer.token_ids, [earlier.token_ids for earlier in item.answers[:2]]),
        "gate_rate": answer.receipt.gate_rate,
        "perturbation": pytest.approx(3.0),
    }
    assert {(row["gate_rate"], row["perturbation"]) for row in rows[: 2 * turns]} == {(0.0, 0.0)}
    assert all(math.isnan(row["echo"]) == (row["turn"] == 0) for row in rows)
    shorter = turn_rows(LetterJudge(), CONCEPT, finished, 2)
    assert [row["answer"] for row in shorter] == [row["answer"] for row in rows if row["turn"] < 2]


def test_turns_that_were_not_reached_are_missing_and_never_zero() -> None:
    begun = openings(3, ["Hm."], {"a": None, "b": None})
    finished = converse(Narrow(400), Talkative(), begun, 6, WARM)
    rows = turn_rows(LetterJudge(), CONCEPT, finished, 6)
    assert len(rows) == 36
    for row in rows:
        item = finished[3 * (row["condition"] == "b") + row["conversation"]]
        reached = row["turn"] < len(item.answers)
        assert [math.isnan(row[name]) for name in MEASURES if name not in ("repetition", "echo")] == [not reached] * 5
        assert (row["user"] is None) == (row["answer"] is None) == (row["finish_reason"] is None) == (not reached)
        assert row["ended"] == (None if reached else item.ended)
    assert any(row["ended"] for row in rows)


def test_a_curve_leaves_missing_turns_out() -> None:
    nan = math.nan
    values = {"a": [[10, 5, nan, nan], [30, nan, nan, 8]], "b": [[1, 2, 3, 4]]}
    rows = [
        {"condition": condition, "conversation": number, "turn": turn, "trait": value}
        for condition, conversations in values.items()
        for number, conversation in enumerate(conversations)
        for turn, value in enumerate(conversation)
    ]
    assert_array_equal(curve(rows, "trait", "a"), [20, 5, nan, 8])
    assert_array_equal(curve(rows, "trait", "b"), [1, 2, 3, 4])
    with pytest.raises(UnknownNameError, match=r"unknown measure 'traits'.*Did you mean 'trait'"):
        curve(rows, "traits", "a")
    with pytest.raises(UnknownNameError, match=r"unknown condition 'c'; known: a, b"):
        curve(rows, "trait", "c")


# The bundled model


def test_on_the_bundled_model_together_is_alone_and_the_context_ends_a_conversation(pilot) -> None:
    """Greedy. The crowded conversation's system prompt leaves room for a turn or two."""
    concept = load_concept("dishonesty", pilot.info.language)
    steered = edit(2, 12.0, pilot.info.d_model)
    users, greedy = ScriptedUsers(concept.scenarios("validation")), Sampling(max_new_tokens=24)
    begun = openings(2, concept.neutral_system, {"plain": None, "steered": steered})
    begun.append(Conversation(0, "You are a helpful assistant. " * 163, "crowded"))
    together = converse(pilot, users, begun, 3, greedy)
    assert texts(together[:4]) == [converse(pilot, users, [item], 3, greedy)[0].exchanges for item in begun[:4]]
    assert texts(together[:2]) != texts(together[2:4])
    assert [len(item.answers) for item in together[:4]] == [3] * 4
    assert 1 <= len(together[4].answers) < 3
    assert together[4].ended
    rows = turn_rows(ExactJudge(), concept, together, 3)
    assert curve(rows, "coherence", "plain")[0] > 0
    assert math.isnan(curve(rows, "tokens", "crowded")[-1])
