"""What every request passes: the host's name, the size and pace of its body, headers for browsers, log and metrics.

And what ends a connection whose client neither sends a request nor reads its answer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from steerwell.apps.server.errors import Refusal, refusal_of
from steerwell.apps.server.exchange import ClientGoneError
from steerwell.apps.server.service import Service, Visit

if TYPE_CHECKING:
    from asyncio import Protocol as HttpProtocol
else:
    HttpProtocol = AutoHTTPProtocol

BODY_SECONDS = 30.0  # for a body to arrive
ADMIN_BODY, ADMIN_SECONDS = 256_000_000, 600.0  # directions of large models are uploaded
STUCK_SECONDS = 20.0  # for a client to read something of what waits for it, or to send a request's head
QUIET = {"/livez", "/readyz", "/metrics"}  # asked for all day: logged only if something is wrong
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
REASONS = {
    400: "invalid",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    413: "too_large",
    429: "overloaded",
}
log = logging.getLogger("steerwell.server")


class Guard:
    """Middleware around all routes.

    Args:
        app: the routes.
        service: what they work with.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, address = Headers(scope=scope), scope.get("client") or ("", 0)
        visit = Visit(f"req_{secrets.token_hex(12)}", address[0], time.perf_counter())
        scope.setdefault("state", {})["visit"] = visit
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        uploads = path.startswith("/admin/")  # read only after the key was seen
        limit = ADMIN_BODY if uploads else self._service.limits.body
        body = _Body(receive, limit, ADMIN_SECONDS if uploads else BODY_SECONDS)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                _dress(message, visit)
            await send(message)

        try:
            self._require_host(headers.get("host", ""))
            _require_size(headers.get("content-length", "0"), limit)
            await self._app(scope, body, answer)
        except ClientGoneError:
            return None  # there is nobody to tell
        except Exception as error:  # the last place where an error can be told in OpenAI's schema
            refusal = refusal_of(error)
            if not isinstance(error, Refusal):
                log.exception("request %s failed", visit.id)
                visit.reason = "internal"
            if visit.status:
                raise
            await refusal.response()(scope, receive, answer)
        finally:
            self._tell(visit, path)

    def _require_host(self, given: str) -> None:
        """Raise `Refusal` for a foreign name: a page whose name was made to point here must not speak to the server."""
        known = self._service.hosts
        name = given.rpartition(":")[0] if given.rpartition(":")[2].isdigit() else given
        if known is not None and name.lower().strip("[]") not in known:
            raise Refusal(
                421, f"host: got {name[:80]!r}; this server answers as {', '.join(sorted(known))}; see --allow-host"
            )

    def _tell(self, visit: Visit, path: str) -> None:
        """Log and count a request that has ended."""
        service, status = self._service, visit.status or 499
        if visit.reason is not None:
            service.monitor.failed(visit.reason)
        elif status >= 400:
            visit.reason = REASONS.get(status, "other")
            service.monitor.refused(visit.reason)
        if path in QUIET and status < 400:
            return
        service.log.write(
            id=visit.id,
            client=visit.client,
            status=status,
            seconds=visit.seconds(),
            first_token=visit.first_token,
            steering=visit.steering,
            answers=visit.answers,
            flagged=visit.flagged,
            reason=visit.reason,
        )


class _Body:
    """A request's body, counted and timed while it arrives."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self._size, self._ends, self._whole = 0, time.monotonic() + seconds, False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(self._ends - time.monotonic(), 0)):
                message = await self._receive()
        except TimeoutError as error:
            raise _closing(408, f"the body did not arrive within {self._seconds:g} seconds; send it faster") from error
        self._size += len(message.get("body", b""))
        _require_size(str(self._size), self._limit)
        self._whole = not message.get("more_body", False)
        return message


class Connection(HttpProtocol):
    """uvicorn's connection, cut off when its client stops: one that sends no request, or does not read its answer.

    Cutting it off ends the request (`http.disconnect`), and that lets its place in the batch go.
    """

    _head: asyncio.TimerHandle | None = None  # runs while a request's head is awaited
    _stuck: asyncio.TimerHandle | None = None  # runs while the client has much to read

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._head = self._cut_off_later()

    def data_received(self, data: bytes) -> None:
        """Some of a request has come."""
        super().data_received(data)
        cycle = self.cycle  # type: ignore[attr-defined]
        if cycle is not None and not cycle.response_complete:
            _stop(self._head)
            self._head = None
        elif self._head is None:
            self._head = self._cut_off_later()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        self._stuck = self._cut_off_later()

    def resume_writing(self) -> None:
        """It has read most of what waited."""
        super().resume_writing()
        _stop(self._stuck)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        _stop(self._head)
        _stop(self._stuck)
        super().connection_lost(exc)

    def _cut_off_later(self) -> asyncio.TimerHandle:
        transport = self.transport  # type: ignore[attr-defined]
        return asyncio.get_running_loop().call_later(STUCK_SECONDS, transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _require_size(length: str, limit: int) -> None:
    if not length.isdecimal() or int(length[:20]) > limit:
        raise _closing(413, f"the body is larger than {limit} bytes, or its length is no number; send less")


def _closing(status: int, message: str) -> Refusal:
    """A refusal that ends the connection: more of the body may be under way."""
    return Refusal(status, message, headers={"connection": "close"})


def _dress(message: Message, visit: Visit) -> None:
    """Headers of every answer; a page's own stay."""
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    headers["x-request-id"] = visit.id
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
