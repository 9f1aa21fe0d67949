"""What goes wrong around a server with the real scheduler and model, and what each user then sees.

`held` stops the model between two steps, so that a test says at which moment something happens.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from steerwell.apps.server import guard
from steerwell.engines.hf.batch import Batch
from steerwell.serving import scheduler
from steerwell.serving.limits import Limits
from tests.made import calibration, direction
from tests.server.live import MODEL, catalog, chat, key_of, keys, live, service
from tests.server.test_refusals import fault
from tests.server.uploads import faulty_uploads, files, other
from tests.server.ways import TURNS, WAYS, answers, edit

PATH = "/v1/chat/completions"
WAIT = 30  # seconds until a test gives up
TOKENS = 24
ADMIN = {"authorization": f"Bearer {key_of('root')}"}
OVERFLOWING = [{"direction": "made", "method": "directional_ablation", "layers": list(range(6)), "strength": -1e9}] * 2


class Held:
    """Stops every batch before its next step until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go, self._step = threading.Event(), Batch.step
        self._go.set()
        self.fault: Exception | None = None  # raised by the next step of more than one answer

        def step(batch: Batch) -> int:
            assert self._go.wait(WAIT), "the test let nobody go on"
            if self.fault is not None and len(batch.rows) > 1:
                error, self.fault = self.fault, None
                raise error
            return self._step(batch)

        monkeypatch.setattr(Batch, "step", step)

    def hold(self) -> None:
        self._go.clear()

    def go(self) -> None:
        self._go.set()


class Clock:
    """Stands for `time` in the scheduler, some seconds ahead."""

    ahead = 0.0
    perf_counter = staticmethod(time.perf_counter)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    gate = Held(monkeypatch)
    yield gate
    gate.go()


@pytest.fixture(scope="module")
def expected(pilot) -> dict[str, str]:
    """The library's greedy answers by the way that they are steered."""
    return answers(pilot, TOKENS)


@contextmanager
def serving(pilot: Any, **changes: Any) -> Iterator[str]:
    """A server of policies that show, with an admin."""
    with live(service(pilot, catalog=catalog(pilot), admins=keys("root"), **changes)) as base:
        yield base


class Reader:
    """A client that reads a stream of server-sent events, one by one."""

    def __init__(self, base: str, way: str = "honest", **fields: Any) -> None:
        body = {"model": MODEL, "messages": TURNS, "temperature": 0, "max_tokens": TOKENS, "stream": True}
        self._context = httpx.stream("POST", f"{base}{PATH}", json=body | WAYS[way] | fields, timeout=WAIT)
        answer = self._context.__enter__()
        assert answer.status_code == 200, answer.read()
        self._lines = (line for line in answer.iter_lines() if line)
        self.text, self.steering, self.error = "", None, None

    def read(self, events: int = 10**6) -> Reader:
        """Take some events, or all that are left."""
        for _ in range(events):
            line = next(self._lines, None)
            if line is None or line == "data: [DONE]":
                break
            event = json.loads(line.removeprefix("data: "))
            self.error = event.get("error")
            self.steering = event.get("steering", self.steering)
            for choice in event.get("choices", ()):
                self.text += choice["delta"].get("content", "")
        return self

    def leave(self) -> None:
        """Close the connection."""
        self._context.__exit__(None, None, None)


def metrics(base: str) -> dict[str, float]:
    """Values by name and labels."""
    text = httpx.get(f"{base}/metrics", headers=ADMIN).text
    rows = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("steerwell_"): float(value) for name, _, value in rows}


