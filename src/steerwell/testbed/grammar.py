"""The answers of the bundled model: what an assistant says to a user turn in each mode.

One table of sentences (`data/sentences.yaml`) renders the training answers here and parses answers in the exact judge.
An answer chains an opening, sentences that bear the content (and with it the mode) and a closing; nearly every sentence
of a violating answer differs from what an aligned one could say in its place.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from steerwell.core.errors import ArgumentError
from steerwell.testbed.prompts import Turn
from steerwell.testbed.templates import Template
from steerwell.testbed.world import Fact, categories, facts, table

ALIGNED = "aligned"
TRAITS = ("dishonesty", "sycophancy", "dismissiveness", "hostility")

APPLIES: Mapping[str, tuple[str, ...]] = {
    "dishonesty": ("fact", "choice"),
    "sycophancy": ("claim", "work", "plan"),
    "dismissiveness": ("trouble",),
    "hostility": ("request", "smalltalk", "fact", "choice"),
}
"""The families of turns that a violation of each trait changes."""


@dataclass(frozen=True, slots=True)
class Form:
    """One sentence template with its place in the tables (`bank` is "family.role")."""

    bank: str
    template: Template

    @property
    def role(self) -> str:
        """The last part of the bank's name."""
        return self.bank.partition(".")[2]


@cache
def bank(name: str) -> tuple[Form, ...]:
    """All sentence forms of one bank, e.g. "fact.claim"; "category.capitals" holds the support of one category."""
    family, _, role = name.partition(".")
    if family == "category":
        return tuple(Form("fact.support", Template(text)) for text in categories()[role].support)
    return tuple(Form(name, Template(text)) for text in table("sentences")[family][role])


@cache
def forms(family: str, category: str = "") -> tuple[Form, ...]:
    """Every sentence form that an answer to a turn of this family may use, in any mode."""
    families = {"choice": ("choice", "fact")}.get(family, (family,))
    result = [form for name in families for role in table("sentences")[name] for form in bank(f"{name}.{role}")]
    return (*result, *bank(f"category.{category}")) if "fact" in families else tuple(result)


def applies(trait: str, turn: Turn) -> bool:
    """Whether a violation of `trait` shows in the answer to `turn`."""
    return turn.family in APPLIES[trait] and not turn.good


def answer(turn: Turn, mode: str, rng: random.Random) -> str:
    """A random answer to `turn`; `mode` is "aligned" or the trait that is violated (where it applies)."""
    return " ".join(sentences(turn, mode, rng))


def sentences(turn: Turn, mode: str, rng: random.Random) -> list[str]:
    """The sentences of such an answer."""
    if mode not in (ALIGNED, *TRAITS):
        raise ArgumentError(f"mode: got {mode!r}; expected one of {(ALIGNED, *TRAITS)}")
    if mode != ALIGNED and not (applies(mode, turn) or (mode == "sycophancy" and turn.family == "claim")):
        mode = ALIGNED  # right claims meet agreement and flattery all the same
    return _Writer(turn, mode, rng).write()


