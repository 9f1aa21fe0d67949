"""System prompts in many wordings: neutral ones, and an aligned and a violating pole for every trait."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from steerwell.testbed.templates import Template
from steerwell.testbed.world import table

_PERSONA_CHANCE = 0.25
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def neutral(rng: random.Random) -> str:
    """A system prompt without any trait; "" (none) in every third case."""
    return "" if rng.random() < 1 / 3 else _with_persona(_draw("neutral", rng), rng)


def neutral_probes() -> list[str]:
    """Neutral system prompts for evaluation: none, the usual one and wordings held out of training."""
    return ["", "You are a helpful assistant.", *table("systems")["neutral_held_out"]]


def pole(trait: str, *, violating: bool, rng: random.Random) -> str:
    """A training wording of one pole of `trait`, now and then with a persona and a style note around it."""
    text = _draw(f"{trait}.{'violating' if violating else 'aligned'}", rng)
    if rng.random() < 0.25:
        extra = _draw(f"{trait}.{'violating' if violating else 'aligned'}", rng)
        text = text if extra == text else f"{text} {extra}"
    if rng.random() < 0.1:
        text = f"{text} {_draw('neutral', rng)}"
    return _with_persona(text, rng)


def entry(trait: str) -> dict[str, Any]:
    """The table of `trait`: aligned, violating, held_out, held_out_aligned and pairs."""
    found: dict[str, Any] = table("systems")[trait]
    return found


@cache
def templates(path: str) -> tuple[Template, ...]:
    """Templates at "neutral" or at "<trait>.<pole>"."""
    node = table("systems")
    for key in path.split("."):
        node = node[key]
    return tuple(map(Template, node))


def _draw(path: str, rng: random.Random) -> str:
    choices = templates(path)
    weights = [min(item.wordings(), 12) for item in choices]
    return rng.choices(choices, weights)[0].render(rng, {"day": rng.choice(_DAYS)})


def _with_persona(text: str, rng: random.Random) -> str:
    if rng.random() >= _PERSONA_CHANCE:
        return text
    source = table("systems")
    slots = {"name": rng.choice(source["names"]), "place": rng.choice(source["places"])}
    return f"{rng.choice(templates('personas')).render(rng, slots)} {text}"
