"""A served process that is killed (kill -9) while it answers, and what its clients and the next process find."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from steerwell.apps.server import start
from steerwell.core.artifacts import load_direction
from steerwell.core.records import Direction
from steerwell.serving.keys import Keys, add_key
from tests.made import calibration, direction
from tests.server.live import MODEL, post
from tests.server.test_refusals import fault
from tests.server.ways import TURNS

PATH = "/v1/chat/completions"
WAIT = 60  # seconds until the test gives up


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


@pytest.mark.slow
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
    sure = {"model": MODEL, "messages": TURNS, "temperature": 0, "max_tokens": 24}

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