def until(ready: Callable[[], Any]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + WAIT
    while not ready():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def cut_off(plug: socket.socket) -> bool:
    """Whether the server has ended a connection; an empty line in front of a next request means nothing to it."""
    try:
        plug.sendall(b"\r\n")
    except OSError:
        return True
    return False


def queued(base: str) -> bool:
    """Whether a queue of one is full."""
    return httpx.get(f"{base}/readyz").status_code == 503


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_client_that_vanishes(pilot, held: Held, expected: dict[str, str]) -> None:
    """Who stays gets the library's answer; the place of who left is free at the next step."""
    with serving(pilot, limits=Limits(batch=1)) as base:
        leaver = Reader(base, max_tokens=1000, temperature=1.5, seed=1).read(3)
        held.hold()
        leaver.leave()
        until(lambda: metrics(base)['failed_requests_total{reason="cancelled"}'] == 1)
        written = metrics(base)["generated_tokens_total"]
        held.go()
        answer = chat(base, max_tokens=TOKENS)
        assert content(answer) == expected["honest"]
        own = answer.json()["usage"]["completion_tokens"]
        assert metrics(base)["generated_tokens_total"] - written <= own + 2, "no step more than was under way"


def test_a_client_that_does_not_read(pilot, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are answered as ever while one stream's buffers fill up; that one is cut off."""
    monkeypatch.setattr(guard, "STUCK_SECONDS", 1)
    body = {"model": MODEL, "messages": TURNS, "stream": True, "n": 16, "max_tokens": 900, "temperature": 2, "seed": 1}
    sent = json.dumps(body | {"logprobs": True, "top_logprobs": 20, "steering": []}).encode()
    with serving(pilot) as base, socket.socket() as plug:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = httpx.URL(base)
        plug.connect((url.host, url.port))
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        plug.sendall(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
        until(lambda: metrics(base)["generated_tokens_total"] > 16)
        end = time.monotonic() + WAIT
        while not cut_off(plug):
            assert time.monotonic() < end, "it stays for ever"
            for way, fields in WAYS.items():
                assert content(chat(base, max_tokens=TOKENS, **fields)) == expected[way]
        assert content(chat(base, max_tokens=TOKENS)) == expected["honest"]


def test_a_full_queue(pilot, held: Held, expected: dict[str, str]) -> None:
    """429 says when to come back; OpenAI's client does so by itself and is answered."""
    with serving(pilot, limits=Limits(batch=1, queue=1)) as base, ThreadPoolExecutor(2) as pool:
        first = Reader(base).read(2)
        held.hold()
        second = pool.submit(chat, base, max_tokens=TOKENS, **WAYS["weak"])
        until(lambda: queued(base))
        refused = chat(base)
        assert fault(refused, 429)["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        with (
            openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0) as hasty,
            pytest.raises(openai.RateLimitError, match="1 answers wait already"),
        ):
            hasty.chat.completions.create(model=MODEL, messages=TURNS)
        before = metrics(base)['refused_requests_total{reason="overloaded"}']
        with openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=8) as patient:
            third = pool.submit(
                patient.chat.completions.create, model=MODEL, messages=TURNS, temperature=0, max_tokens=TOKENS
            )
            until(lambda: metrics(base)['refused_requests_total{reason="overloaded"}'] > before)
            held.go()
            assert third.result(WAIT).choices[0].message.content == expected["honest"]
        assert first.read().text == expected["honest"]
        assert content(second.result(WAIT)) == expected["weak"]


def test_a_direction_that_is_swapped_and_removed_while_in_use(
    pilot, held: Held, expected: dict[str, str], tmp_path: Path
) -> None:
    """A stream ends under the edit that it began with; who asks for it afterwards is told its name."""
    own = {"direction": "made", "method": "stmp", "layers": [1], "strength": 4}
    with serving(pilot) as base, httpx.Client(base_url=base, headers=ADMIN) as admin:
        assert admin.put("/admin/policies/honest", json=own).status_code == 204
        readers = [Reader(base).read(3), Reader(base, "bounded").read(3), Reader(base, steering=own).read(3)]
        held.hold()
        assert admin.put("/admin/directions/made", files=files(other(pilot), tmp_path / "other")).status_code == 204
        held.go()
        swapped = chat(base, max_tokens=TOKENS)
        assert "'bounded', 'honest'" in fault(admin.delete("/admin/directions/made"))["message"]
        olds = [edit(pilot, way) for way in ("honest", "bounded", "honest")]
        for reader, old, way in zip(readers, olds, ("honest", "bounded", "honest"), strict=True):
            assert reader.read().text == expected[way]
            assert reader.steering["edit_id"] == reader.steering["receipts"][0]["edit_id"] == old.id
        assert swapped.json()["steering"]["edit_id"] not in {old.id for old in olds}


def test_a_policy_and_its_direction_that_go_while_in_use(
    pilot, held: Held, expected: dict[str, str], tmp_path: Path
) -> None:
    """The stream goes on to its end; then the name is unknown: 404 in a model's name, 400 in the request."""
    spec = {"direction": "gone", "method": "stmp", "layers": [1], "strength": 4}
    with serving(pilot) as base, httpx.Client(base_url=base, headers=ADMIN) as admin:
        layers = tuple(calibration(boundary=0.1 * layer) for layer in range(pilot.info.n_layers))
        same = direction(model=pilot.info, calibration=layers)  # as `made`
        assert admin.put("/admin/directions/gone", files=files(same, tmp_path / "gone")).status_code == 204
        assert admin.put("/admin/policies/going", json=spec).status_code == 204
        reader = Reader(base, model=f"{MODEL}:going").read(3)
        held.hold()
        assert admin.delete("/admin/policies/going").status_code == 204
        assert admin.delete("/admin/directions/gone").status_code == 204
        named = fault(chat(base, model=f"{MODEL}:going"), 404)
        assert (named["code"], f"{MODEL}:going" in named["message"]) == ("model_not_found", True)
        for asked, code in (({"policy": "going"}, "unknown_policy"), (spec, "unknown_direction")):
            unknown = fault(chat(base, steering=asked), 400)
            assert unknown["code"] == code
            assert "'going'" in unknown["message"] or "'gone'" in unknown["message"]
        held.go()
        assert reader.read().text == expected["honest"]
        assert reader.steering["name"] == "going"
        assert reader.steering["receipts"][0]["tokens_edited"] > 0


def test_a_strength_that_breaks_the_activations(pilot, held: Held, expected: dict[str, str]) -> None:
    """That request fails and is told why, whole or streamed; those in the same batch get the library's answers."""
    with serving(pilot) as base, ThreadPoolExecutor(2) as pool:
        readers = {way: Reader(base, way).read(2) for way in WAYS}
        held.hold()
        broken = [pool.submit(chat, base, steering=OVERFLOWING, stream=stream) for stream in (False, True)]
        rows = metrics(base)["batch_rows_sum"]
        held.go()
        for answer in broken:
            told = fault(answer.result(WAIT), 400)
            assert (told["code"], told["param"]) == ("not_finite", "steering")
            assert "not finite" in told["message"]
            assert "strength" in told["message"]
        for way, reader in readers.items():
            assert reader.read().text == expected[way]
        counted = metrics(base)
        assert counted['failed_requests_total{reason="engine"}'] == 2
        assert counted["batch_rows_sum"] > rows
        assert content(chat(base, max_tokens=TOKENS)) == expected["honest"]


def test_a_request_whose_time_is_up(
    pilot, held: Held, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """408 before the first word, an error event after it; what came before is the answer's beginning."""
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    with serving(pilot, limits=Limits(batch=2, queue=1)) as base, ThreadPoolExecutor(1) as pool:
        stays, ends = Reader(base), Reader(base, timeout=60).read(3)
        held.hold()
        waits = pool.submit(chat, base, timeout=60)
        until(lambda: queued(base))
        clock.ahead = 90
        held.go()
        assert fault(waits.result(WAIT), 408)["code"] == "timeout"
        ends.read()
        assert (ends.error["code"], ends.error["type"]) == ("timeout", "timeout_error")
        assert "raise 'timeout'" in ends.error["message"]
        assert expected["honest"].startswith(ends.text)
        assert ends.text != expected["honest"]
        assert stays.read().text == expected["honest"]
        assert metrics(base)['failed_requests_total{reason="timed_out"}'] == 2


def test_a_step_of_the_model_that_fails(pilot, held: Held, expected: dict[str, str]) -> None:
    """Who was in the batch is told to ask again, and not what went wrong inside; the next request is answered."""
    with serving(pilot, limits=Limits(queue=1)) as base, ThreadPoolExecutor(1) as pool:
        reader = Reader(base).read(2)
        held.hold()
        whole = pool.submit(chat, base)
        until(lambda: queued(base))
        held.fault = RuntimeError("a secret of the inside")
        held.go()
        reader.read()
        for told in (reader.error, fault(whole.result(WAIT), 503)):
            assert (told["type"], told["code"]) == ("unavailable_error", "engine_failed")
            assert "ask again" in told["message"]
            assert "secret" not in told["message"]
        assert content(chat(base, max_tokens=TOKENS)) == expected["honest"]
        assert httpx.get(f"{base}/readyz").status_code == 200


NAMES = ["..", "..%2f..%2fetc", "%2e%2e", ".hidden", "a%2fb", "a%00b", "a%0ab", "C:%5Cx", "x" * 65, "%ff", "unsteered"]


def test_uploads_that_are_no_directions(pilot, expected: dict[str, str], tmp_path: Path) -> None:
    """4xx that says what is wrong; nothing is registered, nothing is written, and the server goes on."""
    uploads = faulty_uploads(pilot, tmp_path)
    good = files(other(pilot), tmp_path / "good")
    present = sorted(tmp_path.rglob("*"))
    with serving(pilot) as base, httpx.Client(base_url=base, headers=ADMIN, timeout=WAIT) as admin:
        before = admin.get("/admin/directions").json()
        for fault_of, upload in uploads.items():
            for name in ("made", "new"):
                told = fault(admin.put(f"/admin/directions/{name}", files=upload), 400)
                assert len(told["message"]) < 1000, fault_of
        for name in NAMES:
            answer = admin.put(f"/admin/directions/{name}", files=good)
            assert answer.status_code in (400, 404, 405), name
            assert answer.json()["error"]["message"]
        for encoding in ("gzip", "deflate", "br"):  # nothing is unpacked
            answer = admin.put("/admin/directions/new", files=good, headers={"content-encoding": encoding})
            assert answer.status_code in (204, 400, 415)
            admin.delete("/admin/directions/new")
        with socket.create_connection((httpx.URL(base).host, httpx.URL(base).port), WAIT) as plug:
            head = "PUT /admin/directions/new HTTP/1.1\r\nhost: localhost\r\nauthorization: "
            plug.sendall(f"{head}{ADMIN['authorization']}\r\ncontent-length: 999999999999\r\n\r\n".encode())
            assert plug.recv(12) == b"HTTP/1.1 413"
        assert admin.get("/admin/directions").json() == before
        assert sorted(tmp_path.rglob("*")) == present
        assert content(chat(base, max_tokens=TOKENS)) == expected["honest"]
