"""`steerwell serve`: what it makes of its arguments, and a real process that is killed, started again, and stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from steerwell.apps.server import start
from steerwell.core.artifacts import save_direction
from steerwell.core.errors import ArgumentError, ArtifactError, UnknownNameError
from steerwell.core.policy import Policy, save_policy
from tests.made import direction
from tests.server.live import MODEL, chat, complete

RUN = "from steerwell.apps.cli import main; main()"
STEERING = {"method": "stmp", "layers": (0,), "strength": 2.0}


@pytest.fixture
def made(pilot, tmp_path: Path) -> Path:
    """A folder: directions `one` and `two`, policies `honest.yaml` and `kind.yaml`."""
    for seed, name in enumerate(("one", "two")):
        save_direction(direction(seed, model=pilot.info), tmp_path / name)
    save_policy(Policy(direction="one", **STEERING), tmp_path / "honest.yaml")
    save_policy(Policy(name="gentle", direction="two", gate="one", **STEERING), tmp_path / "kind.yaml")
    return tmp_path


def test_directions_have_their_folders_name_or_a_given_one(made: Path) -> None:
    found = start.registered([str(made / "one"), f"second={made / 'two'}"], [], None)
    assert list(found.directions) == ["one", "second"]
    assert found.default is None
    with pytest.raises(ArgumentError, match="twice"):
        start.registered([str(made / "one"), f"one={made / 'two'}"], [], None)
    with pytest.raises(ArtifactError):
        start.registered([str(made / "three")], [], None)


def test_policies_bring_their_directions(made: Path) -> None:
    found = start.registered([str(made / "one")], [made / "honest.yaml", made / "kind.yaml"], "gentle")
    assert list(found.directions) == ["one", "made"], "the second under its concept's name"
    assert found.policies["honest"].direction == "one"
    assert (found.policies["gentle"].direction, found.policies["gentle"].gate) == ("made", "one")
    assert found.default == "gentle"


def test_the_default_is_the_only_policy_or_the_named_one(made: Path) -> None:
    both = [made / "honest.yaml", made / "kind.yaml"]
    assert start.registered([], both[:1], None).default == "honest"
    assert start.registered([], both[:1], "unsteered").default is None
    with pytest.raises(ArgumentError, match="honest, gentle"):
        start.registered([], both, None)
    with pytest.raises(UnknownNameError, match="'honest'"):
        start.registered([], both, "honset")
    with pytest.raises(ArgumentError, match="twice"):
        start.registered([], [both[0], both[0]], None)


def test_a_policy_is_locked_unless_it_is_said(pilot, made: Path) -> None:
    listed = start.registered([], [made / "honest.yaml"], None)
    for requests, expected in ((None, "locked"), ("open", "open"), ("policies", "policies")):
        catalog = start.catalog_of(pilot, MODEL, listed, requests, monitor_only=False)
        assert catalog.describe()["requests"] == expected
    plain = start.registered([str(made / "one")], [], None)
    assert start.catalog_of(pilot, MODEL, plain, None, monitor_only=False).describe()["requests"] == "open"
    with pytest.raises(ArgumentError, match="--policy"):
        start.catalog_of(pilot, MODEL, plain, "locked", monitor_only=False)
    with pytest.raises(ArgumentError, match="nothing to watch"):
        start.catalog_of(pilot, MODEL, plain, None, monitor_only=True)


def test_names_for_clients(tmp_path: Path) -> None:
    assert start.served_name("pilot", None) == "steerwell-pilot"
    assert start.served_name("owner/model-1B", None) == "owner/model-1B"
    assert start.served_name(str(tmp_path), None) == tmp_path.name
    assert start.served_name("some/where/model.gguf", None) == "model"
    assert start.served_name("pilot", "mine") == "mine"
    for name in ("a:b", "a b", "x" * 121):
        with pytest.raises(ArgumentError, match="served-model-name"):
            start.served_name("pilot", name)


def test_a_report_needs_its_page(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="steerwell report"):
        start.report_page(tmp_path)


def test_the_demo_is_kept_for_the_next_start(pilot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []

    def fit(engine, concept, **options):
        fitted.append(concept.concept)
        assert options["pool"] == "prompt_last"
        return direction(model=engine.info, concept=concept.concept)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(start, "fit", fit)
    lines: list[str] = []

    def demo() -> start.Registered:
        return start.demo(pilot, lambda text, count: lambda done: None, lines.append)

    first = demo()
    assert sorted(first.directions) == ["dishonesty", "dismissiveness", "hostility", "sycophancy"]
    assert (first.default, first.policies["honest"].strength) == ("honest", 2.0)
    assert len(fitted) == len(lines) == 4
    assert sorted(demo().directions) == sorted(first.directions)
    assert len(fitted) == 4, "from the cache"
    damaged = next(tmp_path.glob("steerwell/*/hostility-*/*.safetensors"))
    damaged.write_bytes(b"x")
    demo()
    assert fitted[4:] == ["hostility"], "a damaged one is made anew"
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert sorted(demo().directions) == sorted(first.directions)
    assert "not kept" in lines[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--api-keys", "nowhere.txt"], "nowhere.txt"),
        (["--report", "."], "report.html"),
        (["--policy", "nowhere.yaml"], "nowhere.yaml"),
        (["--direction", "nowhere"], "nowhere"),
        (["--served-model-name", "a:b"], "':'"),
        (["--timeout", "nan"], "timeout"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
        (["--port", "0", "--engine", "vllm", "--threads", "2"], "OMP_NUM_THREADS"),
        (["--port", "0", "--engine", "vllm", "--device-map", "cuda"], "--device-map: vLLM"),
        (["--port", "0", "--engine", "vllm", "--engine-args", "{"], "no JSON"),
        (["--port", "0", "--engine-args", "{}"], "--engine vllm"),
        (["--port", "0", "--tensor-parallel", "2"], "--device-map"),
    ],
)
def test_a_wrong_start_is_an_error_before_anything_is_loaded(run, words: list[str], said: str) -> None:
    code, _, told = run("serve", *words)
    assert code == 1
    assert said in told
    assert "Traceback" not in told


@contextmanager
def process(folder: Path, *words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A served model and its address."""
    log = folder / "log.txt"
    command = [sys.executable, "-c", RUN, "serve", "--policy", folder / "honest.yaml", *words]
    with log.open("w") as out:
        started = subprocess.Popen(
            [str(word) for word in command],
            stderr=out,
            stdout=out,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        while not (found := re.search(r"^Serving \S+ at (\S+)/v1", log.read_text(), re.MULTILINE)):
            assert started.poll() is None, log.read_text()
            time.sleep(0.1)
        yield started, found[1]
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()


@pytest.mark.slow
def test_a_process_that_is_killed_starts_again_and_stops_in_order(made: Path) -> None:
    with process(made, "--port", 0) as (first, base):
        before = chat(base).json()
        assert before["steering"]["name"] == "honest"
        first.kill()
        first.wait()
    port = httpx.URL(base).port
    with process(made, "--port", port, "--batch", 2) as (second, again):
        assert again == base
        assert chat(base).json()["choices"] == before["choices"]
        fields = {"n": 4, "temperature": 1, "max_tokens": 16}
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(complete, base, "The", seed=seed, stream=seed % 2 == 0, **fields) for seed in range(8)]
            while taken(base) < 8 * 4 - 2:  # all have come; two decode, and one has been answered before
                time.sleep(0.02)
            second.send_signal(signal.SIGTERM)
            while httpx.get(f"{base}/readyz").status_code == 200:
                time.sleep(0.01)
            assert chat(base).status_code == 429, "what comes now goes to another server"
            answers = [item.result() for item in asked]
        assert second.wait(60) == 0
    for seed, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        if seed % 2 == 0:
            assert answer.text.endswith("data: [DONE]\n\n")
            assert answer.text.count('"finish_reason":"') == 4
        else:
            assert len(answer.json()["choices"]) == 4
    assert "Traceback" not in (made / "log.txt").read_text()


def taken(base: str) -> float:
    """Answers that wait or are finished."""
    text = httpx.get(f"{base}/metrics").text
    found = re.findall(r"^steerwell_(?:queue_length|answers_total\{.*\}) (\S+)$", text, re.MULTILINE)
    return sum(map(float, found)) - 1
