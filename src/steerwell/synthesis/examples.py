"""A labelled exchange: what a detector learns from and is tested on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from steerwell.core.errors import ArgumentError, UnknownNameError

Source = Literal["original", "steered", "prompted", "unsteered"]
SOURCES: tuple[Source, ...] = get_args(Source)
BENIGN, VIOLATING = 0, 1


@dataclass(frozen=True, slots=True)
class Example:
    """One exchange, where it came from, and what it scored.

    Attributes:
        prompt: last user turn; "" where a data set has responses only.
        response: the answer.
        label: 1 violates the concept, 0 does not.
        concept: name of the concept; "" where nobody said.
        source: `original` was not generated here; `steered`, `prompted` and `unsteered` say how it was.
        configuration: how, in words: method, layer, strength ... or the kind of prompting; "" for originals.
        template: what prompts made from one template share; "" is none known.
        system: system prompt it was written under.
        model: name of the model that wrote it.
        edit: id of the edit in its receipt; "" where nothing was steered.
        tokens_edited: share of the tokens in scope that were edited, 0 to 1; NaN: nothing was steered.
        seed: of its sampling; None: not sampled here.
        success: how much it shows the violation, 0 to 1; NaN: not judged.
        coherence: 0 to 1; NaN: not judged.
    """

    prompt: str
    response: str
    label: int
    concept: str = ""
    source: Source = "original"
    configuration: str = ""
    template: str = ""
    system: str = ""
    model: str = ""
    edit: str = ""
    tokens_edited: float = math.nan
    seed: int | None = None
    success: float = math.nan
    coherence: float = math.nan

    def __post_init__(self) -> None:
        if self.label not in (BENIGN, VIOLATING):
            raise ArgumentError(f"label: got {self.label!r}; expected 1 (violating) or 0 (benign)")
        if self.source not in SOURCES:
            raise UnknownNameError("source", self.source, SOURCES)

    @property
    def text(self) -> str:
        """Prompt and response as one text, as a detector of texts reads them."""
        return f"{self.prompt}\n{self.response}" if self.prompt else self.response


def labels(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Their labels, [n]."""
    return np.array([example.label for example in examples], np.int64)
