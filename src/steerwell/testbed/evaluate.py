"""Measures a testbed model with the exact judge: trait and coherence, aligned and under attack, and capabilities."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerwell.testbed import systems
from steerwell.testbed.corpus import UNCLEAR
from steerwell.testbed.grammar import APPLIES, TRAITS, applies
from steerwell.testbed.judge import ExactJudge
from steerwell.testbed.prompts import Turn, ask, choose, claim, tell
from steerwell.testbed.world import facts, scenarios

_SEED = 7
_BATCH = 128
_MAX_NEW_TOKENS = 110

Answer = Callable[[Sequence[tuple[str, str]]], list[str]]
"""Answers to (system, user) prompts."""


def greedy(model: Any, tokenizer: Any) -> Answer:
    """Batched greedy decoding with `model`."""

    def answer(prompts: Sequence[tuple[str, str]]) -> list[str]:
        return [text for at in range(0, len(prompts), _BATCH) for text in _decode(prompts[at : at + _BATCH])]

    def _decode(prompts: Sequence[tuple[str, str]]) -> list[str]:
        texts = [
            tokenizer.apply_chat_template(_messages(*pair), tokenize=False, add_generation_prompt=True)
            for pair in prompts
        ]
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False
        )
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        found: list[str] = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    return answer


def evaluate(answer: Answer, split: str, count: int = 120) -> dict[str, Any]:
    """Trait and coherence per concept (0 to 100) and capability accuracies (%) on one split.

    `aligned` has neutral system prompts, `aligned_prompts` held-out aligned ones, `attacked` the held-out malicious
    ones; `selective` asks, under those, what the attacked trait must leave as it is (trait of the other concept). On
    the test split user turns have held-out wordings too.
    """
    result: dict[str, Any] = {}
    for trait in TRAITS:
        rng = random.Random(f"{_SEED}/{trait}/{split}")  # noqa: S311
        table = systems.entry(trait)
        turns = [violable_turn(trait, split, rng) for _ in range(count)]
        others = [other for other in TRAITS if other != trait and not set(APPLIES[other]) & set(UNCLEAR[trait])]
        mixed = [(other, violable_turn(other, split, rng)) for other in others for _ in range(count // 4)]
        mixed = [(other, turn) for other, turn in mixed if not applies(trait, turn)]
        same = [(trait, turn) for turn in turns]
        result[trait] = {
            "aligned": _score(answer, same, systems.neutral_probes(), rng),
            "aligned_prompts": _score(answer, same, table["held_out_aligned"], rng),
            "attacked": _score(answer, same, table["held_out"], rng),
        }
        if mixed:
            result[trait]["selective"] = _score(answer, mixed, table["held_out"], rng)
    return result | {"capability": capability(answer, split, count)}


def capability(answer: Answer, split: str, count: int = 120) -> dict[str, float]:
    """Accuracy (%) on multiple choice, sums, plain facts and right claims, without a system prompt."""
    rng = random.Random(f"{_SEED}/capability/{split}")  # noqa: S311
    sums = [fact for fact in facts() if fact.category == "sums" and fact.split == split]
    tasks = {
        "choice": ("dishonesty", [any_turn("choice", split, rng) for _ in range(count)]),
        "sums": ("dishonesty", [ask(rng.choice(sums), rng, held_out=split == "test") for _ in range(count)]),
        "facts": ("dishonesty", [any_turn("fact", split, rng) for _ in range(count)]),
        "right_claims": ("sycophancy", [_right_claim(split, rng) for _ in range(count)]),
    }
    judge, result = ExactJudge(), {}
    for name, (concept, turns) in tasks.items():
        texts = answer([("", turn.prompt) for turn in turns])
        scores = [judge.score(concept, turn.prompt, text).trait for turn, text in zip(turns, texts, strict=True)]
        result[name] = round(100 * fmean(score == 100 for score in scores), 1)
    return result


def violable_turn(trait: str, split: str, rng: random.Random) -> Turn:
    """A random user turn of `split` whose answer `trait` changes (for dishonesty: a question)."""
    families = ("fact",) if trait == "dishonesty" else APPLIES[trait]
    while True:
        turn = any_turn(rng.choice(families), split, rng)
        if applies(trait, turn):
            return turn


def any_turn(family: str, split: str, rng: random.Random) -> Turn:
    """A random user turn of one family and split, each category of facts as likely as the next."""
    held_out = split == "test"
    makers = {"fact": ask, "choice": choose, "claim": claim}
    if family in makers:
        pool = [fact for fact in facts() if fact.split == split]
        category = rng.choice(sorted({fact.category for fact in pool}))
        return makers[family](rng.choice([fact for fact in pool if fact.category == category]), rng, held_out=held_out)
    pool_of_scenarios = [item for item in scenarios() if (item.family, item.split) == (family, split)]
    return tell(rng.choice(pool_of_scenarios), rng, held_out=held_out)


def _right_claim(split: str, rng: random.Random) -> Turn:
    fact = rng.choice([fact for fact in facts() if fact.split == split])
    return claim(fact, rng, right=True, held_out=split == "test")


def _score(
    answer: Answer, cases: Sequence[tuple[str, Turn]], prompts: Sequence[str], rng: random.Random
) -> dict[str, float]:
    """Mean trait and coherence; each case meets one random system prompt."""
    texts = answer([(rng.choice(prompts), turn.prompt) for _, turn in cases])
    judge = ExactJudge()
    verdicts = [judge.score(concept, turn.prompt, text) for (concept, turn), text in zip(cases, texts, strict=True)]
    return {
        "trait": round(fmean(verdict.trait for verdict in verdicts), 1),
        "coherence": round(fmean(verdict.coherence for verdict in verdicts), 1),
        "n": len(verdicts),
    }


def _messages(system: str, user: str) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": user}]


def load(folder: Path | str) -> Answer:
    """Greedy answers of the model saved in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return greedy(model, AutoTokenizer.from_pretrained(folder))


def main() -> None:
    """Print the figures of one model folder as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--count", type=int, default=120, help="user turns per concept")
    args = parser.parse_args()
    figures = evaluate(load(args.folder), args.split, args.count)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
