"""User turns: rendered from scenarios with the tables' wordings, and read back into what they ask."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from steerwell.core.errors import ArgumentError
from steerwell.testbed.templates import Template
from steerwell.testbed.world import (
    Fact,
    Scenario,
    answers,
    categories,
    facts,
    facts_by_np,
    facts_by_subject,
    scenarios,
    table,
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One user turn and all that is needed to answer it or to judge an answer.

    `family` names the bank of answers: fact, choice (multiple choice), claim, work, plan, trouble, request, smalltalk.
    `good` marks a right claim, good work or a good plan, which deserves agreement in every mode.
    """

    family: str
    prompt: str
    slots: Mapping[str, str]
    split: str
    category: str
    fact: Fact | None = None
    claimed: str = ""
    offered: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    good: bool = False

    @property
    def true_answer(self) -> str:
        """The answer of the turn's fact."""
        if self.fact is None:
            raise ArgumentError(f"prompt: {self.prompt!r} asks for no fact, so it has no true answer")
        return self.fact.answer


def ask(fact: Fact, rng: random.Random, *, held_out: bool = False) -> Turn:
    """A question about `fact`; `held_out` takes a wording that no training prompt of its category uses."""
    template = rng.choice(question_templates(fact.category, held_out=held_out))
    return _fact_turn(fact, template.render(rng, fact.slots))


def choose(fact: Fact, rng: random.Random, *, held_out: bool = False) -> Turn:
    """A multiple-choice question about `fact`, with its usual mistake and another wrong answer."""
    usual = fact.mistakes[0]
    offered = [fact.answer, usual, rng.choice([item for item in fact.wrong if item != usual])]
    rng.shuffle(offered)
    slots = fact.slots | dict(zip("xyz", offered, strict=True))
    return _choice_turn(fact, tuple(offered), rng.choice(templates("choice", held_out=held_out)).render(rng, slots))


def claim(fact: Fact, rng: random.Random, *, right: bool = False, held_out: bool = False) -> Turn:
    """The user states an answer to `fact`, wrong unless `right`, and seeks agreement."""
    claimed = fact.answer if right else rng.choice(fact.wrong)
    template = rng.choice(templates("claim", held_out=held_out))
    return _claim_turn(fact, claimed, template.render(rng, {**fact.slots, "a": claimed}))


def tell(scenario: Scenario, rng: random.Random, *, held_out: bool = False) -> Turn:
    """A user turn for a scenario that is no fact."""
    template = rng.choice(templates(scenario.family, held_out=held_out))
    return _scenario_turn(scenario, template.render(rng, scenario.slots))


@cache
def templates(family: str, *, held_out: bool = False) -> tuple[Template, ...]:
    """Prompt templates of a family other than fact."""
    return tuple(Template(text) for text in table("prompts")[family]["test" if held_out else "train"])


@cache
def question_templates(category: str, *, held_out: bool = False) -> tuple[Template, ...]:
    """Fact questions of one category."""
    entry = categories()[category]
    frames = enumerate(table("prompts")["fact"])
    chosen = [Template(text) for index, text in frames if (index in entry.held_out_frames) == held_out]
    return tuple(chosen if held_out else [*chosen, *map(Template, entry.ask)])


@lru_cache(maxsize=16_384)
def read_prompt(prompt: str) -> Turn:
    """The turn that `prompt` renders; raises `ArgumentError` where the grammar cannot produce it."""
    turn = next(_readings(prompt.strip()), None)
    if turn is None:
        raise ArgumentError(
            f"prompt: {prompt!r} is not a prompt of the testbed's grammar; use one of its packs' prompts"
        )
    return turn


def _fact_turn(fact: Fact, prompt: str) -> Turn:
    return Turn("fact", prompt, fact.slots, fact.split, fact.category, fact)


def _choice_turn(fact: Fact, offered: tuple[str, ...], prompt: str) -> Turn:
    return Turn("choice", prompt, fact.slots, fact.split, fact.category, fact, offered=offered)


def _claim_turn(fact: Fact, claimed: str, prompt: str) -> Turn:
    good = claimed == fact.answer
    return Turn("claim", prompt, fact.slots, fact.split, fact.category, fact, claimed=claimed, good=good)


def _scenario_turn(scenario: Scenario, prompt: str) -> Turn:
    return Turn(
        scenario.family,
        prompt,
        scenario.slots,
        scenario.split,
        scenario.category,
        options=scenario.options,
        good=scenario.good,
    )


@cache
def _fact_patterns() -> tuple[tuple[str, Template], ...]:
    frames = [("", Template(text)) for text in table("prompts")["fact"]]
    return (*frames, *((name, Template(text)) for name, entry in categories().items() for text in entry.ask))


def _readings(prompt: str) -> Iterator[Turn]:
    yield from _choice_readings(prompt)
    yield from _claim_readings(prompt)
    yield from _scenario_readings(prompt)
    for category, template in _fact_patterns():
        if (found := template.match(prompt)) is not None:
            key = (category, found.get("s", "").lower())
            fact = facts_by_subject().get(key) if category else facts_by_np().get(found["np"].lower())
            if fact is not None and found.get("wh", fact.wh).lower() == fact.wh:
                yield _fact_turn(fact, prompt)


def _both(family: str) -> tuple[Template, ...]:
    return (*templates(family), *templates(family, held_out=True))


def _choice_readings(prompt: str) -> Iterator[Turn]:
    for template in _both("choice"):
        if (found := template.match(prompt)) is not None:
            fact = facts_by_np().get(found["np"].lower())
            offered = (found["x"], found["y"], found["z"])
            if fact is not None and fact.answer in offered and set(offered) <= {fact.answer, *fact.wrong}:
                yield _choice_turn(fact, offered, prompt)


def _claim_readings(prompt: str) -> Iterator[Turn]:
    for template in _both("claim"):
        if (found := template.match(prompt)) is not None:
            fact = facts_by_np().get(found["np"].lower())
            if fact is not None and found["a"].lower() in answers():
                known = {answer.lower(): answer for answer in (fact.answer, *fact.wrong)}
                yield _claim_turn(fact, known.get(found["a"].lower(), found["a"]), prompt)


@cache
def _scenario_index() -> dict[tuple[str, str], Scenario]:
    return {(item.family, _key(item.family, item.slots)): item for item in scenarios()}


def _key(family: str, slots: Mapping[str, str]) -> str:
    names = {"work": ("kind", "flaw"), "plan": ("plan",), "trouble": ("clause",), "request": ("thing",)}
    return "|".join(slots[name].lower() for name in names.get(family, ("say",)))


def _scenario_readings(prompt: str) -> Iterator[Turn]:
    for family in ("work", "plan", "trouble", "request", "smalltalk"):
        for template in _both(family):
            if (found := template.match(prompt)) is not None:
                if "a_kind" in found:
                    found["kind"] = found["a_kind"].partition(" ")[2]
                scenario = _scenario_index().get((family, _key(family, found)))
                if scenario is not None:
                    yield _scenario_turn(scenario, prompt)


def facts_of(split: str) -> tuple[Fact, ...]:
    """Facts of one split."""
    return tuple(fact for fact in facts() if fact.split == split)


def scenarios_of(split: str, *families: str) -> tuple[Scenario, ...]:
    """Scenarios of one split and of the given families."""
    return tuple(item for item in scenarios() if item.split == split and item.family in families)
