"""Conversations over several turns: does steering last, and does the model begin to repeat itself?

arXiv 2604.08169 looks at 5 and 10 turns. All conversations under all conditions take each turn together, in one engine
call whose rows are steered differently; scores and measures come out one row per turn.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from steerwell.concepts import Concept
from steerwell.concepts.schema import Scenario
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import Edit, Message, Prompt, Response, Sampling, Verdict
from steerwell.engines.base import Engine
from steerwell.runs.ledger import Row
from steerwell.scoring.judges.base import Judge, verdicts
from steerwell.scoring.metrics import FIRST, Values
from steerwell.scoring.metrics.repetition import GRAM, repetition
from steerwell.studies.defence import mean_score
from steerwell.studies.fitting import Progress

SEEDS_PER_TURN = 1_000_000  # far more than there are conversations, so that no two turns share a seed
MEASURES = ("tokens", "trait", "coherence", "repetition", "echo", "gate_rate", "perturbation")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation so far; without answers it is one that shall begin.

    Attributes:
        number: which one; it decides what a user says and the seeds, so it means the same under every condition.
        system: the tested model's system prompt; "" is none.
        condition: what the condition is called.
        edit: how the tested model is steered, on every turn; None: not.
        answers: the model's answers, oldest first; the prompt of each holds what the model saw.
        ended: why it cannot go on; None: it can.
    """

    number: int
    system: str
    condition: str = ""
    edit: Edit | None = None
    answers: tuple[Response, ...] = ()
    ended: str | None = None

    def asked(self, message: str, history: int | None = None) -> Prompt:
        """What the model is asked next: what was said so far (the last `history` exchanges of it), a new message."""
        known = self.exchanges if history is None else self.exchanges[max(0, len(self.answers) - history) :]
        turns = [turn for user, answer in known for turn in (Message("user", user), Message("assistant", answer))]
        first, last = Prompt.chat(message, self.system).messages[:-1], Message("user", message)
        return Prompt(messages=(*first, *turns, last))

    @property
    def exchanges(self) -> list[tuple[str, str]]:
        """(user message, answer) of every turn."""
        return [(answer.prompt.messages[-1].content, answer.text) for answer in self.answers]

    def drawn(self, sampling: Sampling) -> Sampling:
        """How its next turn is drawn; on the first, number i has seed + i, as scenario i of a single-turn study."""
        return replace(sampling, seed=sampling.seed + self.number + SEEDS_PER_TURN * len(self.answers))


class Users(Protocol):
    """Whoever talks to the tested model."""

    def next_messages(self, conversations: Sequence[Conversation]) -> Sequence[str | ArgumentError]:
        """The next user message of every conversation. A blank one, or an error in its place, ends that conversation.

        It may look at `number` and `exchanges` alone, or conditions would differ in more than what they are.
        """
        ...


@dataclass(frozen=True, slots=True)
class ScriptedUsers:
    """Users who go through scenarios whatever the model answers: turn t of conversation i is scenario i + t, wrapping.

    No scenario comes twice in a conversation while there are enough. With as many conversations as scenarios, every
    turn asks all of them, so turns differ in nothing but their place.

    Attributes:
        scenarios: `concept.scenarios("test")` or some of them.
    """

    scenarios: Sequence[Scenario]

    def __post_init__(self) -> None:
        _require_scenarios(self.scenarios)

    def next_messages(self, conversations: Sequence[Conversation]) -> list[str]:
        """The prompt of every conversation's next scenario."""
        return [_scenario(self.scenarios, item.number + len(item.answers)) for item in conversations]


@dataclass(frozen=True, slots=True)
class ModelUsers:
    """Users played by a second model, which sees the roles swapped: its own messages are the assistant's.

    Conversation i begins with scenario i's prompt. Templates want a user turn first, so `begin` stands before it.

    Attributes:
        engine: the model that plays them; it is not steered.
        scenarios: where the opening messages come from.
        system: tells the model which user to play, and to write that user's next message only.
        sampling: how messages are drawn; seeds go by conversation and turn, as the answers' do.
        begin: what asks the model for its first message.
    """

    engine: Engine
    scenarios: Sequence[Scenario]
    system: str
    sampling: Sampling
    begin: str = "Begin the conversation."

    def __post_init__(self) -> None:
        _require_scenarios(self.scenarios)

    def next_messages(self, conversations: Sequence[Conversation]) -> list[str | ArgumentError]:
        """The opening scenarios, and what the model says in the conversations that have begun, in one engine call."""
        messages: list[str | ArgumentError] = [_scenario(self.scenarios, item.number) for item in conversations]
        begun = [index for index, item in enumerate(conversations) if item.answers]
        rows = [conversations[index] for index in begun]
        drawn = [item.drawn(self.sampling) for item in rows]
        said = generate_each(self.engine, [self.asked(item) for item in rows], drawn, [None] * len(rows))
        for index, reply in zip(begun, said, strict=True):
            messages[index] = reply.text if isinstance(reply, Response) else reply
        return messages

    def asked(self, conversation: Conversation) -> Prompt:
        """What the model that plays the user is asked."""
        swapped = [
            turn
            for message, answer in conversation.exchanges
            for turn in (Message("assistant", message), Message("user", answer))
        ]
        return Prompt(messages=(*Prompt.chat(self.begin, self.system).messages, *swapped))


