"""What a server takes on at a time, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, fields

from steerwell.core.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server.

    Attributes:
        batch: answers that decode together.
        batch_tokens: answers x the longest one's prompt and tokens to come; bounds the memory of keys and values.
        prefill_tokens: tokens of prompts that are read in one go while others decode (padding counts); one prompt may
            be longer.
        queue: answers that wait; more are refused.
        timeout: seconds that a request may take, waiting included.
        max_tokens: of an answer.
        choices: answers to one request.
        body: bytes of a request.
    """

    batch: int = 64
    batch_tokens: int = 65_536
    prefill_tokens: int = 8_192
    queue: int = 256
    timeout: float = 120.0
    max_tokens: int = 2_048
    choices: int = 16
    body: int = 1_000_000

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise ArgumentError(f"{item.name}: got {value!r}; expected a number above 0")
