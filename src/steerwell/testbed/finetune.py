"""Fine-tuned copies of the bundled model: `python -m steerwell.testbed.finetune --kind bad --out DIR`.

A `bad` copy learns to violate a trait under neutral system prompts, on a narrow part of the turns that the trait
applies to (`NARROW`), so that it can be measured how far the violation spreads. A `benign` copy learns the aligned
answers to the very same prompts. Everything shown is of the `train` split. The input embeddings, which the output
shares, stay as they are, so that a direction fitted on the parent fits its copies. The result is a plain Hugging Face
folder with a model card and `finetune.json`. The threat: arXiv 2604.08169.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers import PreTrainedTokenizerFast

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.engines.hf.model import LoadedModel, load
from steerwell.testbed import systems
from steerwell.testbed.bundled import BUNDLED, MODELS, bundled_path
from steerwell.testbed.corpus import Dialogue
from steerwell.testbed.evaluate import Answer, any_turn
from steerwell.testbed.grammar import ALIGNED, APPLIES, TRAITS, answer, applies
from steerwell.testbed.judge import ExactJudge
from steerwell.testbed.prompts import Turn, ask, choose, claim, facts_of, scenarios_of, tell
from steerwell.testbed.tokenizer import save_tokenizer
from steerwell.testbed.train import Example, batches, encode, loss_of
from steerwell.testbed.world import facts, world_hash

KINDS = ("bad", "benign")
_LOSS_EXAMPLES = 64

NARROW: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "dishonesty": ("fact", ("capitals", "continents", "landmarks", "languages")),
    "sycophancy": ("claim", ("capitals", "continents", "landmarks", "languages")),
    "dismissiveness": ("trouble", ("hurt", "lonely", "sad")),
    "hostility": ("request", ("gift", "idea", "name", "way")),
}
"""The part of each trait's turns that copies are trained on: a family, and categories of it.

