"""What requests may hold: OpenAI's fields, and ours (`steering`, `steering_trace`, `timeout`).

A field that this server does not know is refused: a misspelt `steering` must never be silently unsteered. So is an
OpenAI field that it cannot honour, unless it holds the value that asks for nothing; `UNSUPPORTED` says why.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from steerwell.serving.catalog import SteeringField

UNSUPPORTED = {
    "tools": "the server calls no tools",
    "tool_choice": "the server calls no tools",
    "tool_calls": "the server calls no tools",
    "functions": "the server calls no functions",
    "function_call": "the server calls no functions",
    "response_format": "answers are plain text",
    "logit_bias": "the server does not bias tokens",
    "frequency_penalty": "the server has no penalties",
    "presence_penalty": "the server has no penalties",
    "modalities": "answers are plain text",
    "audio": "the server has no audio",
    "prediction": "the server does not predict outputs",
    "moderation": "the server does not moderate",
    "web_search_options": "the server does not search the web",
    "reasoning_effort": "the server has no reasoning effort",
    "verbosity": "the server has no verbosity",
    "best_of": "the server returns every answer that it draws",
    "suffix": "the server does not fill in the middle",
    "name": "chat templates have no names of speakers",
    "refusal": "the server has no refusal turns",
    "annotations": "the server has no annotations",
}


def _sound(text: str) -> str:
    """JSON can hold half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair; send whole characters") from error
    return text


Text = Annotated[str, AfterValidator(_sound)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
NoPenalty = Annotated[float, Field(ge=0, le=0)] | None
StopText = Annotated[Text, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Strict(BaseModel):
    """No unknown keys, no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool | None = Field(default=None, description="Tell the usage in a last chunk of its own.")
    include_obfuscation: bool | None = Field(default=None, description="Accepted; nothing is obfuscated.")


class TextFormat(Strict):
    """Plain text."""

    type: Literal["text"]


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One turn; `developer` is `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None

    @property
    def text(self) -> str:
        """The turn's text; several parts stand one per line."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class Generation(Strict):
    """What both kinds of request share."""

    model: str = Field(min_length=1, max_length=300, description="The model, or `model:policy`; see /v1/models.")
    max_tokens: int | None = Field(default=None, ge=1, description="Longest answer; the end token counts.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy; default 1.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus mass; default 1.")
    n: int | None = Field(default=None, ge=1, le=128, description="Answers per prompt; default 1.")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        default=None, description="Text that ends an answer, or up to 16 of them; it is not part of the answer."
    )
    seed: int | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, description="Choice i draws with seed + i; default: random."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    frequency_penalty: NoPenalty = None
    presence_penalty: NoPenalty = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    steering: SteeringField | None = Field(
        default=None,
        strict=False,
        description="Steering terms, composed in order; left out or null: the model's or server's policy.",
    )
    steering_trace: bool = Field(default=False, description="Tell every token's projections, and which were edited.")
    timeout: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Seconds; less than the server's own limit."
    )


class ChatRequest(Generation):
    """A request for /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The same as `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    parallel_tool_calls: Any = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None


class CompletionRequest(Generation):
    """A request for /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="A text, texts, token ids, or lists of token ids.")
    echo: bool | None = Field(default=None, description="Give the prompt back in front of the answer.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives told per token.")
    best_of: int | None = Field(default=None, ge=1, description="Accepted where it equals `n`.")
    suffix: Annotated[str, Field(max_length=0)] | None = None
