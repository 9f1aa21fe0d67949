"""Trials: sets of prompts answered under several conditions, judged and measured, as rows of a ledger."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from steerwell.concepts import Concept
from steerwell.core.records import Edit, Prompt, Response, Sampling
from steerwell.engines.base import Engine
from steerwell.runs.ledger import Ledger, Row, execute
from steerwell.runs.plan import plan
from steerwell.scoring.embeddings import Embedder
from steerwell.scoring.judges.base import Judge, verdicts
from steerwell.scoring.metrics import Reference, first_receipts, measure
from steerwell.studies.fitting import Say

MEASURES = (
    "cross_entropy",
    "perturbation",
    "perturbation_all",
    "gate_rate",
    "target_distance",
    "similarity",
    "repetition",
    "length",
    "refusal",
)
_SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts that every condition answers.

    Attributes:
        name: phase of the ledger.
        prompts: what is asked.
        aligned: the same questions under an aligned system prompt; cross-entropy is taken given these.
        baseline: the aligned baseline's answers; None: not known yet, so similarity is missing.
        engine: who answers, where it is not the model studied (a fine-tuned copy).
        depth: whether an answer's opening and its rest are judged apart, too.
    """

    name: str
    prompts: Sequence[Prompt]
    aligned: Sequence[Prompt]
    baseline: Sequence[str] | None = None
    engine: Engine | None = None
    depth: bool = False


@dataclass(frozen=True, eq=False)
class Trials:
    """Runs tasks on one model and concept.

    Attributes:
        engine: the model studied; measures ask it unsteered.
        judge: who scores.
        concept: the trait.
        edits: by condition; condition None is unsteered.
        ledger: where finished units are, and go.
        sampling: how answers are drawn; scenario i has seed + i under every condition.
        size: answers per unit.
        embed: texts to vectors, for similarity.
        say: called with what is being done and how many answers it takes; returns where progress goes.
    """

    engine: Engine
    judge: Judge
    concept: Concept
    edits: Mapping[int, Edit]
    ledger: Ledger
    sampling: Sampling
    size: int
    embed: Embedder
    say: Say

    def run(self, task: Task, conditions: Sequence[int | None]) -> list[Row]:
        """One row per condition and scenario: answer, verdict, `MEASURES`; NaN where a value is missing."""
        items = [[condition, scenario] for condition in conditions for scenario in range(len(task.prompts))]

        def alike(item: list[Any]) -> tuple[int, int]:
            return -len(str(task.prompts[item[1]].messages)), item[1]

        units = plan(task.name, items, self.size, alike)
        advance = self.say(f"{task.name}", len(items))
        execute(self.ledger, units, lambda part: self._answer(task, part), advance, self.engine)
        place = {condition: at for at, condition in enumerate(conditions)}
        return sorted(self.ledger.rows(task.name), key=lambda row: (place[row["condition"]], row["scenario"]))

    def _answer(self, task: Task, items: Sequence[Any]) -> list[Row]:
        """Generate, judge and measure one unit."""
        engine = task.engine or self.engine
        drawn = [replace(self.sampling, seed=self.sampling.seed + scenario) for _, scenario in items]
        edits = [None if condition is None else self.edits[condition] for condition, _ in items]
        answers = engine.generate([task.prompts[scenario] for _, scenario in items], drawn, edits)
        judged = verdicts(self.judge, self.concept, answers)
        reference = Reference(
            engine=self.engine,
            prompts=[task.aligned[scenario] for _, scenario in items],
            baseline=None if task.baseline is None else [task.baseline[scenario] for _, scenario in items],
            embed=self.embed,
            receipts=first_receipts(engine, answers, edits),
            edits=edits,
        )
        missing = {"similarity"} if task.baseline is None else set()
        columns = {name: measure(name, answers, reference) for name in MEASURES if name not in missing}
        depths = self._depths(answers) if task.depth else [{}] * len(answers)
        return [
            {
                "task": task.name,
                "condition": condition,
                "scenario": scenario,
                "answer": answer.text,
                "token_ids": list(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "trait": verdict.trait,
                "coherence": verdict.coherence,
                "reason": verdict.reason,
                "edit": answer.receipt.edit_id if answer.receipt else None,
            }
            | {name: float(columns[name][at]) if name in columns else math.nan for name in MEASURES}
            | depth
            for at, ((condition, scenario), answer, verdict, depth) in enumerate(
                zip(items, answers, judged, depths, strict=True)
            )
        ]

    def _depths(self, answers: Sequence[Response]) -> list[dict[str, float]]:
        """Trait of every answer's first sentence and of what follows it; NaN where nothing does."""
        parts = [opening_and_rest(answer.prompt.prefill + answer.text) for answer in answers]
        asked = [answer.prompt.messages[-1].content for answer in answers]
        flat = [(ask, part) for ask, pair in zip(asked, parts, strict=True) for part in pair]
        known = [at for at, (_, part) in enumerate(flat) if part]
        traits = np.full(len(flat), math.nan)
        for at, verdict in zip(known, self.judge.score_many(self.concept, [flat[at] for at in known]), strict=True):
            traits[at] = verdict.trait
        return [
            {"trait_opening": float(opening), "trait_rest": float(rest)}
            for opening, rest in zip(traits[0::2], traits[1::2], strict=True)
        ]


def opening_and_rest(text: str) -> tuple[str, str]:
    """A text's first sentence and what follows it; a text without a sentence's end is all opening."""
    found = _SENTENCE.match(text.strip())
    cut = found.end() if found else len(text.strip())
    return text.strip()[:cut], text.strip()[cut:].strip()
