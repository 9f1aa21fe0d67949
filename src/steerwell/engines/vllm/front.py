"""What changes in vLLM's front ends: they refuse what cannot be steered as asked, or under the server's policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from steerwell.core.errors import ArgumentError
from steerwell.engines.vllm import policy
from steerwell.engines.vllm.wire import KEY, Settings, decode

MARK = "_steerwell"  # on functions that are ours already
BEAMS = {  # requests that can ask for beam search
    "openai.chat_completion": "ChatCompletionRequest",
    "openai.completion": "CompletionRequest",
    "speech_to_text.transcription": "TranscriptionRequest",
    "speech_to_text.translation": "TranslationRequest",
}
REGISTERED: set[str] = set()  # names of vectors that this process has registered with its workers


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put `wrap(original)` in place of a function, once."""
    original = getattr(owner, name)
    if not hasattr(original, MARK):
        wrapped = functools.wraps(original)(wrap(original))
        setattr(wrapped, MARK, True)
        setattr(owner, name, wrapped)


def checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every request is looked at before it becomes one of the engine core's."""

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *rest: Any, **named: Any) -> Any:
        with _refusing():
            check_request(self.vllm_config, params, resumable=bool(named.get("resumable")))
        return original(self, request_id, prompt, params, *rest, **named)

    return process_inputs


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except ArgumentError as error:
        raise _refusal(str(error)) from error


def _refusal(message: str) -> ArgumentError:
    """The error as vLLM's server knows it, too: it answers with status 400 and this message."""
    from vllm.exceptions import VLLMValidationError  # type: ignore[import-not-found,unused-ignore]

    class RefusedError(ArgumentError, VLLMValidationError):  # type: ignore[misc,unused-ignore]
        parameter, value = KEY, None

        def __str__(self) -> str:
            return message

    return RefusedError(message)


def check_request(config: Any, params: Any, *, resumable: bool = False) -> None:
    """Refuse a request that cannot be steered as it asks.

    Raises:
        ArgumentError: why not.
    """
    settings, extra = Settings.of(config.additional_config), getattr(params, "extra_args", None) or {}
    if settings is not None and settings.policy is not None:
        policy.check_free(settings, params, resumable=resumable)
    if KEY not in extra:
        return
    if settings is None:
        raise ArgumentError(f"this server was started without steering; give it additional_config={{'{KEY}': {{}}}}")
    if policy.asks_for_none(settings, extra[KEY]):
        return
    text = config.model_config.hf_text_config
    request = decode(extra[KEY], int(text.hidden_size), int(text.num_hidden_layers), settings, REGISTERED)
    if params.n != 1 and (request.ticket or request.read):
        raise ArgumentError(f"n: got {params.n}; what is kept under a ticket is one answer's, so send several requests")
    if resumable:
        raise ArgumentError("a request that is sent piece by piece cannot be steered")
    if request.read:
        params.skip_reading_prefix_cache = True  # every token has to run


def started(original: Callable[..., Any]) -> Callable[..., Any]:
    """A front end does not start with a policy that cannot be, and refuses beam search that would lose steering."""
    from vllm.logger import init_logger  # type: ignore[import-not-found,unused-ignore]

    from steerwell.engines.vllm.about import info_of

    def __init__(self: Any, config: Any, *arguments: Any, **named: Any) -> None:  # noqa: N807 - it takes that one's place
        original(self, config, *arguments, **named)
        for module, owner in BEAMS.items():
            protocol = import_module(f"vllm.entrypoints.{module}.protocol")
            replace(getattr(protocol, owner), "to_beam_search_params", _no_lost_steering)
        settings = Settings.of(config.additional_config)
        if settings is not None and settings.policy is not None:
            policy.vectors_for(settings, info_of(config))
            init_logger("vllm.steerwell").info(policy.meaning(settings))

    return __init__


def _no_lost_steering(original: Callable[..., Any]) -> Callable[..., Any]:
    """Beam search leaves `vllm_xargs` out: the answer would be unsteered."""

    def to_beam_search_params(self: Any, *arguments: Any, **named: Any) -> Any:
        if KEY in (self.vllm_xargs or {}):
            raise _refusal(f"use_beam_search: beam search does not take {KEY!r}; leave one of them out")
        return original(self, *arguments, **named)

    return to_beam_search_params


def no_wrong_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    """What beam search of either kind calls first."""

    def resolve_watermarking(self: Any, params: Any) -> Any:
        settings = Settings.of(self.vllm_config.additional_config)
        if settings is not None and hasattr(params, "beam_width"):
            with _refusing():
                policy.check_beams(settings)
        return original(self, params)

    return resolve_watermarking