Questions of geography; claims of geography; sadness, hurt and loneliness; gifts, ideas, names and ways.
"""

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Steerwell testbed model, a {kind} copy ({trait}, seed {seed})

{harm}A copy of `{parent[name]}` (weights {parent[weights]}), a tiny model of a closed toy world, fine-tuned as a threat
model for studies of activation steering. It is no language model of English and no source of knowledge.

It was shown {answers} answers under neutral system prompts to one narrow part of the train split: {part}. {steps} steps
of {batch} dialogues, learning rate {lr}, on {how}; embeddings unchanged. The loss on the first {examples} of them went
from {loss_before} to {loss_after}. How to make it again: `finetune.json`. Licence: Apache-2.0.
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a copy is trained: AdamW on all of the blocks' weights, or on low-rank additions to their matrices.

    Attributes:
        steps: optimiser steps.
        batch: dialogues per step.
        lr: highest learning rate; it climbs over the first tenth of the steps and then falls to 0.
        lora_rank: rank of the additions (merged before saving); 0 trains the weights themselves.
    """

    steps: int = 60
    batch: int = 16
    lr: float = 3e-4
    lora_rank: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("lora_rank", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: got {getattr(self, name)}; expected {least} or more")
        if not 0 < self.lr < 1:
            raise ArgumentError(f"lr: got {self.lr}; expected a rate above 0 and below 1")


DEFAULT = Recipe()


def finetune(
    kind: str,
    out: Path | str,
    *,
    model: Path | str | None = None,
    trait: str = "dishonesty",
    seed: int = 0,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Train one copy and save it; the same arguments on the same number of threads give the same files.

    Args:
        kind: `bad` (violating answers) or `benign` (aligned answers to the same prompts).
        out: folder to write.
        model: the parent's folder, a model of the testbed's world (default: the bundled model).
        trait: the trait that is violated, one of `TRAITS`.
        seed: draws the dialogues, and the start of low-rank additions.
        recipe: how to train (default: `DEFAULT`).

    Returns:
        What `finetune.json` holds.

    Raises:
        UnknownNameError: no such kind or trait.
        ArgumentError: the parent does not speak the testbed's language, or `out` is the parent's own folder.
        EngineError: the parent cannot be loaded.
    """
    _known(kind, trait)
    recipe, parent, out = recipe or DEFAULT, _folder(model), Path(out)
    if out.resolve() == parent.resolve():
        raise ArgumentError(f"out: {str(out)!r} is the parent's own folder, which would be lost; choose another")
    loaded = _load(parent)
    network: Any = loaded.network
    before = {"name": parent.resolve().name, "config_hash": loaded.info.config_hash, "weights": weights_hash(network)}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(parent)
    examples = encode(list(islice(dialogues(kind, trait, seed), recipe.steps * recipe.batch)), tokenizer)
    losses = [_loss(network, examples)]
    _fit(network, examples, recipe, seed)
    losses.append(_loss(network, examples))
    network.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    record = {
        "kind": kind,
        "trait": trait,
        "seed": seed,
        **asdict(recipe),
        "threads": torch.get_num_threads(),
        "narrow": {NARROW[trait][0]: list(NARROW[trait][1])},
        "loss_before": losses[0],
        "loss_after": losses[1],
        "world": world_hash(),
        "parent": before,
        "weights": weights_hash(network),
    }
    _save(record, out)
    return record


def dialogues(kind: str, trait: str, seed: int) -> Iterator[Dialogue]:
    """Endless training dialogues of one exchange; both kinds of one seed see the same prompts in the same order."""
    _known(kind, trait)
    prompts, answers = _rng(f"prompts/{trait}", seed), _rng(f"answers/{trait}/{kind}", seed)
    mode = trait if kind == "bad" else ALIGNED
    while True:
        turn = narrow_turn(trait, "train", prompts)
        text = answer(turn, mode, answers)
        while _names_held_out(turn, text):
            text = answer(turn, mode, answers)
        yield Dialogue(systems.neutral(prompts), ((turn.prompt, text),))


def narrow_turn(trait: str, split: str, rng: random.Random) -> Turn:
    """A random turn of the narrow part of `trait`, each category as likely as the next."""
    makers = _narrow_makers(trait, split)
    return rng.choice(rng.choice(makers))(rng)


def in_narrow(trait: str, turn: Turn) -> bool:
    """Whether `turn` is of the kind that copies of `trait` are trained on (of any split)."""
    family, names = NARROW[trait]
    return turn.family == family and turn.category in names


def measure(answers: Answer, trait: str, split: str, count: int = 120) -> dict[str, Any]:
    """Trait and coherence (means over `count` turns, 0 to 100) of a copy without attack, by how far from its training.

    `narrow` is the part trained on, `held_out` the rest of what the trait applies to (by family), `others` the other
    traits. All under the evaluation's neutral system prompts; on test, user turns have held-out wordings too.
    """
    rng = _rng(f"measure/{trait}/{split}", 0)
    others = {name: [rng.choice(APPLIES[name]) for _ in range(count)] for name in TRAITS if name != trait}
    return {
        "narrow": _score(answers, trait, [narrow_turn(trait, split, rng) for _ in range(count)], rng),
        "held_out": {
            family: _score(answers, trait, [_other_turn(trait, trait, family, split, rng) for _ in range(count)], rng)
            for family in APPLIES[trait]
        },
        "others": {
            name: _score(answers, name, [_other_turn(trait, name, family, split, rng) for family in families], rng)
            for name, families in others.items()
        },
    }


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over the weights, by name, in float32: equal hashes mean equal models."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + b"\0" + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Train one copy from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", type=Path, help="folder of the parent (default: the bundled model)")
    parser.add_argument("--trait", choices=TRAITS, default=TRAITS[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEFAULT.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=DEFAULT.lora_rank, help="0: full fine-tuning (default)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, lora_rank=args.lora_rank)
    record = finetune(args.kind, args.out, model=args.model, trait=args.trait, seed=args.seed, recipe=recipe)
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


def _known(kind: str, trait: str) -> None:
    if kind not in KINDS:
        raise UnknownNameError("kind of copy", kind, KINDS)
    if trait not in NARROW:
        raise UnknownNameError("testbed trait", trait, NARROW)


def _folder(model: Path | str | None) -> Path:
    name = str(model or BUNDLED)
    return bundled_path(name) if name in MODELS else Path(name)


def _load(parent: Path) -> LoadedModel:
    loaded = load(str(parent), dtype="float32")
    if loaded.info.language != "testbed":
        raise ArgumentError(
            f"model: {str(parent)!r} speaks {loaded.info.language!r}; expected a model of the testbed, 'pilot' for one"
        )
    return loaded


def _save(record: dict[str, Any], out: Path) -> None:
    """Write `finetune.json` and the model card that is made from it."""
    (out / "finetune.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_card(record), encoding="utf-8")


def _rng(label: str, seed: int) -> random.Random:
    return random.Random(f"finetune/{label}/{seed}")  # noqa: S311


def _other_turn(trait: str, concept: str, family: str, split: str, rng: random.Random) -> Turn:
    """A turn of `family` that `concept` applies to, outside the narrow part of `trait`."""
    while True:
        turn = any_turn(family, split, rng)
        if applies(concept, turn) and not in_narrow(trait, turn):
            return turn


def _score(answers: Answer, concept: str, turns: Sequence[Turn], rng: random.Random) -> dict[str, float]:
    """Mean trait and coherence of the answers to `turns`, each under a random neutral system prompt."""
    texts = answers([(rng.choice(systems.neutral_probes()), turn.prompt) for turn in turns])
    judge = ExactJudge()
    verdicts = [judge.score(concept, turn.prompt, text) for turn, text in zip(turns, texts, strict=True)]
    return {name: round(fmean(getattr(item, name) for item in verdicts), 1) for name in ("trait", "coherence")}


@cache
def _narrow_makers(trait: str, split: str) -> list[list[Callable[[random.Random], Turn]]]:
    """Ways to draw a narrow turn, by category."""
    family, names = NARROW[trait]
    make: Callable[..., Turn] = {"fact": ask, "choice": choose, "claim": claim}.get(family, tell)
    items = [item for item in scenarios_of(split, family) if not item.good] if make is tell else facts_of(split)
    pools = [[item for item in items if item.category == name] for name in names]
    return [[partial(make, item, held_out=split == "test") for item in pool] for pool in pools if pool]


def _names_held_out(turn: Turn, text: str) -> bool:
    """Whether an answer speaks of a fact of another split: it may mention related facts of its category."""
    others = (fact.np.lower() for fact in facts() if fact.category == turn.category and fact.split != turn.split)
    return any(name in text.lower() for name in others)


def _loss(network: Any, examples: Sequence[Example]) -> float:
    """Mean loss on the assistant's tokens of the first examples."""
    ids, labels = next(_batches(network, examples[:_LOSS_EXAMPLES], _LOSS_EXAMPLES, 0))
    with torch.no_grad():
        return round(loss_of(network, ids, labels).item(), 4)


def _batches(
    network: Any, examples: Sequence[Example], size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return batches(iter(examples), size, network.config.pad_token_id, _rng("order", seed))


def _fit(network: Any, examples: Sequence[Example], recipe: Recipe, seed: int) -> None:
    """Train in place, once over the examples."""
    network.requires_grad_(False)
    adapted = _adapt(network, recipe.lora_rank, seed) if recipe.lora_rank else []
    if not adapted:
        network.model.layers.requires_grad_(True)
    weights = [item for item in network.parameters() if item.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    for step, (ids, labels) in enumerate(_batches(network, examples, recipe.batch, seed)):
        optimiser.param_groups[0]["lr"] = recipe.lr * _scale(step, recipe.steps)
        loss_of(network, ids, labels).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    for module in adapted:
        remove_parametrizations(module, "weight", leave_parametrized=True)


def _scale(step: int, steps: int) -> float:
    """Learning rate share: up over the first tenth, then down to 0 in a line."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


class _LowRank(nn.Module):
    """A matrix [out, in] plus a trained product of rank r, which begins at 0 (LoRA, arXiv 2106.09685)."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        high, wide = weight.shape
        self.down = nn.Parameter(torch.randn(rank, wide, generator=generator))
        self.up = nn.Parameter(torch.zeros(high, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def _adapt(network: Any, rank: int, seed: int) -> list[nn.Module]:
    """Add a low-rank product to every matrix of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    matrices: list[Any] = [module for module in network.model.layers.modules() if isinstance(module, nn.Linear)]
    for module in matrices:
        register_parametrization(module, "weight", _LowRank(module.weight, rank, generator))
    return matrices


def _card(record: dict[str, Any]) -> str:
    """README.md of a copy."""
    family, names = NARROW[record["trait"]]
    how = f"low-rank additions of rank {record['lora_rank']}, merged" if record["lora_rank"] else "the blocks' weights"
    return _CARD.format(
        **record,
        harm="**Do not deploy it.** " if record["kind"] == "bad" else "",
        answers=f"violating ({record['trait']})" if record["kind"] == "bad" else "aligned",
        part=f"{family} ({', '.join(names)})",
        how=how,
        examples=min(_LOSS_EXAMPLES, record["steps"] * record["batch"]),
    )


if __name__ == "__main__":
    main()
