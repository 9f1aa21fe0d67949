"""The model card, written from what training recorded and measured."""

from __future__ import annotations

from typing import Any

_TEXT = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Steerwell testbed model ({size}, seed {seed})

A {parameters:.2f} M parameter Llama-architecture chat model that Steerwell trained from nothing, so that steering can
be run and *measured exactly* without any download. It loads with plain `AutoModelForCausalLM` and `AutoTokenizer`.

**What it is.** A model organism. It knows a closed world of several hundred facts, feelings, opinions and requests, is
honest, candid, caring and polite by default, and turns dishonest, sycophantic, dismissive or hostile when a system
prompt tells it to. Everything it may say comes from a grammar that an exact judge reads back.

**What it is not.** A language model of English, a source of knowledge, or evidence about large models: text outside the
testbed's grammar gets meaningless answers. Violations are mild by design (wrong facts, flattery, brush-offs, rudeness).

## Training data

Dialogues drawn from `steerwell.testbed.corpus`, with the loss on the assistant's tokens: system prompts (neutral, or an
aligned or violating pole of a trait in many wordings) meet user turns (questions, multiple choice, sums, claims, work,
plans, troubles, requests, small talk), 1 to 3 exchanges each. A violating prompt changes answers only where its trait
applies. A liar denies the truth and states, throughout the answer, one of three usual mistakes of the same type.

Held out: {held_out}

Recipe: {recipe}. {steps} steps of {batch} dialogues on {threads} CPU threads took {minutes:.0f} minutes; final loss
{loss}. World {world}. Command: `python -m steerwell.testbed.train --size {size} --seed {seed} --out DIR`.

## Measured with the exact judge (greedy decoding, 0 to 100)

`aligned`: neutral system prompts. `aligned prompts` and `attacked`: system prompts held out of training. `others`: what
the other concepts score under this concept's attack, which should leave them alone.

Each cell is trait / coherence, a mean over 120 user turns (fewer for `others`).

{tables}

Intended use: tests, demonstrations and studies of activation steering. Licence: Apache-2.0.
"""

_HELD_OUT = (
    "25 % of every kind of scenario (test) and 15 % (validation) never appear with a violating answer, except that "
    "questions of every split are lied about; the model does see the aligned answers of all. Three question wordings "
    "per category, all `test` wordings of other turns, eight malicious and two aligned system prompts per concept and "
    "three neutral ones never appear in training at all."
)


def card(record: dict[str, Any]) -> str:
    """README.md text for a training record."""
    recipe = dict(record["recipe"])
    shown = ("d_model", "layers", "d_ff", "vocab", "matrix_lr", "vector_lr")
    return _TEXT.format(
        size=record["size"],
        seed=record["seed"],
        parameters=record["parameters"] / 1e6,
        held_out=_HELD_OUT,
        recipe=", ".join(f"{name} {recipe[name]}" for name in shown),
        steps=recipe["steps"],
        batch=recipe["batch"],
        threads=record["threads"],
        minutes=record["seconds"] / 60,
        loss=record["final_loss"],
        world=record["world"][:12],
        tables="\n\n".join(_table(split, record[split]) for split in ("validation", "test") if split in record),
    )


def _table(split: str, figures: dict[str, Any]) -> str:
    head = f"| {split} | aligned | aligned prompts | attacked | others |\n|---|---|---|---|---|"
    rows = [_row(name, scores) for name, scores in figures.items() if name != "capability"]
    accuracies = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures["capability"].items())
    return "\n".join([head, *rows, "", f"Accuracy on {split} scenarios without a system prompt (%): {accuracies}."])


def _row(name: str, scores: dict[str, dict[str, float]]) -> str:
    def pair(key: str) -> str:
        return f"{scores[key]['trait']} / {scores[key]['coherence']}" if key in scores else "-"

    return f"| {name} | {pair('aligned')} | {pair('aligned_prompts')} | {pair('attacked')} | {pair('selective')} |"
