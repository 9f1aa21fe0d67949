"""uvicorn around the app: an address first, and on SIGTERM every request that is under way is answered."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from steerwell.apps.server.app import create_app
from steerwell.apps.server.guard import Connection
from steerwell.apps.server.service import Service
from steerwell.core.errors import ArgumentError

MMAP_THRESHOLD, LARGE = -3, 4 << 20  # glibc's `M_MMAP_THRESHOLD`; bytes
CLOSING_SECONDS = 10  # for clients to read the rest of their answers
SEND_BUFFER = 131_072  # bytes that the system keeps per client; more, and one that does not read goes unnoticed
KEEP_ALIVE = 30  # seconds that an idle connection stays open


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything slow is done; port 0 takes a free one.

    Raises:
        ArgumentError: the address is not to be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio sends what there is at once (TCP_NODELAY) only where a socket names its protocol.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # its connections inherit it
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise ArgumentError(f"--host, --port: {host}, {port} cannot be used: {error}; choose another") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(service: Service, listener: socket.socket, root_path: str, announce: Callable[[], None]) -> bool:
    """Serve until a signal ends it; false if it could not start.

    Args:
        service: what to serve.
        listener: where.
        root_path: what a proxy in front cuts off from the paths.
        announce: called once requests are taken.
    """
    _give_memory_back()
    config = uvicorn.Config(
        create_app(service),
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=root_path,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    server = _Server(config, service, announce)
    server.run(sockets=[listener])
    return server.started


def _give_memory_back() -> None:
    """Have glibc map large buffers one by one, so that what a batch no longer needs goes back to the system.

    Left alone it raises the bound from what it sees, and keeps buffers of all sizes in one heap with holes in it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


class _Server(uvicorn.Server):
    """uvicorn, which on a signal first has the scheduler finish what it has, and then stops; a second signal hurries.

    While it finishes, new requests get 429 and `/readyz` gets 503, so that a load balancer goes elsewhere.
    """

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._announce = service, announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM or SIGINT."""
        self._signals += 1
        if self._signals > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def finish() -> None:
            await self._service.scheduler.drain(self._service.limits.timeout)
            self.should_exit = True

        self._draining = asyncio.ensure_future(finish())
