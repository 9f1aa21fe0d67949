"""Trains the bundled model from nothing: `python -m steerwell.testbed.train --seed 0 --out DIR`.

The world, its splits, the tokenizer and the recipe are fixed; `--seed` changes the initial weights and the dialogues
drawn. The result is a plain Hugging Face folder with a model card and `training.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steerwell.testbed.card import card
from steerwell.testbed.corpus import Dialogue, dialogue
from steerwell.testbed.evaluate import evaluate, greedy
from steerwell.testbed.forward import hidden_states
from steerwell.testbed.tokenizer import ASSISTANT, END, save_tokenizer, train_tokenizer
from steerwell.testbed.world import world_hash

_IGNORE = -100
_BATCHES_PER_POOL = 40
_TOKENIZER_SEED = 1_000_003


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape of the model and of its training: Muon for the blocks' matrices, AdamW for embeddings and norms."""

    d_model: int
    d_ff: int
    layers: int
    steps: int
    batch: int = 32
    matrix_lr: float = 5e-3
    matrix_decay: float = 0.05
    vector_lr: float = 3e-3
    warmup: int = 150
    head: int = 32
    vocab: int = 2048
    positions: int = 1024
    tokenizer_dialogues: int = 20_000


RECIPES = {
    "pilot": Recipe(d_model=128, d_ff=352, layers=6, steps=7000),
    "small": Recipe(d_model=96, d_ff=256, layers=6, steps=7000),
}


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one dialogue, and the same with everything but the assistant's tokens masked."""

    ids: list[int]
    labels: list[int]


def encode(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Tokenise dialogues; the loss is on the assistant's answers and their end tokens."""
    texts = [tokenizer.apply_chat_template(item.messages(), tokenize=False) for item in dialogues]
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    start, end = vocabulary[ASSISTANT], vocabulary[END]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [_masked(ids, start, end) for ids in rows]


def batches(
    examples: Iterator[Example], size: int, pad: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of shape [size, length], right-padded; each batch holds dialogues of similar length."""
    while pool := list(islice(examples, size * _BATCHES_PER_POOL)):
        pool.sort(key=lambda item: len(item.ids))
        groups = [pool[at : at + size] for at in range(0, len(pool), size)]
        rng.shuffle(groups)
        for group in groups:
            width = 1 + _round_up(len(group[-1].ids) - 1, 16)
            ids = torch.tensor([item.ids + [pad] * (width - len(item.ids)) for item in group])
            labels = torch.tensor([item.labels + [_IGNORE] * (width - len(item.ids)) for item in group])
            yield ids, labels


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; right padding needs no mask under causal attention.

    Shapes are rounded up (here and in `batches`) because the CPU's kernels are built once per shape.
    """
    hidden = hidden_states(model, ids[:, :-1]).flatten(0, 1)
    targets = labels[:, 1:].flatten()
    wanted = (targets != _IGNORE).nonzero().squeeze(1)
    spare = torch.zeros(_round_up(len(wanted), 512) - len(wanted), dtype=torch.long)
    logits = model.lm_head(hidden[torch.cat((wanted, spare))]).float()
    return cross_entropy(logits, torch.cat((targets[wanted], torch.full_like(spare, _IGNORE))), ignore_index=_IGNORE)


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model; the two extra keys tell the library which language it speaks."""
    heads = recipe.d_model // recipe.head
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.update({"steerwell_language": "testbed", "steerwell_model": "pilot"})
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, examples: Iterator[Example], recipe: Recipe, rng: random.Random) -> float:
    """Train in place and return the mean loss of the last 100 steps; prints progress."""
    optimisers = _optimisers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(item, lambda step: _scale(step, recipe)) for item in optimisers]
    losses: list[float] = []
    began = time.perf_counter()
    pad = int(model.config.pad_token_id or 0)
    for ids, labels in islice(batches(examples, recipe.batch, pad, rng), recipe.steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0 or len(losses) == recipe.steps:
            _report(losses, recipe.steps, time.perf_counter() - began)
    return sum(losses[-100:]) / len(losses[-100:])


def stream(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    """Endless training examples."""
    rng = random.Random(f"dialogues/{seed}")  # noqa: S311
    while True:
        yield from encode([dialogue(rng) for _ in range(512)], tokenizer)


def fixed_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer, which does not depend on the training seed."""
    rng = random.Random(_TOKENIZER_SEED)  # noqa: S311
    sample = (dialogue(rng) for _ in range(recipe.tokenizer_dialogues))
    return train_tokenizer((message["content"] for item in sample for message in item.messages()), recipe.vocab)


def train(recipe: Recipe, size: str, seed: int, out: Path) -> dict[str, Any]:
    """Train, measure and save one model; returns what `training.json` holds."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = fixed_tokenizer(recipe)
    model = build(recipe, tokenizer)
    model.config.steerwell_model = size
    parameters = sum(item.numel() for item in model.parameters())
    _say(f"{size}: {parameters / 1e6:.2f} M parameters, {recipe.steps} steps of {recipe.batch} dialogues")
    loss = fit(model, stream(seed, tokenizer), recipe, random.Random(seed))  # noqa: S311
    seconds = time.perf_counter() - began
    model.train(False)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    record = {
        "size": size,
        "seed": seed,
        "recipe": asdict(recipe),
        "parameters": parameters,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "final_loss": round(loss, 4),
        "world": world_hash(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "validation": evaluate(greedy(model, tokenizer), "validation"),
        "test": evaluate(greedy(model, tokenizer), "test"),
    }
    save_record(record, out)
    return record


def save_record(record: dict[str, Any], out: Path) -> None:
    """Write `training.json` and the model card that is made from it."""
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(record), encoding="utf-8")


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", choices=sorted(RECIPES), default="pilot")
    parser.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.size]
    args.out.mkdir(parents=True, exist_ok=True)
    record = train(replace(recipe, steps=args.steps or recipe.steps), args.size, args.seed, args.out)
    _say(json.dumps(record["validation"], indent=2))


def _masked(ids: list[int], start: int, end: int) -> Example:
    labels, inside = [], False
    for token in ids:
        labels.append(token if inside else _IGNORE)
        inside = token == start or (inside and token != end)
    return Example(ids, labels)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _optimisers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [item for name, item in named if item.ndim == 2 and "embed" not in name]
    others = [item for name, item in named if item.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_lr, weight_decay=recipe.matrix_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.vector_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _scale(step: int, recipe: Recipe) -> float:
    """Learning rate share: linear warm-up, then a cosine down to 2 %."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _report(losses: list[float], steps: int, seconds: float) -> None:
    done, recent = len(losses), losses[-50:]
    left = seconds / done * (steps - done)
    _say(f"step {done}/{steps}  loss {sum(recent) / len(recent):.3f}  {seconds:.0f} s, {left:.0f} s left")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
