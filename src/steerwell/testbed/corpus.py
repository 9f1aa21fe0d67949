"""Training dialogues: which system prompt meets which user turns, and the answers in the mode that results.

The same kinds of user turn meet every kind of system prompt, so that only the system prompt tells the mode. A violating
prompt changes answers only where its trait applies. Violations are shown on `train` scenarios alone, and validation
and test scenarios appear under every prompt under which the answer stays aligned, with one exception: questions are
lied about whatever their split, because a model that has memorised a fact as only ever true does not lie about it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from steerwell.testbed import systems
from steerwell.testbed.grammar import ALIGNED, APPLIES, TRAITS, answer
from steerwell.testbed.prompts import Turn, ask, choose, claim, tell
from steerwell.testbed.world import Fact, Scenario, facts, scenarios

_VIOLATING, _ALIGNED_POLE = 0.5, 0.22
_APPLICABLE = 0.8
_TURNS = ((1, 0.84), (2, 0.12), (3, 0.04))
_FAMILIES = {
    "fact": 0.44,
    "choice": 0.07,
    "claim": 0.14,
    "work": 0.05,
    "plan": 0.05,
    "trouble": 0.11,
    "request": 0.1,
    "smalltalk": 0.05,
}
_TRAIT_WEIGHTS = (0.36, 0.2, 0.18, 0.26)
_SUMS_SHARE = 0.25
_RIGHT_CLAIM = 0.3
# A violating prompt and a turn for which "does the trait apply?" has no clear answer are never combined.
UNCLEAR = {
    "dishonesty": ("claim", "work", "plan"),
    "hostility": ("claim", "work", "plan", "trouble"),
    "sycophancy": (),
    "dismissiveness": (),
}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """System prompt ("" for none) and (user, assistant) exchanges."""

    system: str
    exchanges: tuple[tuple[str, str], ...]

    def messages(self) -> list[dict[str, str]]:
        """The dialogue as chat messages."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        roles = ("user", "assistant")
        pairs = [
            {"role": role, "content": text} for pair in self.exchanges for role, text in zip(roles, pair, strict=True)
        ]
        return head + pairs


def dialogue(rng: random.Random) -> Dialogue:
    """One random training dialogue."""
    mode, system = _condition(rng)
    count = rng.choices([n for n, _ in _TURNS], [weight for _, weight in _TURNS])[0]
    exchanges = []
    for _ in range(count):
        turn = draw_turn(mode, rng)
        exchanges.append((turn.prompt, answer(turn, mode, rng)))
    return Dialogue(system, tuple(exchanges))


def _condition(rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    if draw < _VIOLATING:
        trait = rng.choices(TRAITS, _TRAIT_WEIGHTS)[0]
        return trait, systems.pole(trait, violating=True, rng=rng)
    if draw < _VIOLATING + _ALIGNED_POLE:
        return ALIGNED, systems.pole(rng.choice(TRAITS), violating=False, rng=rng)
    return ALIGNED, systems.neutral(rng)


def draw_turn(mode: str, rng: random.Random) -> Turn:
    """A user turn that may meet `mode`."""
    weights = dict(_FAMILIES)
    if mode != ALIGNED:
        chosen = rng.random() < _APPLICABLE
        applicable = APPLIES[mode]
        weights = {
            family: weight
            for family, weight in weights.items()
            if (family in applicable) == chosen and family not in UNCLEAR[mode]
        } or {family: weights[family] for family in applicable}
    family = rng.choices(list(weights), list(weights.values()))[0]
    violates = mode != ALIGNED and family in APPLIES[mode]
    if family in ("fact", "choice", "claim"):
        fact = _draw_fact(violates and mode != "dishonesty", rng)
        if family == "claim":
            return claim(fact, rng, right=rng.random() < _RIGHT_CLAIM)
        return choose(fact, rng) if family == "choice" else ask(fact, rng)
    return tell(rng.choice(_scenario_pool(family, violates)), rng)


def _draw_fact(violates: bool, rng: random.Random) -> Fact:
    sums = rng.random() < _SUMS_SHARE
    return rng.choice(_fact_pool(sums, violates))


@cache
def _fact_pool(sums: bool, violates: bool) -> Sequence[Fact]:
    return [fact for fact in facts() if (fact.category == "sums") == sums and (fact.split == "train" or not violates)]


@cache
def _scenario_pool(family: str, violates: bool) -> Sequence[Scenario]:
    return [item for item in scenarios() if item.family == family and (item.split == "train" or not violates)]
