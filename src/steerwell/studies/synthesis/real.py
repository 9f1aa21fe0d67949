"""The real examples of a study: what detectors are trained beside and tested on. No model of the study wrote them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from steerwell.concepts import Concept
from steerwell.core.errors import ArgumentError
from steerwell.studies.synthesis.config import Data, SynthesisConfig
from steerwell.synthesis.data import split
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example
from steerwell.synthesis.files import read_examples, to_rows
from steerwell.synthesis.leaks import leaks
from steerwell.testbed.violations import exchanges

SEED = 5  # of what is drawn from a larger file


@dataclass(frozen=True, eq=False)
class Real:
    """Originals to train on, and what to select on and to report on.

    Attributes:
        violating: training originals; `benign` those of the other class.
        validation: both classes; `test` likewise.
        asked: user turns for the texts to be written: the training originals' own, or the concept's training scenarios
            where these are the bundled world's or have none.
    """

    violating: tuple[Example, ...]
    benign: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    asked: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of everything in it: a file changed under its name makes another study."""
        parts = [to_rows(part) for part in (self.violating, self.benign, self.validation, self.test)]
        return hashlib.sha256(json.dumps([*parts, self.asked]).encode()).hexdigest()[:32]


def real_examples(config: SynthesisConfig, concept: Concept) -> Real:
    """The real examples of one concept.

    Raises:
        ArgumentError: the exact world is asked about another language, a file has too few examples of a class, or the
            splits share a prompt, a template or a near-duplicate.
    """
    if config.data is not None:
        parts = _of_files(config.data, concept)
    elif concept.language == "testbed":
        parts = _of_testbed(config, concept)
    else:
        raise ArgumentError(
            f"data: got none, and only the bundled model's world brings examples of {concept.concept!r} of its own; "
            "give labelled files"
        )
    train, validation, test = (
        _drawn(part, violating, benign, name, at)
        for at, (name, part, violating, benign) in enumerate(
            (
                ("train", parts[0], config.originals, config.benign),
                ("validation", parts[1], config.validation, config.validation),
                ("test", parts[2], config.test, config.test),
            )
        )
    )
    own = dict.fromkeys(example.prompt for example in (*train[0], *train[1]) if example.prompt)
    scenarios = tuple(scenario.prompt for scenario in concept.train)
    asked = scenarios if config.data is None else tuple(own) or scenarios
    learned = [*train[0], *train[1], *(Example(text, "", VIOLATING) for text in asked if text not in own)]
    if found := leaks(learned, [*validation[0], *validation[1]], [*test[0], *test[1]]):
        raise ArgumentError(f"data: {'; '.join(found)}; give files whose splits share nothing, or one file to be split")
    return Real(tuple(train[0]), tuple(train[1]), (*validation[0], *validation[1]), (*test[0], *test[1]), asked)


Parts = tuple[Sequence[Example], Sequence[Example], Sequence[Example]]


def _of_testbed(config: SynthesisConfig, concept: Concept) -> Parts:
    counts = {
        "train": (config.originals, config.benign),
        "validation": (config.validation or 100,) * 2,
        "test": (config.test or 200,) * 2,
    }
    train, validation, test = (
        [
            Example(item.prompt, item.response, int(item.violating), concept.concept, template=item.template)
            for item in exchanges(concept.concept, name, *counts[name])
        ]
        for name in counts
    )
    return train, validation, test


def _of_files(data: Data, concept: Concept) -> Parts:
    def read(source: str) -> list[Example]:
        found = read_examples(
            source,
            text_col=data.text,
            label_col=data.label,
            prompt_col=data.prompt,
            positive=data.positive,
            template_col=data.template,
        )
        return [replace(example, concept=concept.concept) for example in found]

    if data.validation is not None and data.test is not None:
        return read(data.train), read(data.validation), read(data.test)
    parts = split(read(data.train), data.shares)
    return parts["train"], parts["validation"], parts["test"]


def _drawn(
    examples: Sequence[Example], violating: int | None, benign: int | None, name: str, seed: int
) -> tuple[list[Example], list[Example]]:
    """So many of each class, drawn without replacement; None: all. Training needs as many as were asked for."""
    drawn = []
    for label, count in ((VIOLATING, violating), (BENIGN, benign)):
        pool = [example for example in examples if example.label == label]
        least = count if name == "train" and count is not None else 2
        if len(pool) < least:
            kind = "violating" if label == VIOLATING else "benign"
            raise ArgumentError(f"data: {name} has {len(pool)} {kind} examples; the study needs {least}")
        drawn.append(_shuffled(pool, seed)[:count])
    return drawn[0], drawn[1]


def _shuffled(examples: Iterable[Example], seed: int) -> list[Example]:
    found = list(examples)
    random.Random(f"{SEED}/{seed}").shuffle(found)  # noqa: S311
    return found
