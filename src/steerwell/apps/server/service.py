"""What the routes work with."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from steerwell import __version__
from steerwell.core.records import ModelInfo
from steerwell.serving.keys import Keys
from steerwell.serving.limits import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from steerwell.engines.base import Answer, Asked, Piece
    from steerwell.serving.catalog import Catalog, Steering
    from steerwell.serving.logs import RequestLog
    from steerwell.serving.monitoring import Monitor


class Pending(Protocol):
    """A request under way: `steerwell.serving.scheduler.Ticket`."""

    def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Its pieces, as they come."""
        ...

    def cancel(self) -> None:
        """Nobody waits any more."""
        ...


class Scheduling(Protocol):
    """Who answers requests: `steerwell.serving.scheduler.Scheduler`."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        ...

    def start(self) -> None:
        """Begin."""
        ...

    async def submit(
        self, asked: Sequence[Asked], client: str = ..., timeout: float | None = ..., *, stream: bool = ...
    ) -> Pending:
        """Queue the answers of one request."""
        ...

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those under way."""
        ...

    def stop(self) -> None:
        """End."""
        ...


class Decode(Protocol):
    """Tokens to text."""

    def __call__(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        ...


@dataclass(frozen=True)
class Service:
    """One served model.

    Attributes:
        served: the model's name for clients.
        info: the model.
        scheduler: answers requests.
        catalog: who may ask for which steering.
        monitor: metrics.
        log: one line per request.
        decode: the tokenizer's.
        limits: how much at a time.
        keys: of clients; empty: everybody may ask.
        admins: of admins; empty: there is no admin API.
        report: a study's page to show.
        hosts: names under which the server answers, lower case, without port; None: under every name.
    """

    served: str
    info: ModelInfo
    scheduler: Scheduling
    catalog: Catalog
    monitor: Monitor
    log: RequestLog
    decode: Decode
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    admins: Keys = field(default_factory=Keys)
    report: Path | None = None
    hosts: frozenset[str] | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Of the model and this version: equal ones answer an equal request alike."""
        made = json.dumps([self.info.config_hash, self.info.signature, __version__])
        return f"fp_{hashlib.sha256(made.encode()).hexdigest()[:10]}"


@dataclass(slots=True)
class Visit:
    """One HTTP request, for its log line and the metrics.

    Attributes:
        id: its id.
        address: where it comes from.
        began: when, as `time.perf_counter` tells.
        client: name of the key that it presented.
        steering: what it is answered under.
        first_token: seconds to its first token.
        answers: those that are finished.
        flagged: per finished answer, whether it stayed misaligned.
        reason: why it was not answered, as in `monitoring.FAILED`.
        status: what was answered; 0: nothing yet.
    """

    id: str
    address: str
    began: float
    client: str | None = None
    steering: Steering | None = None
    first_token: float | None = None
    answers: list[Answer] = field(default_factory=list)
    flagged: list[bool | None] = field(default_factory=list)
    reason: str | None = None
    status: int = 0

    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.began
