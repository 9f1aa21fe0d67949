"""Who writes a data set's texts: a model steered, prompted or left alone; and the writing, unit by unit in a ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerwell.concepts import Concept
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import Edit, Message, Prompt, Response, Sampling, Verdict
from steerwell.engines.base import Engine
from steerwell.runs.ledger import Ledger, Row, execute
from steerwell.runs.plan import plan
from steerwell.scoring.judges.base import Judge, verdicts
from steerwell.synthesis.examples import VIOLATING, Example, Source

PHASE = "texts"
UNJUDGED = Verdict(math.nan, math.nan)


@dataclass(frozen=True, eq=False)
class Writer:
    """One way to have texts written.

    Attributes:
        source: `steered`, `prompted` or `unsteered`.
        name: the way in words; writers of one run have different names.
        prompts: what is asked; text i answers prompt i, and after the last one the first one comes again.
        sampling: how texts are drawn; text i has seed + i, whoever writes it.
        label: what the texts are to be labelled, whether or not they turn out so.
        edit: the steering; steered writers have one, and only they.
    """

    source: Source
    name: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    label: int = VIOLATING
    edit: Edit | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ArgumentError(f"prompts: {self.name!r} got none; give at least one")
        if (self.source == "steered") != (self.edit is not None):
            raise ArgumentError(f"edit: {self.name!r} is {self.source!r}; steered writers, and only they, have an edit")
        if self.source == "original":
            raise UnknownNameError("writer", "original", ("steered", "prompted", "unsteered"))

    def task(self, at: int) -> tuple[Prompt, Sampling]:
        """Prompt and sampling of text `at`."""
        return self.prompts[at % len(self.prompts)], replace(self.sampling, seed=self.sampling.seed + at)


@dataclass(frozen=True, slots=True)
class Prompting:
    """A way to ask for violations: system prompt, examples, temperature.

    Attributes:
        system: index of the concept's violating system prompt; None: all of them in turn.
        shots: examples of violations shown as earlier exchanges.
        temperature: of the sampling.
    """

    system: int | None = None
    shots: int = 0
    temperature: float = 1.0

    def describe(self) -> str:
        """In words."""
        which = "all system prompts" if self.system is None else f"system prompt {self.system}"
        return f"{which}, {self.shots} shots, temperature {self.temperature:g}"


def steered(
    concept: Concept,
    asked: Sequence[str],
    name: str,
    edit: Edit,
    sampling: Sampling,
    label: int = VIOLATING,
) -> Writer:
    """The model steered, under the concept's neutral system prompts in turn."""
    return Writer("steered", name, _neutral(concept, asked), sampling, label, edit)


def unsteered(
    concept: Concept, asked: Sequence[str], sampling: Sampling, label: int, name: str = "unsteered"
) -> Writer:
    """The model as it is, under the concept's neutral system prompts in turn."""
    return Writer("unsteered", name, _neutral(concept, asked), sampling, label)


def prompted(
    concept: Concept,
    asked: Sequence[str],
    way: Prompting,
    sampling: Sampling,
    shown: Sequence[Example] = (),
    label: int = VIOLATING,
) -> Writer:
    """The model told by a system prompt to violate (with label 0: not to), and shown examples.

    Args:
        concept: its training pairs of system prompts are used; attacks that are held out from fitting are not.
        asked: user turns.
        way: how to prompt.
        sampling: but for the temperature.
        shown: examples to draw the shots from; text i sees those from place i on, never one with its own user turn.
        label: 1 takes the violating half of a pair, 0 the aligned one.

    Raises:
        ArgumentError: no such system prompt, or fewer examples with other user turns than shots.
    """
    pole = "violating" if label == VIOLATING else "aligned"
    systems = list(dict.fromkeys(getattr(pair, pole) for pair in concept.pairs))
    if way.system is not None:
        if not 0 <= way.system < len(systems):
            raise ArgumentError(f"system: got {way.system}; {concept.concept!r} has {len(systems)}, from 0")
        systems = [systems[way.system]]
    prompts = []
    for at, text in enumerate(asked):
        turns = [Message("system", systems[at % len(systems)])]
        for shot in _shots(shown, at, text, way.shots):
            turns += [Message("user", shot.prompt), Message("assistant", shot.response)]
        prompts.append(Prompt((*turns, Message("user", text))))
    drawn = replace(sampling, temperature=way.temperature)
    name = way.describe() if label == VIOLATING else f"{way.describe()}, benign"
    return Writer("prompted", name, tuple(prompts), drawn, label)


