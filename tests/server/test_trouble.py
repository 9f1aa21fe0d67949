"""What goes wrong around a server with the real scheduler and model, and what each user then sees.

`held` stops the model between two steps, so that a test says at which moment something happens.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
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

from steerwell.apps.server import guard, start
from steerwell.core.artifacts import load_direction, save_direction
from steerwell.core.records import Direction
from steerwell.engines.hf.batch import Batch
from steerwell.serving import scheduler
from steerwell.serving.keys import Keys, add_key
from steerwell.serving.limits import Limits
from tests.made import calibration, direction, model_info
from tests.server.live import MODEL, chat, key_of, keys, live, post, service
from tests.server.strong import TURNS, WAYS, answers, edit, strong
from tests.server.test_refusals import fault

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

        def step(batch: Batch) -> None:
            assert self._go.wait(WAIT), "the test let nobody go on"
            if self.fault is not None and len(batch.rows) > 1:
                error, self.fault = self.fault, None
                raise error
            self._step(batch)

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
    with live(service(pilot, catalog=strong(pilot), admins=keys("root"), **changes)) as base:
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
        asked = 0
        while metrics(base)['failed_requests_total{reason="cancelled"}'] == 0:
            way = list(WAYS)[asked % len(WAYS)]
            assert content(chat(base, max_tokens=TOKENS, **WAYS[way])) == expected[way]
            asked += 1
        assert asked > 0
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


def other(pilot: Any) -> Direction:
    layers = tuple(calibration(boundary=0.1 * layer) for layer in range(pilot.info.n_layers))
    return direction(1, model=pilot.info, calibration=layers)


def files(made: Direction, folder: Path) -> dict[str, bytes]:
    """A direction's two files, as they are uploaded."""
    save_direction(made, folder)
    tensors = next(folder.glob("*.safetensors"))
    return {"manifest": (folder / "artifact.json").read_bytes(), "tensors": tensors.read_bytes()}


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


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header and no data."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def huge(shape: str, end: int) -> bytes:
    return header(f'{{"vectors":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}'.encode())


def resealed(manifest: bytes, tensors: bytes, **content: Any) -> dict[str, bytes]:
    """An upload whose checksums are right and whose content is not."""
    from hashlib import sha256

    from steerwell.core import artifacts

    told = json.loads(manifest)
    told["tensors"]["sha256"] = sha256(tensors).hexdigest()
    told["content"] |= content
    told["sha256"] = artifacts._checksum(told)
    return {"manifest": json.dumps(told).encode(), "tensors": tensors}


def faulty_uploads(pilot: Any, folder: Path) -> dict[str, dict[str, bytes]]:
    """Uploads by what is wrong with them."""
    good = files(other(pilot), folder / "good")
    manifest, tensors = good["manifest"], good["tensors"]
    strange = model_info(name="another", d_model=pilot.info.d_model, n_layers=pilot.info.n_layers)
    layers = tuple(calibration() for _ in range(pilot.info.n_layers))
    return {
        "truncated": good | {"tensors": tensors[: len(tensors) // 2]},
        "resealed truncation": resealed(manifest, tensors[: len(tensors) // 2]),
        "another model's": files(direction(model=strange, calibration=layers), folder / "strange"),
        "another shape": files(direction(), folder / "small"),
        "header of 2**63 bytes": resealed(manifest, header(b"{}", 2**63)),
        "header of 99 GB": resealed(manifest, header(b"{}", 99 * 10**9)),
        "tensor of a terabyte": resealed(manifest, huge("[500000,500000]", 10**12)),
        "overflowing shape": resealed(manifest, huge("[4294967296,4294967296]", 0)),
        "unknown dtype": resealed(manifest, header(b'{"v":{"dtype":"F9","shape":[0],"data_offsets":[0,0]}}')),
        "no tensors": resealed(manifest, header(b"{}")),
        "deep manifest": good | {"manifest": b"[" * 200_000},
        "huge number": good | {"manifest": b"9" * 100_000},
        "half a character": good | {"manifest": manifest + b"\xff"},
        "a pickle": good | {"tensors": b"\x80\x04cos\nsystem\n(S'true'\ntR."},
        "calibration of text": resealed(manifest, tensors, calibration=["x"] * pilot.info.n_layers),
        "nothing": {"manifest": b"", "tensors": b""},
    }  # fmt: skip


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


# kill -9 --------------------------------------------------------------------------------------------------------------


@contextmanager
def process(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`steerwell serve` in a process of its own, and its address."""
    command = [sys.executable, "-c", "from steerwell.apps.cli import main; main()", "serve", *words]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in running.stderr:
            if line.startswith("Serving "):
                threading.Thread(target=running.stderr.read, daemon=True).start()
                yield running, line.split(" at ")[1].split("/v1")[0]
                break
        else:
            pytest.fail("the server did not start")
    finally:
        running.kill()
        running.wait(WAIT)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_server_that_is_killed_under_load(pilot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients see the connection break, never an end that looks whole; started anew, the server is as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(start, "fit", lambda engine, concept, **_: made_for(pilot, concept))
    start.demo(pilot, lambda *_: lambda *_: None, lambda _: None)  # the bundled concepts, without the time to fit them
    key = add_key("ann", tmp_path / "keys.txt")
    before = snapshot(tmp_path)
    headers = {"authorization": f"Bearer {key}"}
    words = ["--api-keys", str(tmp_path / "keys.txt")]
    body = {"model": MODEL, "messages": TURNS, "temperature": 2, "max_tokens": 900, "stream": True}
    sure = {"model": MODEL, "messages": TURNS, "temperature": 0, "max_tokens": TOKENS}

    def broken(base: str, started: threading.Barrier) -> str:
        """Read until the connection breaks; tells what came."""
        text = ""
        with httpx.stream("POST", f"{base}{PATH}", json=body | {"n": 4}, headers=headers, timeout=WAIT) as answer:
            chunks = answer.iter_text()
            text += next(chunks)
            started.wait(WAIT)
            try:
                for chunk in chunks:
                    text += chunk
            except httpx.TransportError:
                return text
        return "[DONE] it seemed to end"

    started = threading.Barrier(5)
    with process("--port", "0", *words) as (running, base), ThreadPoolExecutor(4) as pool:
        first = post(base, PATH, sure, headers=headers).json()
        cut = [pool.submit(broken, base, started) for _ in range(4)]
        started.wait(WAIT)
        running.send_signal(signal.SIGKILL)
        assert all("[DONE]" not in item.result(WAIT) for item in cut)
        client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0)
        with client, pytest.raises(openai.APIConnectionError):
            client.models.list()
    assert snapshot(tmp_path) == before
    assert Keys.from_file(tmp_path / "keys.txt").name_of(key) == "ann"
    for manifest in tmp_path.rglob("artifact.json"):
        load_direction(manifest.parent)
    with process("--port", base.rpartition(":")[2], *words) as (_, again):
        assert again == base
        second = post(base, PATH, sure, headers=headers).json()
        assert second["choices"] == first["choices"]
        assert second["steering"]["edit_id"] == first["steering"]["edit_id"]
        fault(httpx.get(f"{base}/v1/models"), 401)


def made_for(pilot: Any, concept: Any) -> Direction:
    """A random direction in place of a fitted one."""
    layers = tuple(calibration() for _ in range(pilot.info.n_layers))
    return direction(model=pilot.info, concept=concept.concept, concept_hash=concept.hash, calibration=layers)
