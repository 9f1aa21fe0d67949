"""Continuous batching: answers that are steered differently decode together; new ones join while others go on.

One thread owns the model. Requests come from an event loop and get their pieces there. transformers' own continuous
batching is not used: it packs the tokens of all requests into one row, whose edits would need to know which token is
whose, draws all of them from one generator, and runs other attention kernels than the engine, so that an answer would
depend on what else the server does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from anyio import to_thread

from steerwell.core.errors import (
    ArgumentError,
    EngineError,
    EngineGoneError,
    OverloadedError,
    SteerwellError,
    TimedOutError,
)
from steerwell.engines.base import Asked, Piece, proven
from steerwell.engines.rows import Row, ServingEngine
from steerwell.serving.limits import Limits

log = logging.getLogger("steerwell.serving")

PATIENCE = 8  # steps that a nearly full batch waits for places, so that several prompts are read in one pass
LONG = 20_000  # characters or tokens of prompts that are worth a thread to read them in
Event = tuple[int, Piece]


class Observer(Protocol):
    """Who is told of every step, from the scheduler's thread."""

    def stepped(self, rows: int, waiting: int, seconds: float, tokens: int) -> None:
        """`tokens` were generated for `rows` answers in `seconds`, while `waiting` more were in the queue."""
        ...


class Ticket:
    """A request under way: iterate over (index of the asked, its next piece) until every answer has ended.

    Iterating raises the first error: `TimedOutError`, or `EngineError` for an answer that could not be steered. What
    nobody takes is kept, at most one piece a token.
    """

    def __init__(self, rows: Sequence[Row], client: str, seconds: float, stream: bool) -> None:
        self.rows, self.client, self.stream = tuple(rows), client, stream
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.over = False  # failed, or nobody waits any more
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | SteerwellError] = asyncio.Queue()
        self._left = len(self.rows)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self._left:
            event = await self._events.get()
            if isinstance(event, SteerwellError):
                raise event
            if event[1].answer is not None:
                self._left -= 1
            yield event

    def cancel(self) -> None:
        """Nobody waits any more: the rows are let go at the next step."""
        self.over = True

    def put(self, event: Event | SteerwellError) -> None:
        """Hand over an event; on the event loop."""
        self._events.put_nowait(event)


@dataclass(slots=True, eq=False)
class _Job:
    """One answer of a ticket, waiting or decoding."""

    ticket: Ticket
    index: int

    @property
    def row(self) -> Row:
        return self.ticket.rows[self.index]

    @property
    def size(self) -> int:
        """Columns that the row may come to need."""
        return len(self.row.prompt_ids) + self.row.limit


@dataclass(slots=True)
class _Queue:
    """Waiting answers: clients take turns, each client's own wait in order."""

    lines: OrderedDict[str, deque[_Job]] = field(default_factory=OrderedDict)
    size: int = 0

    def put(self, job: _Job) -> None:
        self.lines.setdefault(job.ticket.client, deque()).append(job)
        self.size += 1

    def first(self) -> _Job | None:
        """Whose turn it is; answers that nobody waits for are left out."""
        while self.lines:
            client, line = next(iter(self.lines.items()))
            while line and line[0].ticket.over:
                line.popleft()
                self.size -= 1
            if line:
                return line[0]
            del self.lines[client]
        return None

    def pop(self) -> None:
        """Take away the first; its client goes to the end."""
        client, line = next(iter(self.lines.items()))
        line.popleft()
        self.size -= 1
        self.lines.move_to_end(client)
        if not line:
            del self.lines[client]

    def __iter__(self) -> Iterator[_Job]:
        return (job for line in self.lines.values() for job in line)


