"""`python -m benchmarks.speed`: every measurement of this folder; writes RESULTS.md and prints it.

--quick          few rounds, to try out; does not write RESULTS.md
--model NAME     `pilot`, `random-pilot`, `random-100M`, a folder, a hub id or a .gguf file; may be repeated
--skip-peers     this library alone
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from benchmarks.contest import ROOT, Contest, side_environment
from benchmarks.inputs import Task
from benchmarks.models import default_models, prepare
from benchmarks.own import Bench
from benchmarks.report import Section, document
from benchmarks.timing import Pace
from steerwell.engines.hf import HFEngine

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SMALL = 80_000_000  # bytes of weights


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Measure speed; see RESULTS.md.")
    parser.add_argument("--quick", action="store_true", help="few rounds, to try out; does not write RESULTS.md")
    parser.add_argument("--model", action="append", help="pilot, random-pilot, random-100M, a folder, hub id or .gguf")
    parser.add_argument("--skip-peers", action="store_true", help="this library alone")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began = time.perf_counter()
    _say("setting up")
    python, side = (None, "Peers: skipped") if options.skip_peers else side_environment()
    sections = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.model or default_models():
            for section in measure(prepare(model, Path(folder)), python, quick=options.quick):
                _say(f"{time.perf_counter() - began:4.0f} s  {section.title}")
                sections.append(section)
    text = document(sections, [side], time.perf_counter() - began)
    print(text)
    if not options.quick:
        RESULTS.write_text(text)
    return 0


def measure(model: Path, python: str | None, *, quick: bool) -> Iterator[Section]:
    """All sections of one model; of a large one fewer comparisons, shorter answers and fewer texts."""
    engine = HFEngine.load(str(model), dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    small = sum(file.stat().st_size for file in model.glob("*.safetensors")) < SMALL
    task, new_tokens, pairs = Task.for_tokenizer(tokenizer), 64 if small else 12, 64 if small else 16

    def pace(seconds: float, least: int = 5) -> Pace:
        return Pace(0, 2) if quick else Pace(seconds, least if small else 3)

    bench = Bench(model.name, engine, tokenizer, task, new_tokens)
    yield bench.steered_beside_unsteered(pace(40), thorough=small)
    if small:
        yield bench.different_beside_equal(pace(35))
        yield bench.mixed_beside_one_by_one(pace(20))
    layers = engine.info.n_layers
    del bench, engine
    file = model.parent / f"{model.name}.json"
    file.write_text(json.dumps(asdict(task)))
    contest = Contest(model, file, python, layers, thorough=small)
    with contest.workers() as workers:
        yield contest.generation(workers, 1, new_tokens, pace(15))
        yield contest.generation(workers, 32, new_tokens, pace(25))
        yield contest.training(workers, pairs, pace(10))
    yield contest.memory(pairs, 1 if quick else 2)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main())
