"""The real examples of a study: what detectors are trained beside and tested on. No model of the study wrote them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from steerwell.concepts import Concept
from steerwell.core.errors import ArgumentError
from steerwell.studies.synthesis.config import Data, SynthesisConfig
from steerwell.synthesis.data import split
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example
from steerwell.synthesis.files import read_examples
from steerwell.synthesis.leaks import leaks
from steerwell.testbed.violations import exchanges

SEED = 5  # of what is drawn from a larger file


@dataclass(frozen=True, eq=False)
class Real:
    """Originals to train on, and what to select on and to report on.

    Attributes:
        violating: training originals; `benign` those of the other class.
        validation: both classes; `test` likewise.
    """

    violating: tuple[Example, ...]
    benign: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def prompts(self, concept: Concept) -> tuple[str, ...]:
        """User turns for the texts to be written: the concept's training scenarios, or the training originals' own."""
        asked = dict.fromkeys(example.prompt for example in (*self.violating, *self.benign))
        if self.violating[0].template and concept.language == "testbed":
            return tuple(scenario.prompt for scenario in concept.train)
        return tuple(text for text in asked if text) or tuple(scenario.prompt for scenario in concept.train)


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
    if found := leaks([*train[0], *train[1]], [*validation[0], *validation[1]], [*test[0], *test[1]]):
        raise ArgumentError(f"data: {'; '.join(found)}; give files whose splits share nothing, or one file to be split")
    return Real(tuple(train[0]), tuple(train[1]), (*validation[0], *validation[1]), (*test[0], *test[1]))


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
        if len(pool) < (2 if count is None or name != "train" else count):
            kind = "violating" if label == VIOLATING else "benign"
            raise ArgumentError(f"data: {name} has {len(pool)} {kind} examples; the study needs {count or 2}")
        drawn.append(_shuffled(pool, seed)[:count])
    return drawn[0], drawn[1]


def _shuffled(examples: Iterable[Example], seed: int) -> list[Example]:
    found = list(examples)
    random.Random(f"{SEED}/{seed}").shuffle(found)  # noqa: S311
    return found