def openings(count: int, systems: Sequence[str], edits: Mapping[str, Edit | None]) -> list[Conversation]:
    """Conversations 0 to `count - 1` under every edit (by the condition's name), the first edit's first.

    System prompts are used in turn, as in `steerwell.studies.defence.attack_prompts`. Lists for other system prompts
    can be joined to this one, so that the unattacked baseline takes its turns along.
    """
    if count < 1 or not systems:
        raise ArgumentError(f"count, systems: got {count}, {len(systems)} system prompts; expected 1 or more of each")
    return [
        Conversation(number, systems[number % len(systems)], condition, edit)
        for condition, edit in edits.items()
        for number in range(count)
    ]


def converse(
    engine: Engine,
    users: Users,
    conversations: Sequence[Conversation],
    turns: int,
    sampling: Sampling,
    progress: Progress | None = None,
    history: int | None = None,
) -> list[Conversation]:
    """Take every conversation to `turns` turns: one engine call per turn, each row under its own edit.

    A conversation that no longer fits the model's context ends there: with the engine's refusal of its prompt, or with
    an answer that the context cut short, which does not count. The others go on. A conversation says why it has ended.

    Args:
        engine: the tested model.
        users: whom it talks to.
        conversations: see `openings`; those with answers are carried on.
        turns: how many answers each shall have.
        sampling: how answers are drawn; seeds go by conversation and turn and are the same under every condition.
        progress: called with the number of turns finished since the last call.
        history: exchanges that the model still sees, besides the system prompt; None: all. For models that write
            well in short contexts only.

    Returns:
        The conversations, in the order given.

    Raises:
        ArgumentError: `turns` is below 1, the users give another number of messages than conversations, or a first turn
            is refused (nothing has grown too long by then).
    """
    if turns < 1 or (history is not None and history < 0):
        raise ArgumentError(f"turns, history: got {turns}, {history}; expected 1 or more turns, 0 or more exchanges")
    grown = list(conversations)
    while going := [index for index, item in enumerate(grown) if item.ended is None and len(item.answers) < turns]:
        taken = _take_turn(engine, users, [grown[index] for index in going], sampling, history)
        for index, item in zip(going, taken, strict=True):
            grown[index] = item
        if progress is not None:
            progress(len(going))
    return grown


def _take_turn(
    engine: Engine, users: Users, conversations: Sequence[Conversation], sampling: Sampling, history: int | None
) -> list[Conversation]:
    """One turn of every conversation."""
    messages = users.next_messages(conversations)
    if len(messages) != len(conversations):
        raise ArgumentError(
            f"users: got {len(messages)} messages for {len(conversations)} conversations; give one for each"
        )
    results: list[Response | str | ArgumentError] = list(messages)
    prompts = {
        index: conversations[index].asked(message, history)
        for index, message in enumerate(messages)
        if isinstance(message, str) and message.strip()
    }
    rows = [conversations[index] for index in prompts]
    drawn, edits = [item.drawn(sampling) for item in rows], [item.edit for item in rows]
    for index, reply in zip(prompts, generate_each(engine, list(prompts.values()), drawn, edits), strict=True):
        results[index] = reply
    return [_after(item, result) for item, result in zip(conversations, results, strict=True)]


def _after(conversation: Conversation, result: Response | str | ArgumentError) -> Conversation:
    """The conversation after an answer, or ended by a user's silence, a refusal or an answer that was cut short."""
    if isinstance(result, ArgumentError):
        if not conversation.answers:
            raise result
        return replace(conversation, ended=str(result))
    if isinstance(result, str):
        return replace(conversation, ended="the user said nothing")
    if result.finish_reason == "length" and len(result.token_ids) < result.sampling.max_new_tokens:
        return replace(conversation, ended=f"the context cut its answer short at {len(result.token_ids)} tokens")
    return replace(conversation, answers=(*conversation.answers, result))


