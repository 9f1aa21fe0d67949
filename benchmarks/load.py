"""The server under load: `python -m benchmarks.load` measures it and writes LOAD.md.

200 clients steer in 20 ways; every answer is compared with the library's own. The server, one that answers a single
request at a time, and the generator of the load are processes of their own (`load_client.py`).

--minutes N      of mixed traffic (default 10; the other kinds beside it take half as long again); with fewer than
                 that LOAD.md is not written
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from benchmarks.contest import ROOT, Worker
from benchmarks.load_cases import Plan, fitted, planned, prompts
from benchmarks.load_client import Turn
from benchmarks.load_report import Look, Measured, Memory, document, passed
from steerwell.core.artifacts import write_atomic
from steerwell.engines.hf import HFEngine

RESULTS = ROOT / "benchmarks" / "LOAD.md"
WHOLE = 10.0  # minutes
CLIENTS = 200
THREADS = 1  # of the model, also in the servers: the bundled one is too small to be shared by two
STARTING, STOPPING = 120.0, 30.0  # seconds that a server may take
EVERY = 2.0  # seconds between looks at the memory


@dataclass(frozen=True, slots=True)
class Server:
    """A server's process and where it is reached."""

    process: psutil.Process
    base: str

    @classmethod
    @contextmanager
    def start(cls, options: Sequence[str], log: Path) -> Iterator[Server]:
        """`steerwell serve` on a free port of this machine, ready when it is given; it ends with the block."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("steerwell")), "serve", "--requests", "open"]
        with log.open("wb") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            process = subprocess.Popen(
                [*command, "--port", str(port), *options], stdout=out, stderr=out, env=environment
            )
        try:
            base = f"http://127.0.0.1:{port}"
            _await(process, base, log)
            yield cls(psutil.Process(process.pid), base)
        finally:
            process.terminate()
            try:
                process.wait(STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def watched(process: psutil.Process) -> Iterator[list[Look]]:
    """Looks at a process's memory every few seconds while the block runs."""
    looks: list[Look] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(EVERY):
            looks.append((time.perf_counter(), process.memory_info().rss))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield looks
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Seconds of the turns; `rounds` of them."""

    rounds: int
    mixed: float
    beside: float
    alone: float
    ramp: float
    warm: float

    @classmethod
    def of(cls, minutes: float) -> Lengths:
        """So many minutes of mixed traffic, a minute a round where there are two or more."""
        rounds = max(round(minutes), 2)
        mixed = 60 * minutes / rounds
        beside = min(max(mixed / 4, 6.0), 10.0)
        return cls(rounds, mixed, beside, beside / 2, min(3.0, beside / 3), min(max(mixed / 2, 5.0), 30.0))


@dataclass(frozen=True, slots=True)
class Bench:
    """The processes of one run."""

    server: Server
    single: Server  # answers one request at a time
    generator: Worker

    def turn(self, server: Server, **options: Any) -> Measured:
        """One turn of traffic, and what of the machine it took."""
        pair = (server.process, psutil.Process(self.generator.process.pid))
        before, began = [_cpu_seconds(process) for process in pair], time.perf_counter()
        got = self.generator.ask(**asdict(Turn(base=server.base, **options)))
        seconds = time.perf_counter() - began
        spent = [_cpu_seconds(process) - start for process, start in zip(pair, before, strict=True)]
        return Measured(got, seconds, *spent)

    def run(self, lengths: Lengths) -> tuple[dict[str, list[Measured]], Memory]:
        """Every turn of every round; the order turns around from round to round."""
        many = {"clients": CLIENTS, "ramp": lengths.ramp}
        kinds: dict[str, tuple[Server, dict[str, Any]]] = {
            "mixed": (self.server, {"traffic": "mixed", "seconds": lengths.mixed, **many}),
            "unsteered": (self.server, {"traffic": "unsteered", "seconds": lengths.beside, **many}),
            "single": (self.single, {"traffic": "mixed", "seconds": lengths.beside, "waits": False, **many}),
            "alone": (self.server, {"traffic": "mixed", "seconds": lengths.alone, "clients": 1, "ramp": 0.0}),
        }
        turns: dict[str, list[Measured]] = defaultdict(list)
        times: list[tuple[float, float]] = []  # when mixed traffic ran
        for kind, (server, options) in kinds.items():
            seconds = lengths.warm if kind == "mixed" else lengths.ramp + 1
            turns[f"warm-up, {kind}"].append(self.turn(server, **options | {"seconds": seconds}))
        with watched(self.server.process) as looks:
            for number in range(lengths.rounds):
                for kind in kinds if number % 2 == 0 else reversed(kinds):
                    server, options = kinds[kind]
                    began = time.perf_counter()
                    turns[kind].append(self.turn(server, **options))
                    if kind == "mixed":
                        times.append((began + lengths.ramp, began + lengths.mixed))
                    _say(f"round {number + 1} of {lengths.rounds}: {kind}: {turns[kind][-1].told()}")
        return dict(turns), Memory.of([[look for look in looks if start <= look[0] <= end] for start, end in times])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if an answer was wrong or lost, or a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description="Load the server; see LOAD.md.")
    parser.add_argument("--minutes", type=float, default=WHOLE, help="of mixed traffic; with fewer nothing is written")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        _say("fitting directions, and asking the library")
        plan, serving = _prepared(folder)
        (folder / "plan.json").write_text(json.dumps(asdict(plan)))
        _say("starting the servers")
        server = stack.enter_context(Server.start(serving, folder / "server.log"))
        single = stack.enter_context(Server.start([*serving, "--batch", "1"], folder / "single.log"))
        generator = stack.enter_context(_generator(folder / "plan.json"))
        turns, memory = Bench(server, single, generator).run(Lengths.of(options.minutes))
    text = document(turns, memory, plan.cases, CLIENTS, time.perf_counter() - began)
    print(text)
    if options.minutes >= WHOLE:
        write_atomic(RESULTS, text)
    return 0 if passed(turns, memory) else 1


def _prepared(folder: Path) -> tuple[Plan, list[str]]:
    """What is asked and must be answered, and the servers' options."""
    engine = HFEngine.load(batch_size=64)
    directions, serving = fitted(engine, folder)
    return planned(engine, directions, prompts(engine.info.language)), serving


@contextmanager
def _generator(plan: Path) -> Iterator[Worker]:
    command, pipe = [sys.executable, "-m", "benchmarks.load_client", str(plan)], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    try:
        yield Worker(process, "generator")
    finally:
        process.kill()
        process.wait()


def _await(process: subprocess.Popen[bytes], base: str, log: Path) -> None:
    """Return when a server takes requests."""
    end = time.monotonic() + STARTING
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{base}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


def _cpu_seconds(process: psutil.Process) -> float:
    """What a process has used of the CPU so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