class Scheduler:
    """Answers requests in one running batch.

    Args:
        engine: the model.
        limits: how much at a time.
        observer: who is told of every step.
    """

    def __init__(self, engine: ServingEngine, limits: Limits, observer: Observer | None = None) -> None:
        self._engine, self._limits, self._observer = engine, limits, observer
        self._batch = engine.batch()
        self._jobs: dict[Row, _Job] = {}  # those in the batch
        self._queue = _Queue()
        self._wake = threading.Condition()
        self._accepting = self._running = False
        self._thread = threading.Thread(target=self._run, name="steerwell-scheduler", daemon=True)
        self._pace = 0.0  # seconds per answer, lately
        self._steps = 0  # since somebody joined

    # On the event loop -----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the scheduler runs, and what it runs the model on."""
        return self._thread.is_alive() and not self._batch.gone

    @property
    def ready(self) -> bool:
        """Whether it takes requests: it runs, is not about to stop, and the queue has room."""
        return self.alive and self._accepting and self._queue.size < self._limits.queue

    def start(self) -> None:
        """Begin."""
        self._accepting = self._running = True
        self._thread.start()

    async def submit(
        self, asked: Sequence[Asked], client: str = "", timeout: float | None = None, *, stream: bool = True
    ) -> Ticket:
        """Queue the answers of one request.

        Args:
            asked: the answers that are wanted.
            client: who asks; clients take turns.
            timeout: seconds from now; at most the server's.
            stream: whether pieces are wanted as they come, or each answer as one piece.

        Raises:
            ArgumentError: too many answers at once, or see `HFEngine.row`.
            OverloadedError: the queue is full, or the server is about to stop.
            EngineGoneError: what runs the model has ended.
        """
        if len(asked) > self._limits.choices:
            raise ArgumentError(f"n: {len(asked)} answers at once; this server gives {self._limits.choices} at most")
        self._require_room(len(asked))
        if sum(_length(item) for item in asked) > LONG:
            rows = await to_thread.run_sync(self._rows, asked)
        else:
            rows = self._rows(asked)
        seconds = self._limits.timeout if timeout is None else min(timeout, self._limits.timeout)
        ticket = Ticket(rows, client, seconds, stream)
        with self._wake:
            self._require_room(len(rows))
            for index in range(len(rows)):
                self._queue.put(_Job(ticket, index))
            self._wake.notify()
        return ticket

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait until those under way have ended, at most so long."""
        self._accepting = False
        end = time.monotonic() + seconds
        while (self._jobs or self._queue.size) and self.alive and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread; what is under way fails."""
        with self._wake:
            self._accepting = self._running = False
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _rows(self, asked: Sequence[Asked]) -> list[Row]:
        return [self._engine.row(item) for item in asked]

    def _require_room(self, wanted: int) -> None:
        if self._batch.gone:
            raise EngineGoneError("the processes that run the model have ended; start the server again")
        if not self._accepting:
            raise OverloadedError("this server is about to stop; ask another one, or again in a while", 5)
        if self._queue.size + wanted > self._limits.queue:
            raise OverloadedError(
                f"{self._queue.size} answers wait already and {wanted} more are asked for; this server lets "
                f"{self._limits.queue} wait: ask again later",
                self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Seconds until the queue has moved on by a batch, as things go lately."""
        return min(max(math.ceil(self._pace), 1), 60)

    # In the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._running and not self._jobs and self._queue.first() is None:
                    self._wake.wait()
            if not self._running:
                return self._fail(EngineError("the server stopped before this was answered; ask again"))
            try:
                self._turn()
            except EngineGoneError as error:
                log.exception("the model is gone; this server can answer nothing any more")
                self._accepting = self._running = False
                return self._fail(error)
            except Exception as error:  # whatever a step meets, the server goes on with the next requests
                log.exception("a step failed")
                self._fail(EngineError(f"a step of the model failed ({type(error).__name__}); ask again"))

    def _turn(self) -> None:
        """Let go what is over, let in what fits, and grow every answer by a token."""
        began, tokens = time.perf_counter(), 0
        self._expire()
        joined = self._joined()
        if joined:
            tokens += self._batch.admit([job.row for job in joined])
            self._deliver(joined)
        grown = list(self._jobs.values())
        if grown:
            tokens += self._batch.step()
            self._deliver(grown)
        if not self._jobs:
            self._batch.rest()
        if self._observer is not None:
            self._observer.stepped(len(grown), self._queue.size, time.perf_counter() - began, tokens)

    def _expire(self) -> None:
        """Fail the requests whose time is up, and let go the rows that nobody waits for."""
        now = time.monotonic()
        with self._wake:
            late = {id(job.ticket): job.ticket for job in self._known() if not job.ticket.over and now > job.ticket.end}
        for ticket in late.values():
            ticket.over = True
        error = TimedOutError("this was not answered in its time; ask for fewer tokens, or raise 'timeout'")
        self._hand_out([(ticket, error) for ticket in late.values()])
        gone = [job.row for job in self._jobs.values() if job.ticket.over]
        self._batch.drop(gone)
        for row in gone:
            del self._jobs[row]

    def _joined(self) -> list[_Job]:
        """Waiting answers that fit beside those in the batch; the first in line is never passed over."""
        limits, padded = self._limits, self._batch.padded
        joined: list[_Job] = []
        if self._jobs and not (self._batch.joins and (not padded or self._worth_it())):
            return []
        widest = max((job.size for job in self._jobs.values()), default=0)
        longest = 0
        with self._wake:
            while len(self._jobs) < limits.batch and (job := self._queue.first()) is not None:
                widest, longest = max(widest, job.size), max(longest, len(job.row.prompt_ids))
                if padded and self._jobs and widest * (len(self._jobs) + 1) > limits.batch_tokens:
                    break
                if padded and joined and longest * (len(joined) + 1) > limits.prefill_tokens:
                    break
                self._queue.pop()
                self._jobs[job.row] = job
                joined.append(job)
        return joined

    def _worth_it(self) -> bool:
        """Whether to read prompts now: under load a few places at a time are filled, as every pass has its price."""
        self._steps += 1
        free = self._limits.batch - len(self._jobs)
        enough = free >= min(self._queue.size, self._limits.batch // 12) or self._steps >= PATIENCE
        if enough:
            self._steps = 0
        return enough

    def _deliver(self, jobs: Sequence[_Job]) -> None:
        """Hand out what a step has added; an answer that cannot be steered fails, it never comes unsteered."""
        self._batch.settle()
        events: list[tuple[Ticket, Event | SteerwellError]] = []
        for job in jobs:
            row, ticket = job.row, job.ticket
            if row.finish is not None:
                del self._jobs[row]
                self._pace = 0.9 * self._pace + 0.1 * (time.monotonic() - ticket.began)
                row.fault = row.fault or _unproven(row)
            if row.fault is not None:
                ticket.over = True
                events.append((ticket, row.fault))
            elif ticket.stream or row.finish is not None:
                piece = row.take()
                if piece is not None:
                    events.append((ticket, (job.index, piece)))
        self._hand_out(events)

    def _fail(self, error: SteerwellError) -> None:
        """Fail what is in the batch, and what waits too if the server stops; begin with an empty batch.

        The old one lets its rows go, so that an engine that holds on to them does not go on with them.
        """
        with self._wake:
            failed = self._known() if not self._running else list(self._jobs.values())
        tickets = {id(job.ticket): job.ticket for job in failed if not job.ticket.over}
        for ticket in tickets.values():
            ticket.over = True
        with suppress(Exception):  # whatever failed may fail again
            self._batch.drop(list(self._jobs))
        self._jobs.clear()
        self._batch = self._engine.batch()
        self._hand_out([(ticket, error) for ticket in tickets.values()])

    def _known(self) -> list[_Job]:
        return [*self._jobs.values(), *self._queue]

    def _hand_out(self, events: Sequence[tuple[Ticket, Event | SteerwellError]]) -> None:
        """Give events to their tickets, one call into each event loop."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event | SteerwellError]]] = {}
        for ticket, event in events:
            loops.setdefault(ticket.loop, []).append((ticket, event))
        for loop, mine in loops.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, mine)


def _put(events: Sequence[tuple[Ticket, Event | SteerwellError]]) -> None:
    for ticket, event in events:
        ticket.put(event)


def _unproven(row: Row) -> EngineError | None:
    """What is wrong with a finished answer that was not steered as asked."""
    try:
        proven(row.receipt, row.edit)
    except EngineError as error:
        return error
    return None


def _length(asked: Asked) -> int:
    prompt = asked.prompt
    return len(prompt.text or "") + len(prompt.tokens or ()) + sum(len(turn.content) for turn in prompt.messages)
