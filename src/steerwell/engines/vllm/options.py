"""What vLLM is started with: options of a caller's own, and what is read from the model's folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import transformers

from steerwell.core.errors import ArgumentError

TAKEN = {  # options of vLLM that are not for the caller to give, and why
    "model": "it is 'name'",
    "dtype": "it is 'dtype'",
    "revision": "it is 'revision'",
    "trust_remote_code": "it is 'trust_remote_code'",
    "tensor_parallel_size": "it is 'tensor_parallel'",
    "additional_config": "it says what is reserved for steering, see 'settings'",
    "async_scheduling": "tokens after an answer's end would be in its receipt",
    "generation_config": "answers are drawn as the caller says",
    "logprobs_mode": "log-probabilities are the model's, before temperature",
}


def checked_options(options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Options for vLLM, unless one is unknown or not for the caller to give."""
    for name in options:
        if name not in known:
            raise ArgumentError(f"options: vLLM's EngineArgs has no {name!r}; leave it out")
        if name in TAKEN:
            raise ArgumentError(f"options: {name!r} cannot be given here ({TAKEN[name]}); leave it out")
    return dict(options)


def saved_dtype(config: Any) -> str:
    """The type that the weights were saved in; vLLM's own `auto` would halve float32."""
    found = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return "auto" if found is None else str(found).removeprefix("torch.")


def end_ids(place: str, config: Any, tokenizer: Any, revision: str | None) -> frozenset[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's, as in the Hugging Face engine."""
    try:
        listed = transformers.GenerationConfig.from_pretrained(place, revision=revision or "main").eos_token_id
    except OSError:
        listed = getattr(config, "eos_token_id", None)
    several = listed if isinstance(listed, (list, tuple)) else [listed]
    return frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)
