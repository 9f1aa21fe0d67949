"""Clients that go away, do not read, or do not write: their requests end, and the others' do not."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from steerwell.apps.server import guard
from tests.server.live import MODEL, FakeScheduler, chat, events, live, service
from tests.server.test_refusals import fault

PATH = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
WAIT = 20  # seconds until a test gives up


@pytest.fixture
def endless(pilot) -> Iterator[tuple[str, FakeScheduler]]:
    """A server whose answers never end, in pieces of 16 kB."""
    fake = FakeScheduler(["x" * 16_000], endless=True)
    with live(service(pilot, scheduler=fake)) as base:
        yield base, fake
        for ticket in fake.tickets:
            assert ticket.cancelled.is_set()


def connected(base: str, buffer: int | None = None) -> socket.socket:
    """A bare connection."""
    url = httpx.URL(base)
    plug = socket.socket()
    if buffer is not None:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    plug.connect((url.host, url.port))
    plug.settimeout(WAIT)
    return plug


def request(body: bytes) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def test_a_client_that_leaves_a_stream_frees_its_place(endless: tuple[str, FakeScheduler]) -> None:
    base, fake = endless
    with httpx.stream("POST", f"{base}{PATH}", json=BODY, timeout=WAIT) as answer:
        parts = answer.iter_bytes()  # held: a forgotten iterator closes the connection
        assert next(parts).startswith(b"data: ")
        assert not fake.tickets[0].cancelled.is_set()
    assert fake.tickets[0].cancelled.wait(WAIT)
    until(lambda: 'failed_requests_total{reason="cancelled"} 1.0' in httpx.get(f"{base}/metrics").text)


def test_a_client_that_leaves_before_its_answer_frees_its_place(
    endless: tuple[str, FakeScheduler], caplog: pytest.LogCaptureFixture
) -> None:
    base, fake = endless
    plug = connected(base)
    plug.sendall(request(json.dumps(BODY | {"stream": False}).encode()))
    until(lambda: fake.tickets)
    assert not fake.tickets[0].cancelled.wait(0.2)
    plug.close()
    assert fake.tickets[0].cancelled.wait(WAIT)
    until(lambda: 'failed_requests_total{reason="cancelled"} 1.0' in httpx.get(f"{base}/metrics").text)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_client_that_does_not_read_is_cut_off(
    endless: tuple[str, FakeScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "STUCK_SECONDS", 0.5)
    base, fake = endless
    plug = connected(base, 4096)
    plug.sendall(request(json.dumps(BODY).encode()))
    until(lambda: fake.tickets)
    assert fake.tickets[0].cancelled.wait(WAIT)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := plug.recv(65_536):
            received = part
    plug.close()
    assert not received.endswith(b"0\r\n\r\n"), "cut off, not ended"


def test_a_client_that_reads_slowly_but_reads_is_served(
    endless: tuple[str, FakeScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "STUCK_SECONDS", 1.5)
    base, fake = endless
    with connected(base, 65_536) as plug:
        plug.sendall(request(json.dumps(BODY).encode()))
        for _ in range(10):
            assert plug.recv(4_000_000)
            time.sleep(0.2)
        assert not fake.tickets[0].cancelled.is_set()
    assert fake.tickets[0].cancelled.wait(WAIT)


def test_a_client_that_sends_no_head_is_cut_off(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "STUCK_SECONDS", 0.3)
    for start in (b"", b"POST /v1/models HTTP/1.1\r\nx-slow: "):
        with connected(base) as plug:
            plug.sendall(start)
            with contextlib.suppress(ConnectionResetError):
                assert plug.recv(10) == b""


def test_a_body_that_does_not_arrive_is_not_awaited(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with connected(base) as plug:
        plug.sendall(request(b"x" * 100)[:-50])
        answer = b""
        while part := plug.recv(65_536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in answer
    assert b"did not arrive" in answer


def test_a_connection_that_was_slow_once_is_not_cut_off_later(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "STUCK_SECONDS", 0.3)
    with httpx.Client(base_url=base) as client:
        for _ in range(3):
            assert client.get("/livez").status_code == 200
            time.sleep(0.5)
        network = client.get("/livez").extensions["network_stream"].get_extra_info("client_addr")
        assert network == client.get("/livez").extensions["network_stream"].get_extra_info("client_addr")


def test_others_are_answered_while_one_vanishes(base: str) -> None:
    expected = chat(base).json()["choices"][0]["message"]["content"]
    for _ in range(3):
        with httpx.stream("POST", f"{base}{PATH}", json=BODY | {"max_tokens": 500}, timeout=WAIT) as answer:
            next(answer.iter_bytes())
    assert chat(base).json()["choices"][0]["message"]["content"] == expected
    assert events(chat(base, stream=True))[-1] == "[DONE]"


def test_a_request_that_waits_too_long_ends(base: str) -> None:
    """The engine writes no 2000 tokens in a millisecond."""
    for stream in (False, True):
        answer = chat(base, timeout=0.001, max_tokens=2000, stream=stream, temperature=2, steering=[])
        if answer.status_code == 200:  # a stream may have begun
            assert '"code":"timeout"' in answer.text
        else:
            assert fault(answer, 408)["code"] == "timeout"


def until(ready: Callable[[], object]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + WAIT
    while not ready():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