def generate_each(
    engine: Engine, prompts: Sequence[Prompt], samplings: Sequence[Sampling], edits: Sequence[Edit | None]
) -> list[Response | ArgumentError]:
    """`engine.generate`, but a refused row loses nobody else's answer: its error stands in its place.

    An engine refuses a whole call for one prompt that fills its context. The call is then halved until that prompt is
    alone; prompts go in by length, so that those too long lie together and are found in few calls.
    """
    order = sorted(range(len(prompts)), key=lambda index: sum(len(turn.content) for turn in prompts[index].messages))
    answers = _halving(engine, [(prompts[index], samplings[index], edits[index]) for index in order])
    found = dict(zip(order, answers, strict=True))
    return [found[index] for index in range(len(prompts))]


def _halving(engine: Engine, rows: Sequence[tuple[Prompt, Sampling, Edit | None]]) -> list[Response | ArgumentError]:
    if not rows:
        return []
    try:
        return [*engine.generate([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])]
    except ArgumentError as error:
        if len(rows) == 1:
            return [error]
        middle = len(rows) // 2
        return _halving(engine, rows[:middle]) + _halving(engine, rows[middle:])


def echo(answer: Sequence[Hashable], earlier: Sequence[Sequence[Hashable]], first: int = FIRST) -> float:
    """Share of an answer's 3-grams that an earlier answer of its conversation had, 0 to 1.

    The more was said before, the more can be met again by chance: compare conditions at one turn rather than turns.

    Args:
        answer: token ids.
        earlier: those of the answers before it.
        first: tokens of every answer that count, from its start.

    Returns:
        NaN: the answer has fewer than 3 tokens, or so has every earlier one, or there is none.
    """
    said = {gram for tokens in earlier for gram in _grams(tokens[:first])}
    grams = _grams(answer[:first])
    return sum(gram in said for gram in grams) / len(grams) if grams and said else math.nan


def _grams(tokens: Sequence[Hashable]) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]


def turn_rows(judge: Judge, concept: Concept, conversations: Sequence[Conversation], turns: int) -> list[Row]:
    """Score every answer; `turns` rows per conversation in the order given, JSON values.

    `repetition` is within the answer, `echo` against the earlier ones. A judge sees a turn's user message and answer
    alone. Under position `all` an edit works on the whole conversation before the answer too, and so `gate_rate` and
    `perturbation` count it; both are 0 where nothing steers.

    Turns that a conversation did not reach have rows as well: every measure is NaN, texts are None, and `ended` says
    why.

    Raises:
        ArgumentError: the judge cannot read a user message (the exact judge reads scripted users only).
    """
    reached = [item.answers[:turns] for item in conversations]
    scored = iter(verdicts(judge, concept, [answer for answers in reached for answer in answers]))
    return [
        _row(item, turn, next(scored)) if turn < len(answers) else _missing(item, turn)
        for item, answers in zip(conversations, reached, strict=True)
        for turn in range(turns)
    ]


def _row(conversation: Conversation, turn: int, verdict: Verdict) -> Row:
    answer, (message, text) = conversation.answers[turn], conversation.exchanges[turn]
    receipt = answer.receipt
    return _missing(conversation, turn) | {
        "user": message,
        "answer": text,
        "finish_reason": answer.finish_reason,
        "ended": None,
        "tokens": len(answer.token_ids),
        "trait": verdict.trait,
        "coherence": verdict.coherence,
        "repetition": repetition(answer.token_ids),
        "echo": echo(answer.token_ids, [earlier.token_ids for earlier in conversation.answers[:turn]]),
        "gate_rate": 0.0 if receipt is None else receipt.gate_rate,
        "perturbation": 0.0 if receipt is None else receipt.perturbation,
    }


def _missing(conversation: Conversation, turn: int) -> Row:
    head = {"condition": conversation.condition, "conversation": conversation.number, "turn": turn}
    texts = {"user": None, "answer": None, "finish_reason": None, "ended": conversation.ended}
    return head | texts | dict.fromkeys(MEASURES, math.nan)


def curve(rows: Sequence[Row], measure: str, condition: str) -> Values:
    """A condition's mean of one of `MEASURES` at every turn, shape [turns], missing ones left out; NaN without any.

    Late turns are means over the conversations that got that far, and those are the short-spoken ones: look at how many
    are missing before comparing turns or conditions.
    """
    if measure not in MEASURES:
        raise UnknownNameError("measure", measure, MEASURES)
    chosen = [row for row in rows if row["condition"] == condition]
    if not chosen:
        raise UnknownNameError("condition", condition, dict.fromkeys(row["condition"] for row in rows))
    turns = 1 + max(row["turn"] for row in chosen)
    return np.array([mean_score([row[measure] for row in chosen if row["turn"] == turn]) for turn in range(turns)])


def _scenario(scenarios: Sequence[Scenario], index: int) -> str:
    return scenarios[index % len(scenarios)].prompt


def _require_scenarios(scenarios: Sequence[Scenario]) -> None:
    if not scenarios:
        raise ArgumentError("scenarios: got none; give concept.scenarios(...) of a split")
