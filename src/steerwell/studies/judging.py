"""The concept and the judge that a study's settings ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerwell.concepts import ENGLISH, Concept, load_concept
from steerwell.concepts.schema import Split
from steerwell.core.errors import ArgumentError
from steerwell.core.records import Response, Sampling
from steerwell.engines.base import Engine, made_by
from steerwell.runs.ledger import Ledger, Row, execute
from steerwell.runs.plan import plan
from steerwell.scoring.judges.base import Judge
from steerwell.studies.config import JudgeSettings
from steerwell.studies.fitting import Say

CACHE = "judge.sqlite"  # an LLM judge's replies
LEARNED = "judge-answers.sqlite"  # what a classifier judge is learned from
PAIRS_PER_UNIT = 8


def concept_of(name: str, language: str | None, engine: Engine) -> Concept:
    """A concept's file, or the bundled pack in the study's language or the model's own."""
    if name.endswith((".yaml", ".yml")):
        return load_concept(name)
    return load_concept(name, language or engine.info.language or ENGLISH)


def judge_for(
    settings: JudgeSettings, concept: Concept, engine: Engine, sampling: Sampling, folder: Path, say: Say
) -> Judge:
    """The judge of one concept's answers.

    Args:
        settings: which one.
        concept: the trait.
        engine: the model studied; a classifier judge is learned from its answers.
        sampling: how these are drawn.
        folder: where an LLM's replies, or these answers, are kept.
        say: called with what is being done and how many answers it takes; returns where progress goes.

    Raises:
        ArgumentError: the exact judge is asked about another language than the bundled model's.
    """
    if settings.kind == "llm":
        from steerwell.scoring.judges.llm import LLMJudge

        return LLMJudge(settings.model, settings.url, mode=settings.mode, cache=folder / CACHE)
    if settings.kind == "classifier":
        from steerwell.scoring.judges.classifier import ClassifierJudge

        about = {
            "what": "judge",
            "concept": concept.hash,
            "sampling": asdict(sampling),
        } | made_by(engine)
        with Ledger(folder / LEARNED, about) as ledger:
            train, validation = (_answers(ledger, engine, concept, split, sampling, say) for split in _SPLITS)
        return ClassifierJudge.fit(engine, concept, train, validation, embedder=settings.embedder)
    if concept.language != "testbed":
        raise ArgumentError(
            "judge: got 'exact', which knows the bundled model's world only; give kind: llm with the 'model' and 'url' "
            "of an endpoint, or kind: classifier"
        )
    from steerwell.scoring.judges.exact import ExactJudge

    return ExactJudge()


_SPLITS: tuple[Split, Split] = ("train", "validation")


def _answers(
    ledger: Ledger, engine: Engine, concept: Concept, split: Split, sampling: Sampling, say: Say
) -> list[tuple[Response, Response]]:
    """The model's (aligned, violating) answers to a split's scenarios; scenario i has seeds + 2 i and + 2 i + 1."""
    pairs = concept.contrastive(split)
    seeds = [Sampling(**{**asdict(sampling), "seed": sampling.seed + at}) for at in range(2 * len(pairs))]

    def answer(items: Sequence[int]) -> list[Row]:
        prompts = [prompt for item in items for prompt in pairs[item]]
        drawn = [seeds[2 * item + side] for item in items for side in (0, 1)]
        said = engine.generate(prompts, drawn)
        return [{"pair": [_kept(item) for item in said[at : at + 2]]} for at in range(0, len(said), 2)]

    units = plan(split, range(len(pairs)), PAIRS_PER_UNIT)
    execute(ledger, units, answer, say(f"{split} answers that the judge is learned from", len(pairs)), engine)
    rows = [row["pair"] for row in ledger.rows(split)]
    return [
        (_again(first, pair[0], seeds[2 * at]), _again(second, pair[1], seeds[2 * at + 1]))
        for at, ((first, second), pair) in enumerate(zip(rows, pairs, strict=True))
    ]


def _kept(answer: Response) -> dict[str, Any]:
    return {"text": answer.text, "token_ids": list(answer.token_ids), "finish_reason": answer.finish_reason}


def _again(kept: dict[str, Any], prompt: Any, sampling: Sampling) -> Response:
    return Response(prompt, kept["text"], tuple(kept["token_ids"]), kept["finish_reason"], sampling)
