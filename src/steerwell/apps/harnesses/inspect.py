"""A steered model as an Inspect model provider, `steerwell/MODEL` (inspect_ai; written against 0.3.285).

Inspect finds it by the entry point group `inspect_ai`; importing this module registers it too.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from steerwell.apps.harnesses.batcher import Batcher
from steerwell.apps.harnesses.common import load_steered
from steerwell.core.errors import ArgumentError, SteerwellError
from steerwell.core.records import Message, Prompt, Response, Sampling, receipt_row
from steerwell.engines.base import proven

MAX_TOKENS = 2048  # as in Inspect's own local providers
REFUSED = (
    "best_of",
    "extra_body",
    "fallback_models",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "modalities",
    "presence_penalty",
    "prompt_logprobs",
    "response_schema",
    "top_k",
    "top_logprobs",
)  # settings that would change the answer, and that the engine does not have

Row = tuple[Prompt, Sampling]


@modelapi(name="steerwell")
class SteeredAPI(ModelAPI):
    """A Hugging Face model under one edit; concurrent requests are answered in one batch.

    Every output's metadata holds `steering`, the receipt (None: unsteered), and `sampling`, how it was drawn.
    Temperature 0, which is greedy, is the default.

    Args:
        model_name: `pilot` (the bundled model), a hub id, a local folder, or a `.gguf` file.
        base_url: not used; giving one is an error.
        api_key: not used.
        config: defaults for generating.
        model_args: steering, loading and `batch_size` (`-M`); see `load_steered`, also for the errors.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as in the base class
        **model_args: Any,
    ) -> None:
        if base_url is not None:
            raise ArgumentError(f"base_url: got {base_url!r}; this provider runs the model itself, so leave it out")
        steered = load_steered(model_name, model_args)
        # Inspect's cache of answers (--cache) knows a model by its name and base URL only: the edit must be in one.
        super().__init__(model_name, f"edit:{steered.edit.id}" if steered.edit else None, api_key, [], config)
        self._model, self._engine, self._edit = steered.model, steered.engine, steered.edit
        self._ask: Batcher[Row, Response] = Batcher(self._answers, self._engine.batch_size)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a conversation; a last turn of the assistant is the beginning of the answer.

        Raises:
            ArgumentError: tools, content other than text, or a setting that the engine does not have.
        """
        if tools:
            names = ", ".join(tool.name for tool in tools)
            raise ArgumentError(f"tools: got {names}; this provider calls no tools, so use a solver without them")
        prompt, sampling = prompt_of(input), sampling_of(config)
        start = time.monotonic()
        response = await self._ask((prompt, sampling))
        return self._output(response, time.monotonic() - start)

    async def count_text_tokens(self, text: str) -> int:
        """Tokens of a text, by the model's own tokenizer."""
        return len(self._model.codec.encode(Prompt(text=text))) if text else 0

    def max_tokens(self) -> int:
        """Longest answer where none is asked for; the model's context may end it earlier."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """Requests at a time: one batch."""
        return self._engine.batch_size

    def collapse_system_messages(self) -> bool:
        """Chat templates know one system turn."""
        return True

    def _answers(self, rows: list[Row]) -> list[Response | SteerwellError]:
        """The rows in one batch; if it is refused, each alone, so that a bad row spoils no other."""
        try:
            prompts, samplings = [prompt for prompt, _ in rows], [sampling for _, sampling in rows]
            return [*self._engine.generate(prompts, samplings, self._edit)]
        except SteerwellError as error:
            return [error] if len(rows) == 1 else [outcome for row in rows for outcome in self._answers([row])]

    def _output(self, response: Response, seconds: float) -> ModelOutput:
        receipt = proven(response.receipt, self._edit)
        read, written = len(self._model.codec.encode(response.prompt)), len(response.token_ids)
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=response.text, model=self.model_name, source="generate"),
                    stop_reason=_stop_reason(response),
                )
            ],
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
            time=seconds,
            metadata={"steering": receipt_row(receipt), "sampling": asdict(response.sampling)},
        )


def prompt_of(messages: Sequence[ChatMessage]) -> Prompt:
    """Inspect's messages as a prompt.

    Raises:
        ArgumentError: a tool's message or call, content other than text, or nothing to answer.
    """
    turns = [_turn(message) for message in messages]
    prefill = turns.pop().content if turns and turns[-1].role == "assistant" else ""
    return Prompt(tuple(turns), prefill=prefill)


def sampling_of(config: GenerateConfig) -> Sampling:
    """Inspect's settings as a `Sampling`; without a seed, a sampled answer draws one, which its metadata tells.

    Raises:
        ArgumentError: a setting that the engine does not have, or one out of range.
    """
    asked = [name for name in REFUSED if getattr(config, name)]
    if (config.num_choices or 1) > 1:
        asked.append("num_choices")
    if asked:
        raise ArgumentError(f"{asked[0]}: this provider cannot do it; leave it out (for more answers use epochs)")
    temperature = config.temperature or 0.0
    drawn = secrets.randbelow(2**31) if temperature else 0
    return Sampling(
        temperature,
        1.0 if config.top_p is None else config.top_p,
        MAX_TOKENS if config.max_tokens is None else config.max_tokens,
        tuple(config.stop_seqs or ()),
        drawn if config.seed is None else config.seed,
    )


def _stop_reason(response: Response) -> StopReason:
    if response.finish_reason == "stop":
        return "stop"
    return "max_tokens" if len(response.token_ids) >= response.sampling.max_new_tokens else "model_length"


def _turn(message: ChatMessage) -> Message:
    parts = message.content_list
    if message.role == "tool" or (isinstance(message, ChatMessageAssistant) and message.tool_calls):
        raise ArgumentError("messages: got a tool's message or call; this provider calls no tools")
    if not all(isinstance(part, ContentText) for part in parts):
        kinds = ", ".join(sorted({part.type for part in parts} - {"text"}))
        raise ArgumentError(f"messages: got content of type {kinds}; this provider reads text only")
    return Message(message.role, message.text)
