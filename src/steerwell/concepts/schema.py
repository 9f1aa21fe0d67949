"""What a concept file says: contrastive system prompts, scenarios in three splits, held-out attacks, judge rubric."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from steerwell.core.records import Prompt

SPLITS = ("train", "validation", "test")
Split = Literal["train", "validation", "test"]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "is blank")
    return text.strip()


def _require_difference(aligned: str, violating: str | None) -> None:
    if aligned == violating:
        raise PydanticCustomError("equal_pair", "'aligned' and 'violating' are the same text")


Text = Annotated[str, AfterValidator(_not_blank)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Record(BaseModel):
    """Frozen, and strict about unknown keys: a misspelt field is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Poles(Record):
    """What the two classes are called."""

    aligned: Text
    violating: Text


class Pair(Record):
    """A contrastive pair of system prompts."""

    aligned: Text
    violating: Text

    @model_validator(mode="after")
    def _differ(self) -> Self:
        _require_difference(self.aligned, self.violating)
        return self


class Scenario(Record):
    """One user prompt, with a system-prompt pair of its own where the concept's shared pairs do not fit it."""

    id: Text
    category: Text
    prompt: Text
    aligned: Text | None = None
    violating: Text | None = None
    reference: Text | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.aligned is None) != (self.violating is None):
            raise PydanticCustomError("half_pair", "has one of 'aligned' and 'violating' without the other")
        if self.aligned is not None:
            _require_difference(self.aligned, self.violating)
        return self


class Rubric(Record):
    """How a judge scores an answer from 0 to 100."""

    trait: Text
    coherence: Text


class Concept(Record):
    """A trait with two poles, and the prompts that show it.

    `pairs` are cycled over the training scenarios that have no pair of their own. `malicious` system prompts are
    held out from fitting: they are what a defence is tested against. `neutral_prompts` do not touch the trait.
    """

    schema_: Literal[1] = Field(alias="schema")
    concept: Name
    language: Name
    title: Text
    description: Text
    poles: Poles
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1, strict=False)]
    malicious: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]
    neutral_system: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    neutral_prompts: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]
    train: Annotated[tuple[Scenario, ...], Field(min_length=4, strict=False)]
    validation: Annotated[tuple[Scenario, ...], Field(min_length=1, strict=False)]
    test: Annotated[tuple[Scenario, ...], Field(min_length=1, strict=False)]
    rubric: Rubric

    def scenarios(self, split: Split) -> tuple[Scenario, ...]:
        """The scenarios of one split."""
        found: tuple[Scenario, ...] = getattr(self, split)
        return found

    def contrastive(self, split: Split = "train") -> list[tuple[Prompt, Prompt]]:
        """(aligned, violating) prompts of every scenario: same user turn, opposite system prompts."""
        prompts = []
        for index, scenario in enumerate(self.scenarios(split)):
            shared = self.pairs[index % len(self.pairs)]
            aligned, violating = scenario.aligned or shared.aligned, scenario.violating or shared.violating
            prompts.append((Prompt.chat(scenario.prompt, aligned), Prompt.chat(scenario.prompt, violating)))
        return prompts

    def attacks(self, split: Literal["validation", "test"]) -> tuple[str, ...]:
        """The malicious system prompts of one split: every second one each, so that selection never sees the test's.

        A concept with a single one has it in both splits.
        """
        return self.malicious[0::2] if split == "validation" or len(self.malicious) == 1 else self.malicious[1::2]

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the concept's whole content: two concepts with one hash are the same concept."""
        content: dict[str, Any] = self.model_dump(by_alias=True, mode="json")
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
