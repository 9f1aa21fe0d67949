"""One request under way: its pieces become a whole reply or the chunks of a stream."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from steerwell.apps.server.errors import refusal_of
from steerwell.apps.server.replies import Choice, Form, SteeringReply, quoted, traced, usage
from steerwell.apps.server.schemas import Generation
from steerwell.apps.server.service import Pending, Service, Visit
from steerwell.core.errors import ArgumentError, EngineError, SteerwellError, TimedOutError
from steerwell.core.records import Edit, Prompt, Sampling, receipt_row
from steerwell.engines.base import Asked, Piece
from steerwell.serving.catalog import Steering, flagged

T = TypeVar("T")
log = logging.getLogger("steerwell.server")


class ClientGoneError(Exception):
    """The client has closed the connection; nobody reads what is answered."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for, beside what both kinds share.

    Attributes:
        form: how the answer is written.
        prompts: what is asked.
        leads: per prompt, what an echo gives back in front of the answer.
        max_tokens: of an answer; None: as many as there is room for.
        logprobs: alternatives told per token; None: no log-probabilities.
        echo: whether the prompt's tokens are told too.
    """

    form: Form
    prompts: Sequence[Prompt]
    leads: Sequence[str]
    max_tokens: int | None
    logprobs: int | None
    echo: bool = False


class Exchange:
    """A request that the scheduler has taken; `begin` makes it."""

    def __init__(
        self, service: Service, visit: Visit, request: Generation, wish: Wish, steering: Steering, ticket: Pending
    ) -> None:
        self._service, self._visit, self._request = service, visit, request
        self._form, self._steering, self._ticket = wish.form, steering, ticket
        self._per_prompt = request.n or 1
        self._tells = request.steering_trace or wish.logprobs is not None
        self._choices = [Choice(lead) for lead in wish.leads for _ in range(self._per_prompt)]
        self._flags: list[bool | None] = [None] * len(self._choices)
        self._head: dict[str, Any] = {
            "id": f"{wish.form.prefix}{secrets.token_hex(12)}",
            "object": wish.form.kind,
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": service.fingerprint,
        }

    async def reply(self, receive: Receive) -> Response:
        """The response: a whole one, or a stream once its first piece is there (until then an error has a status)."""
        if not self._request.stream:
            return Response(await self._guarded(receive, self._whole()), media_type="application/json")
        events = self._events()
        first = await self._guarded(receive, anext(events))
        return EventStream(self, first, events)

    async def stream(self, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
        """Send a stream until it ends or nobody reads it."""
        try:
            await self._guarded(receive, work)
        except ClientGoneError:
            return

    async def _guarded(self, receive: Receive, work: Awaitable[T]) -> T:
        """The result of some work; if it fails, or the client goes before it is done, the batch is left."""
        try:
            return await _unless_gone(receive, work)
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Leave the batch, and note why."""
        self._ticket.cancel()
        self._visit.reason = _reason(error)

    async def _whole(self) -> str:
        async for index, piece in self._ticket:
            self._choices[index].tokens += piece.tokens
            self._note(index, piece)
        body = {
            **self._head,
            "choices": [self._form.whole(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage(self._choices, self._per_prompt),
            "steering": self._told(self._request.steering_trace),
        }
        return quoted(body)

    async def _events(self) -> AsyncIterator[str]:
        """Server-sent events. The last one before `[DONE]` has `steering`, and the usage where that was asked for."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        head = quoted(self._head | {"object": self._form.chunk_kind})[:-1]
        tail = ',"usage":null}\n\n' if with_usage else "}\n\n"

        def event(choice: str, steering: str = "") -> str:
            return f'data: {head},"choices":[{choice}]{steering}{tail}'

        opening = [self._form.opening(index, choice) for index, choice in enumerate(self._choices)]
        fresh, left = "".join(event(choice) for choice in opening if choice), len(self._choices)
        async for index, piece in self._ticket:
            choice = self._choices[index]
            if piece.text or (piece.tokens and self._tells):
                delta = self._form.delta(index, choice, piece.text, piece.tokens)
                fresh += event(delta, self._trace(piece) if self._request.steering_trace else "")
            self._note(index, piece)
            if piece.answer is not None:
                left -= 1
                steering = "" if left or with_usage else f',"steering":{quoted(self._told(False))}'
                fresh += event(self._form.closing(index, piece.answer.response.finish_reason), steering)
            yield fresh
            fresh = ""
        if with_usage:
            last = {"usage": usage(self._choices, self._per_prompt), "steering": self._told(False)}
            fresh = f'data: {head},"choices":[],{quoted(last)[1:]}\n\n'
        yield fresh + "data: [DONE]\n\n"

    def _note(self, index: int, piece: Piece) -> None:
        """Keep what a piece says of the whole, for the reply, the metrics and the log."""
        visit, answer = self._visit, piece.answer
        if visit.first_token is None and self._request.stream:
            visit.first_token = visit.seconds()
            self._service.monitor.first_token(visit.first_token)
        if answer is None:
            return
        self._choices[index].answer = answer
        self._flags[index] = flagged(answer.response.receipt, self._steering)
        visit.answers.append(answer)
        visit.flagged.append(self._flags[index])
        self._service.monitor.answered(self._steering, answer, visit.seconds(), self._flags[index])

    def _trace(self, piece: Piece) -> str:
        return f',"steering":{{"tokens":{quoted(traced(piece.tokens))}}}'

    def _told(self, tokens: bool) -> SteeringReply:
        edit = self._steering.edit
        told = SteeringReply(
            name=self._steering.name,
            edit_id=edit.id if edit else None,
            monitor=self._steering.monitors,
            receipts=[receipt_row(choice.finished.response.receipt) for choice in self._choices],
            flagged=self._flags,
        )
        if tokens:
            told["tokens"] = [traced(choice.tokens) for choice in self._choices]
        return told


class EventStream(Response):
    """A stream of server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, first: str, events: AsyncIterator[str]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._first, self._events = exchange, first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await self._exchange.stream(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
        try:
            async for text in self._events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except Exception as error:  # the status is out: the error is an event
            if not isinstance(error, SteerwellError):
                log.exception("a stream failed")
            self._exchange.fail(error)
            fault = f"data: {quoted(refusal_of(error).body)}\n\n"
            await send({"type": "http.response.body", "body": fault.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def begin(service: Service, visit: Visit, request: Generation, wish: Wish) -> Exchange:
    """Check a request, find its steering and queue it.

    Raises:
        SteerwellError: it cannot be answered as it is, or not now.
    """
    steering = visit.steering = service.catalog.resolve(request.model, request.steering)
    count, limits = request.n or 1, service.limits
    if len(wish.prompts) * count > limits.choices:
        raise ArgumentError(
            f"n: {len(wish.prompts)} prompts with {count} answers each; this server gives {limits.choices} at most "
            "to one request; send several"
        )
    longest = limits.max_tokens if wish.max_tokens is None else wish.max_tokens
    if longest > limits.max_tokens:
        raise ArgumentError(f"max_tokens: got {longest}; this server gives {limits.max_tokens} at most; ask for fewer")
    drawn = Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=request.top_p or 1.0,
        max_new_tokens=longest,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        seed=secrets.randbits(48) if request.seed is None else request.seed % 2**63,
    )
    echo = wish.echo and wish.logprobs is not None
    if echo and steering.edit and not steering.monitors:
        _require_echo(steering.edit)
    asked = [
        Asked(
            prompt,
            replace(drawn, seed=drawn.seed + place),
            steering.edit,
            logprobs=wish.logprobs,
            echo=echo,
            trace=request.steering_trace,
        )
        for prompt in wish.prompts
        for place in range(count)
    ]
    who = visit.client or visit.address
    ticket = await service.scheduler.submit(asked, who, request.timeout, stream=bool(request.stream))
    return Exchange(service, visit, request, wish, steering, ticket)


def _require_echo(edit: Edit) -> None:
    """Raise `ArgumentError` if a prompt's log-probabilities would be told as if it had not been steered."""
    late = [term for term in edit.terms if term.position == "response"]
    if late:
        raise ArgumentError(
            f"echo: the prompt's log-probabilities would be unsteered, since layer {late[0].layer} is steered at "
            "position 'response' only; steer at position 'all', or leave out 'echo' or 'logprobs'"
        )


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work; `ClientGoneError` if the client goes before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _reason(error: BaseException) -> str:
    """A failure's name, as in `monitoring.FAILED`."""
    if isinstance(error, (ClientGoneError, asyncio.CancelledError)):
        return "cancelled"
    if isinstance(error, TimedOutError):
        return "timed_out"
    return "engine" if isinstance(error, EngineError) else "other" if isinstance(error, SteerwellError) else "internal"
