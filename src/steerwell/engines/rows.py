"""Answers in the making, and what a running batch of them offers to whoever schedules it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from steerwell.core.errors import EngineError
from steerwell.core.records import Edit, FinishReason, Prompt, Receipt, Response, Sampling
from steerwell.engines.base import Answer, Asked, Engine, Piece, Token
from steerwell.engines.text import TextStream


@dataclass(slots=True, eq=False)
class Row:
    """One answer in the making; `tokens` leaves the end token out. See `Asked` for what it tells."""

    prompt: Prompt
    prompt_ids: list[int]
    sampling: Sampling
    edit: Edit | None
    text: TextStream
    limit: int
    logprobs: int | None = None
    echo: bool = False
    trace: bool = False
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    ended: bool = False  # by the end token
    receipt: Receipt | None = None
    fault: EngineError | None = None
    settled: bool = False  # its receipt, if there is one, has been made out
    told: list[Token] = field(default_factory=list)  # tokens not yet taken
    echoed: tuple[Token, ...] = ()
    draws: Any = None  # uniform numbers, one per token

    def append(self, token: int, end_ids: Collection[int]) -> None:
        """Take the next token; an end token, a stop string or the limit finishes the answer."""
        if token in end_ids:
            self.finish, self.ended = "stop", True
            return
        self.tokens.append(token)
        if self.text.stopped(self.tokens):
            self.finish = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish = "length"

    def response(self) -> Response:
        """The finished answer."""
        assert self.finish is not None  # noqa: S101 - asked for when the row has finished
        text = self.text.final(self.tokens)
        return Response(self.prompt, text, tuple(self.tokens), self.finish, self.sampling, self.receipt)

    def take(self) -> Piece | None:
        """What is new since the last time; None: nothing that can be shown yet."""
        text = self.text.fresh(self.tokens, done=self.finish is not None)
        if self.finish is None and not text:
            return None
        told, self.told = tuple(self.told), []
        answer = None
        if self.finish is not None:
            answer = Answer(self.response(), len(self.prompt_ids), len(self.tokens) + self.ended, self.echoed)
        return Piece(text, told, answer)


class Running(Protocol):
    """A batch that answers are added to while others go on; one thread uses it."""

    @property
    def joins(self) -> bool:
        """Whether rows can join while others decode."""
        ...

    @property
    def padded(self) -> bool:
        """Whether rows share one rectangle of keys and values, so that a long one costs the others memory and time."""
        ...

    @property
    def gone(self) -> bool:
        """Whether what runs the model has ended: nothing can be asked any more."""
        ...

    def admit(self, rows: Sequence[Row]) -> int:
        """Begin to answer these rows; tokens that this has drawn."""
        ...

    def step(self) -> int:
        """Go on with all rows; tokens that this has drawn."""
        ...

    def settle(self) -> None:
        """Set receipt or fault of the rows that have finished since the last time."""
        ...

    def rest(self) -> None:
        """Hold no memory for rows that are gone, as none is left."""
        ...

    def drop(self, rows: Sequence[Row]) -> None:
        """End rows that nobody waits for any more."""
        ...


class ServingEngine(Engine, Protocol):
    """An engine that can answer in a running batch."""

    def row(self, asked: Asked) -> Row:
        """What a batch needs to answer one request; everything is checked here."""
        ...

    def batch(self) -> Running:
        """An empty batch for rows of `row`."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        ...