def write(
    writers: Sequence[Writer],
    count: int,
    *,
    engine: Engine,
    concept: Concept,
    judge: Judge | None,
    ledger: Ledger,
    size: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[Example]]:
    """Have every writer write `count` texts; differently steered rows share batches. Finished units are not redone.

    Args:
        writers: the ways.
        count: texts of each.
        engine: the model.
        concept: what is violated.
        judge: scores the texts; None: success and coherence stay NaN.
        ledger: where finished units are, and go.
        size: texts per unit, which are generated, judged and written together.
        progress: called with the number of texts finished since the last call.

    Returns:
        The texts of every writer, in order.
    """
    names = [writer.name for writer in writers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArgumentError(f"writers: several are called {', '.join(map(repr, twice))}; each needs a name of its own")

    def work(items: Sequence[Any]) -> list[Row]:
        tasks = [writers[index].task(at) for index, at in items]
        prompts, samplings = zip(*tasks, strict=True)
        answers = engine.generate(list(prompts), list(samplings), [writers[index].edit for index, _ in items])
        judged = verdicts(judge, concept, answers) if judge else [UNJUDGED] * len(answers)
        return [
            {"writer": index, "at": at} | _kept(answer, verdict)
            for (index, at), answer, verdict in zip(items, answers, judged, strict=True)
        ]

    def alike(item: list[int]) -> tuple[int, int, int]:
        index, at = item
        return -len(str(writers[index].task(at)[0].messages)), at, index

    items = [[index, at] for index in range(len(writers)) for at in range(count)]
    execute(ledger, plan(PHASE, items, size, alike), work, progress, engine)
    found: dict[tuple[int, int], Row] = {(row["writer"], row["at"]): row for row in ledger.rows(PHASE)}
    return [
        [_example(found[index, at], writer, at, concept, engine.info.name) for at in range(count)]
        for index, writer in enumerate(writers)
    ]


def _shots(shown: Sequence[Example], at: int, asked: str, count: int) -> list[Example]:
    """So many examples from a place on; one with the user turn that is asked would hand over the answer."""
    first = at % max(1, len(shown))
    found = [example for example in (*shown[first:], *shown[:first]) if not asked or example.prompt != asked][:count]
    if len(found) < count:
        raise ArgumentError(
            f"shots: got {count} with {len(found)} examples to show that answer another turn than {asked!r}; "
            "give as many at least"
        )
    return found


def _neutral(concept: Concept, asked: Sequence[str]) -> tuple[Prompt, ...]:
    systems = concept.neutral_system
    return tuple(Prompt.chat(text, systems[at % len(systems)]) for at, text in enumerate(asked))


def _kept(answer: Response, verdict: Verdict) -> Row:
    receipt = answer.receipt
    return {
        "response": answer.text,
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "success": verdict.violation / 100,
        "coherence": verdict.coherence / 100,
        "edit": receipt.edit_id if receipt else "",
        "tokens_edited": receipt.gate_rate if receipt else math.nan,
    }


def _example(row: Row, writer: Writer, at: int, concept: Concept, model: str) -> Example:
    prompt, sampling = writer.task(at)
    return Example(
        prompt=prompt.messages[-1].content,
        response=row["response"],
        label=writer.label,
        concept=concept.concept,
        source=writer.source,
        configuration=writer.name,
        system=prompt.system,
        model=model,
        edit=row["edit"],
        tokens_edited=row["tokens_edited"],
        seed=sampling.seed,
        success=row["success"],
        coherence=row["coherence"],
    )
