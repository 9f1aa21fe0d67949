"""OpenAI's response objects, whole and as chunks of a stream, with this server's `steering` field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol

from typing_extensions import TypedDict

from steerwell.core.artifacts import finite
from steerwell.core.records import FinishReason
from steerwell.engines.base import Answer, Token

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TracedToken(TypedDict):
    text: str
    projections: list[float | None]
    edited: list[bool]


class SteeringReply(TypedDict):
    """What was done to each choice.

    `name` is the policy's, `custom` or `unsteered`; receipts and flags stand in the order of the choices. A flag tells
    whether the answer stayed misaligned; null: nothing watched it.
    """

    name: str
    edit_id: str | None
    monitor: bool
    receipts: list[dict[str, Any] | None]
    flagged: list[bool | None]
    tokens: NotRequired[list[list[TracedToken]]]


class SaidMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: SaidMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class Reply(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    steering: SteeringReply


class ChatCompletion(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(Reply):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


def quoted(value: Any) -> str:
    """JSON without spaces, in ASCII; NaN is an error."""
    return _ENCODE(value)


_ENCODE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(slots=True)
class Choice:
    """One choice as it grows; `lead` is the prompt's text where it is echoed."""

    lead: str = ""
    tokens: list[Token] = field(default_factory=list)
    answer: Answer | None = None
    offset: int = 0  # of the next token's text, for `text_offset`

    @property
    def finished(self) -> Answer:
        """The answer; asked for when every choice has ended."""
        assert self.answer is not None  # noqa: S101 - a ticket ends when every answer has
        return self.answer


class Form(Protocol):
    """How one of OpenAI's two kinds of answer is written."""

    kind: str
    chunk_kind: str
    prefix: str

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice of a whole reply."""
        ...

    def opening(self, index: int, choice: Choice) -> str | None:
        """The first chunk's choice, as JSON; None: nothing to say."""
        ...

    def delta(self, index: int, choice: Choice, text: str, tokens: Sequence[Token]) -> str:
        """A chunk's choice that adds text, as JSON."""
        ...

    def closing(self, index: int, finish: FinishReason) -> str:
        """A choice's last chunk, as JSON."""
        ...


class ChatForm:
    """`/v1/chat/completions`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice of a whole reply."""
        response = choice.finished.response
        message = SaidMessage(role="assistant", content=response.text, refusal=None)
        logprobs = chat_logprobs(choice.tokens) if self._logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": response.finish_reason}

    def opening(self, index: int, choice: Choice) -> str | None:
        """The chunk that tells the role."""
        return (
            f'{{"index":{index},"delta":{{"role":"assistant","content":"","refusal":null}},'
            '"logprobs":null,"finish_reason":null}'
        )

    def delta(self, index: int, choice: Choice, text: str, tokens: Sequence[Token]) -> str:
        """Some of the answer's text."""
        logprobs = quoted(chat_logprobs(tokens)) if self._logprobs else "null"
        return f'{{"index":{index},"delta":{{"content":{quoted(text)}}},"logprobs":{logprobs},"finish_reason":null}}'

    def closing(self, index: int, finish: FinishReason) -> str:
        """Why the answer ended."""
        return f'{{"index":{index},"delta":{{}},"logprobs":null,"finish_reason":"{finish}"}}'


class TextForm:
    """`/v1/completions`."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice of a whole reply; echoed tokens come first."""
        response, choice.offset = choice.finished.response, 0
        logprobs = text_logprobs(choice, _ended([*choice.finished.prompt_logprobs, *choice.tokens], choice))
        return {
            "index": index,
            "text": choice.lead + response.text,
            "logprobs": logprobs if self._logprobs else None,
            "finish_reason": response.finish_reason,
        }

    def opening(self, index: int, choice: Choice) -> str | None:
        """The echoed prompt."""
        return self._chunk(index, choice.lead, "null") if choice.lead else None

    def delta(self, index: int, choice: Choice, text: str, tokens: Sequence[Token]) -> str:
        """Some of the answer's text."""
        return self._chunk(index, text, quoted(text_logprobs(choice, tokens)) if self._logprobs else "null")

    def closing(self, index: int, finish: FinishReason) -> str:
        """Why the answer ended."""
        return f'{{"index":{index},"text":"","logprobs":null,"finish_reason":"{finish}"}}'

    def _chunk(self, index: int, text: str, logprobs: str) -> str:
        return f'{{"index":{index},"text":{quoted(text)},"logprobs":{logprobs},"finish_reason":null}}'


def chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    """Log-probabilities as the chat API tells them."""
    content = [
        TokenLogprob(**_scored(token.text, token.logprob), top_logprobs=[_scored(text, p) for _, text, p in token.top])
        for token in tokens
    ]
    return ChatLogprobs(content=content, refusal=None)


def text_logprobs(choice: Choice, tokens: Sequence[Token]) -> TextLogprobs:
    """Log-probabilities as the completions API tells them; the chosen token is always among the alternatives."""
    offsets = []
    for token in tokens:
        offsets.append(choice.offset)
        choice.offset += len(token.text)
    return TextLogprobs(
        text_offset=offsets,
        token_logprobs=[None if token.logprob is None else _told(token.logprob) for token in tokens],
        tokens=[token.text for token in tokens],
        top_logprobs=[_alternatives(token) for token in tokens],
    )


def traced(tokens: Sequence[Token]) -> list[TracedToken]:
    """Every token's projections and gates."""
    return [
        TracedToken(text=token.text, projections=finite(list(token.projections)), edited=list(token.edited))
        for token in tokens
    ]


def usage(choices: Sequence[Choice], per_prompt: int) -> Usage:
    """Tokens of every prompt, each counted once, and of every answer."""
    answers = [choice.finished for choice in choices]
    asked = sum(answer.prompt_tokens for answer in answers[::per_prompt])
    said = sum(answer.completion_tokens for answer in answers)
    return Usage(prompt_tokens=asked, completion_tokens=said, total_tokens=asked + said)


def _scored(text: str, logprob: float | None) -> TopLogprob:
    return TopLogprob(
        token=text, logprob=_told(logprob), bytes=None if REPLACEMENT in text else list(text.encode("utf-8", "replace"))
    )


def _told(logprob: float | None) -> float:
    """The API's way to say: very unlikely, or not known. JSON has no infinity."""
    return -9999.0 if logprob is None or not math.isfinite(logprob) else logprob


def _alternatives(token: Token) -> dict[str, float] | None:
    """Texts of several tokens may be the same: the likeliest stands for them."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for _, text, logprob in (*token.top, (token.id, token.text, token.logprob)):
        found.setdefault(text, _told(logprob))
    return found


def _ended(tokens: list[Token], choice: Choice) -> list[Token]:
    """The tokens and, after an echoed prompt, the end token: harnesses count on one entry per token that was drawn."""
    answer = choice.finished
    if answer.prompt_logprobs and len(choice.tokens) < answer.completion_tokens:
        tokens.append(Token(-1, ""))
    return tokens
