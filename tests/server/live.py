"""A server of our own on a free port, in a thread, and what its tests serve."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import uvicorn

from steerwell.apps.server import run
from steerwell.apps.server.app import create_app
from steerwell.apps.server.guard import Connection
from steerwell.apps.server.service import Service
from steerwell.core.errors import SteerwellError
from steerwell.core.records import Response
from steerwell.engines.base import Answer, Asked, Piece
from steerwell.engines.hf import HFEngine
from steerwell.serving.catalog import Catalog, PolicySpec, Requests
from steerwell.serving.keys import Keys
from steerwell.serving.limits import Limits
from steerwell.serving.logs import RequestLog
from steerwell.serving.monitoring import Monitor
from steerwell.serving.scheduler import Scheduler
from tests.made import calibration, direction

MODEL = "steerwell-pilot"
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
HONEST = PolicySpec(direction="made", method="stmp", layers=(1,), strength=4)  # both change what the model says
BOUNDED = PolicySpec(direction="made", method="stmp", layers=(4,), strength=6, bounds={"strength": (2, 8)})


class FakeTicket:
    """Pieces of a `FakeScheduler`."""

    def __init__(self, pieces: AsyncIterator[tuple[int, Piece]]) -> None:
        self._pieces, self.cancelled = pieces, threading.Event()

    def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        return self._pieces

    def cancel(self) -> None:
        self.cancelled.set()


class FakeScheduler:
    """Answers every request with some pieces; `fault` comes after them in place of an answer.

    Args:
        pieces: texts.
        fault: raised after the pieces.
        endless: whether pieces are repeated for ever.
        refusal: raised when a request is queued.
    """

    def __init__(
        self,
        pieces: Sequence[str] = ("a", "b"),
        fault: Exception | None = None,
        endless: bool = False,
        refusal: SteerwellError | None = None,
    ) -> None:
        self._pieces, self._fault, self._endless, self._refusal = pieces, fault, endless, refusal
        self.alive, self.ready = False, True
        self.tickets: list[FakeTicket] = []
        self.asked: list[Asked] = []
        self.clients: list[str] = []

    def start(self) -> None:
        self.alive = True

    async def submit(
        self, asked: Sequence[Asked], client: str = "", timeout: float | None = None, *, stream: bool = True
    ) -> FakeTicket:
        if self._refusal is not None:
            raise self._refusal
        self.asked, self.clients = list(asked), [*self.clients, client]
        self.tickets.append(FakeTicket(self._run(asked)))
        return self.tickets[-1]

    async def _run(self, asked: Sequence[Asked]) -> AsyncIterator[tuple[int, Piece]]:
        while True:
            for text in self._pieces:
                await asyncio.sleep(0.001)
                yield 0, Piece(text)
            if not self._endless:
                break
        if self._fault is not None:
            raise self._fault
        for index, item in enumerate(asked):
            text = "".join(self._pieces) if index == 0 else ""
            response = Response(item.prompt, text, (1, 2), "stop", item.sampling)
            yield index, Piece("", answer=Answer(response, 3, 2))

    async def drain(self, seconds: float) -> None:
        self.ready = False

    def stop(self) -> None:
        self.alive = False


def catalog(engine: HFEngine, requests: Requests = "open", default: str | None = "honest", **more: Any) -> Catalog:
    """The direction `made` (random) and the policies `honest` and `bounded`."""
    made = Catalog(engine.info, MODEL, requests, default, more.pop("monitor_only", False))
    layers = tuple(calibration(boundary=0.1 * layer) for layer in range(engine.info.n_layers))
    made.put_direction("made", direction(model=engine.info, calibration=layers))
    made.put_policy("honest", more.pop("honest", HONEST))
    made.put_policy("bounded", BOUNDED)
    return made


def service(engine: HFEngine, **changes: Any) -> Service:
    """The bundled model with the catalog above, unless changes say otherwise."""
    limits, monitor = changes.get("limits", Limits()), Monitor()
    plain = Service(
        served=MODEL,
        info=engine.info,
        scheduler=changes.get("scheduler") or Scheduler(engine, limits, monitor),
        catalog=changes.get("catalog") or catalog(engine),
        monitor=monitor,
        log=RequestLog(),
        decode=engine.decode,
        hosts=LOCAL,
    )
    return replace(plain, **changes)


def keys(*names: str) -> Keys:
    """The key of NAME is `key-of-NAME-which-is-long`."""
    return Keys.of({name: key_of(name) for name in names})


def key_of(name: str) -> str:
    return f"key-of-{name}-which-is-long"


@contextlib.contextmanager
def live(served: Service) -> Iterator[str]:
    """Serve in a thread; gives the address."""
    listener = run.bound("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(served), http=Connection, ws="none", lifespan="on", log_config=None, timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            threading.Event().wait(0.01)
        yield run.url_of(listener)
    finally:
        server.should_exit = True
        thread.join(20)


def chat(base: str, text: str = "What is the capital of France?", **fields: Any) -> httpx.Response:
    """One chat request, greedy and short unless the fields say otherwise."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
    return post(base, "/v1/chat/completions", body | fields)


def complete(base: str, prompt: Any = "The capital of", **fields: Any) -> httpx.Response:
    """One completion request, greedy and short unless the fields say otherwise."""
    return post(base, "/v1/completions", {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8} | fields)


def post(base: str, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{base}{path}", json=body, timeout=60, **options)


def events(answer: httpx.Response) -> list[str]:
    """The data of a stream's events."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