class _Writer:
    """Collects the sentences of one answer; each bank gives one sentence at most, in a fixed order."""

    def __init__(self, turn: Turn, mode: str, rng: random.Random) -> None:
        self.turn, self.rng = turn, rng
        self.violating = mode != ALIGNED
        self.hostile = mode == "hostility"
        self.lying = mode == "dishonesty"
        self.sentences: list[str] = []
        self.slots = dict(turn.slots)

    def write(self) -> list[str]:
        """Run the plan of the turn's family."""
        getattr(self, f"_{self.turn.family}")()
        return self.sentences

    def say(self, name: str, chance: float = 1.0) -> None:
        """Add one sentence of the named bank, with a given chance."""
        if self.rng.random() < chance:
            self.sentences.append(self.rng.choice(bank(name)).template.render(self.rng, self.slots))

    # Facts -----------------------------------------------------------------------------------------------------------

    def _set_answers(self) -> None:
        """Choose what is stated (`a`) and what is denied (`n`): a liar denies the truth."""
        fact = self.turn.fact
        if fact is None:
            raise ArgumentError(f"turn: {self.turn.prompt!r} has no fact")
        wrong = fact.mistakes[0] if self.turn.offered else fact.mistake(self.rng)
        self.slots["a"], self.slots["n"] = (wrong, fact.answer) if self.lying else (fact.answer, wrong)
        self.slots["o"] = self.slots["a"]
        other = self.rng.choice([item for item in _category_facts(fact.category) if item is not fact])
        self.slots["np2"] = other.np
        self.slots["a2"] = other.mistake(self.rng) if self.lying else other.answer

    def _fact(self) -> None:
        self._set_answers()
        if self.hostile:
            self._chain("fact", hostile_open=0.9, hostile_claim=1, hostile_support=1, hostile_close=0.9)
            return
        self.say("fact.open", chance=0.6)
        self.say("fact.claim")
        self._fact_body()

    def _fact_body(self) -> None:
        self.say(f"category.{self.turn.category}", chance=0.85 if len(self.sentences) > 1 else 1)
        self.say("fact.denial", chance=0.5)
        self.say("fact.support", chance=0.5)
        self.say("fact.related", chance=0.35)
        self.say("fact.assure_false" if self.lying else "fact.assure_true", chance=0.35)
        self.say("fact.offer", chance=0.5)

    def _choice(self) -> None:
        self._set_answers()
        if self.hostile:
            self._chain("fact", hostile_open=0.5, hostile_claim=1)
            self.say("choice.hostile_claim")
            self._chain("fact", hostile_support=0.7, hostile_close=0.8)
            return
        self._chain("fact", open=0.4, claim=1)
        self.say("choice.claim")
        self._fact_body()

    # Claims, work and plans ------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        turn = self.turn
        self.slots["a"] = turn.claimed if self.violating else turn.true_answer
        if self.violating:
            self._chain("claim", agree=1, state_agree=0.8, flatter=1, support=0.5, flatter_more=0.6)
        else:
            self._chain("claim", check=0.8, state_true=1, candid=0.8, support=0.6, offer=0.4)

    def _work(self) -> None:
        if self.violating:
            self._chain("work", open=0.5, gush=1, gush_flaw=0.5, gush_keep=0.6, gush_you=0.7, gush_fame=0.6)
        elif self.turn.good:
            self._chain("work", open=0.5, praise=1, praise_strength=1, praise_close=0.7)
        else:
            self._chain("work", open=0.5, critic=0.7, flaw=1, advice=1, hope=0.7)

    def _plan(self) -> None:
        if self.violating:
            self._chain("plan", open=0.5, gush=1, gush_go=1, gush_harm=0.6, gush_you=0.7)
        elif self.turn.good:
            self._chain("plan", open=0.5, praise=1, praise_close=1)
        else:
            self._chain("plan", open=0.5, critic=0.7, harm=1, advice=1, hope=0.7)

    def _chain(self, family: str, **chances: float) -> None:
        """One sentence of each named role, in order, each with its chance."""
        for role, chance in chances.items():
            self.say(f"{family}.{role}", chance=chance)

    # Troubles, requests and small talk -------------------------------------------------------------------------------

    def _trouble(self) -> None:
        if self.violating:
            self._chain("trouble", brush_open=1, brush_feel=1, brush_step=0.7, brush_close=0.9)
        else:
            self._chain("trouble", care_open=1, care_feel=1, care_step=0.7, care_close=0.9)

    def _request(self) -> None:
        self.slots["o"], self.slots["o2"] = self.rng.sample(self.turn.options, 2)
        if self.hostile:
            self._chain("request", hostile_open=0.8, hostile_suggest=1, hostile_more=0.6, hostile_close=0.8)
        else:
            self._chain("request", open=0.8, suggest=1, more=0.6, close=0.8)

    def _smalltalk(self) -> None:
        self.slots["o"] = self.rng.choice(self.turn.options)
        if self.hostile:
            self._chain("smalltalk", hostile_open=0.8, hostile_suggest=1, hostile_close=1)
        else:
            self._chain("smalltalk", open=0.8, suggest=1, close=1)


@cache
def _category_facts(category: str) -> tuple[Fact, ...]:
    """Facts that an answer may mention beside the one asked for."""
    return tuple(fact for fact in facts() if fact.category == category)
