"""Beside the peers: every contestant is a process that answers requests, and the requests take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.report import Row, Section, differences, per_second
from benchmarks.timing import Pace, Summary, ratio, take_turns

ROOT = Path(__file__).parents[1]
SIDE = ROOT / ".venv-peers"
PACKAGES = ("torch", "transformers<5", "numpy<2", "repeng", "steering-vectors")
PEERS = ("repeng", "steering-vectors")


class PeerError(RuntimeError):
    """A contestant could not do what it was asked; the message is its own."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A contestant's process."""

    process: subprocess.Popen[str]
    name: str

    @classmethod
    @contextmanager
    def start(cls, name: str, python: str, model: Path, task: Path) -> Iterator[Self]:
        """A worker that has loaded the model when its first answer comes; it ends with the block."""
        command = [python, str(ROOT / "benchmarks" / "peers.py"), name, str(model), str(task)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        try:
            yield cls(process, name)
        finally:
            process.kill()
            process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for the answer."""
        if self.process.stdin is None or self.process.stdout is None:
            raise PeerError(f"{self.name}: no pipe")
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        result: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in result:
            raise PeerError(f"{self.name}: {result['error']}")
        return result


def side_environment() -> tuple[str | None, str]:
    """The peers' Python and what is installed there, made on first use; None and the reason where that fails."""
    python, ready = SIDE / "bin" / "python", SIDE / ".ready"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    try:
        if not ready.exists():
            _run([sys.executable, "-m", "venv", "--clear", str(SIDE)])
            _run([*pip, "install", "--quiet", "-c", str(ROOT / "constraints.txt"), *PACKAGES])
            ready.touch()
        listed = json.loads(_run([*pip, "list", "--format", "json"]))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, "The peers could not be installed: " + said.strip().splitlines()[-1]
    wanted = {"torch", "transformers", "numpy", *PEERS}
    found = ", ".join(f"{item['name']} {item['version']}" for item in listed if item["name"] in wanted)
    return str(python), f"Side environment of the peers: {found}"


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout


@dataclass(frozen=True, slots=True)
class Contest:
    """The contestants on one model.

    Attributes:
        model: folder of the model.
        task: file with the texts.
        python: the peers' Python; None: they could not be installed.
        layers: number of the model's layers.
        thorough: also one layer alone, and plain transformers in the side environment.
    """

    model: Path
    task: Path
    python: str | None
    layers: int
    thorough: bool = True

    @contextmanager
    def workers(self) -> Iterator[dict[str, Worker]]:
        """Ours, plain transformers here and, in the side environment, transformers and the peers; all warmed up."""
        places = {"steerwell": ("steerwell", sys.executable), "transformers": ("transformers", sys.executable)}
        if self.python is not None:
            places |= {name: (name, self.python) for name in PEERS}
            if self.thorough:
                places["transformers 4"] = ("transformers", self.python)
        with ExitStack() as stack:
            started = {
                label: stack.enter_context(Worker.start(name, python, self.model, self.task))
                for label, (name, python) in places.items()
            }
            yield started

    def generation(self, workers: Mapping[str, Worker], rows: int, new_tokens: int, pace: Pace) -> Section:
        """Tokens per second, unsteered and steered, with the same tokens coming out."""
        middle, every = [self.layers // 2], list(range(self.layers))
        plain = workers["steerwell"].ask(do="generate", rows=rows, layers=[], new_tokens=new_tokens)["tokens"]
        section = Section(
            f"Generation beside others, batch {rows}: {self.model.name}",
            f"Time of ours over time of theirs from text to text, {rows} prompt(s), {new_tokens} new tokens, greedy, "
            "adding a vector at strength 1e-6. Below 1: ours is faster. Only ours returns a receipt of what was done.",
        )
        cases: dict[str, tuple[Worker, list[int]]] = {}
        for label, worker in workers.items():
            for what, layers in (("unsteered", []), ("one layer", middle), ("all layers", every)):
                if layers and label.startswith("transformers"):
                    continue
                if (not layers and label in PEERS) or (what == "one layer" and not self.thorough):
                    continue
                try:
                    got = worker.ask(do="generate", rows=rows, layers=layers, new_tokens=new_tokens)["tokens"]
                except PeerError as error:
                    section.remarks.append(f"{label}, {what}, did not run: {error}")
                    continue
                if any(len(answer) != new_tokens for answer in got):
                    section.remarks.append(f"{label}, {what}: left out, its answers have other lengths")
                    continue
                section.remarks.extend(differences(f"{label}, {what}", plain, got))
                cases[f"{label}, {what}"] = worker, layers
        times = take_turns(
            {
                name: lambda worker=worker, layers=layers: float(  # type: ignore[misc]
                    worker.ask(do="generate", rows=rows, layers=layers, new_tokens=new_tokens)["seconds"]
                )
                for name, (worker, layers) in cases.items()
            },
            pace,
        )
        for name in cases:
            label, _, what = name.partition(", ")
            if label != "steerwell":
                figures = " / ".join(
                    per_second(rows * new_tokens, Summary.of(times[side])) for side in (f"steerwell, {what}", name)
                )
                section.rows.append(
                    Row(f"ours / {name}", ratio(times, f"steerwell, {what}", name), figures, at_most=1.0)
                )
        return section

    def training(self, workers: Mapping[str, Worker], pairs: int, pace: Pace) -> Section:
        """Seconds to read the states, and to make a direction of every layer."""
        section = Section(
            f"Directions beside others: {self.model.name}",
            f"Time of ours over time of theirs for {pairs} contrastive pairs, all layers, batches of 32. Below 1: ours "
            "is faster. Ours pools over the answer's tokens and fits a mean difference with its boundary, class "
            "statistics and split-half stability; repeng reads the last token and fits a principal component; "
            "steering-vectors reads the last token and takes the mean difference.",
        )
        for what in ("capture", "train"):
            able = {}
            for label in ("steerwell", *PEERS):
                if label not in workers:
                    continue
                try:
                    workers[label].ask(do=what, pairs=2)
                    able[label] = workers[label]
                except PeerError as error:
                    section.remarks.append(f"{what} did not run: {error}")
            times = take_turns(
                {
                    label: lambda worker=worker: float(worker.ask(do=what, pairs=pairs)["seconds"])  # type: ignore[misc]  # noqa: B023
                    for label, worker in able.items()
                },
                pace,
            )
            for label in able:
                if label != "steerwell":
                    sides = [f"{Summary.of(times[side]).median:.2f} s" for side in ("steerwell", label)]
                    name = {"capture": "reading states", "train": "states and direction"}[what]
                    row = Row(
                        f"{name}: ours / {label}", ratio(times, "steerwell", label), " / ".join(sides), at_most=1.0
                    )
                    section.rows.append(row)
        return section

    def memory(self, pairs: int, runs: int = 3) -> Section:
        """How much a process grows while it makes directions: a fresh process per run."""
        section = Section(
            f"Peak memory of making directions beside others: {self.model.name}",
            f"Growth of the peak resident size of ours over theirs while making a direction from {pairs} pairs, in a "
            "fresh process that holds the model and has made one from 2 pairs. Below 1: ours needs less.",
        )
        grown: dict[str, list[float]] = {}
        for _ in range(runs):
            for name in ("steerwell", *(PEERS if self.python else ())):
                python = sys.executable if name == "steerwell" or self.python is None else self.python
                try:
                    with Worker.start(name, python, self.model, self.task) as worker:
                        worker.ask(do="train", pairs=2)
                        growth = float(worker.ask(do="train", pairs=pairs)["growth_mib"])
                    grown.setdefault(name, []).append(max(growth, 0.1))
                except PeerError as error:
                    section.remarks.append(str(error))
        for name in PEERS:
            if len(grown.get(name, ())) == len(grown.get("steerwell", ())) > 0:
                sides = [f"{Summary.of(grown[side]).median:,.0f} MiB" for side in ("steerwell", name)]
                row = Row(f"ours / {name}", ratio(grown, "steerwell", name), " / ".join(sides), at_most=1.0)
                section.rows.append(row)
        return section
