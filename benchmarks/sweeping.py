"""What trying every way to steer costs: `python -m benchmarks.sweeping` writes SWEEP.md and prints it.

The bundled model answers 24 validation scenarios under attack in every way of a grid, differently steered rows in one
engine call. Beside it: one way at a time, and loops in repeng, steering-vectors and plain transformers, each in a
process of its own (`python benchmarks/sweeping.py NAME MODEL_FOLDER PROMPTS_FILE`, in the peers' environment).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.peers import CONTESTANTS, Tokens, Transformers
from benchmarks.timing import Pace, Summary, Times, clocked, ratio, take_turns

if importlib.util.find_spec("steerwell"):  # not where the peers live: there this file only answers requests
    import transformers

    from benchmarks.contest import PEERS, ROOT, Worker, side_environment
    from benchmarks.report import Row, Section, differences, machine
    from steerwell.concepts import Concept, load_concept
    from steerwell.core.artifacts import save_direction, write_atomic
    from steerwell.core.records import Direction, Edit, Prompt, Sampling
    from steerwell.engines.hf import HFEngine, cache, model, plan
    from steerwell.engines.hf import batch as batches
    from steerwell.runs.ledger import Ledger
    from steerwell.scoring.judges.exact import ExactJudge
    from steerwell.studies import sweep
    from steerwell.studies.defence import Configuration, attack_prompts, edits_of, grid
    from steerwell.studies.fitting import fit
    from steerwell.testbed.bundled import bundled_path

SCENARIOS, NEW_TOKENS = 24, 256  # the sweep's defaults
MIXED, ALONE = (64, 128, 256, 512), (12, 24)  # batch sizes tried on either side
GOAL = 5.0  # times faster than a peer's loop
Ways = Sequence[int]  # indices of configurations
Run = Callable[[Ways], float]  # does some ways, tells the seconds it took


def loop(name: str, peer: Any, prompts: Sequence[str], request: Mapping[str, Any]) -> Tokens:
    """Answers under every vector (a layer, what is added to its output), as a user of the library would write it."""
    answers: Tokens = []
    for layer, values in request["vectors"]:
        with _steered(name, peer, layer, torch.tensor(values)) as model:
            for start in range(0, len(prompts), request["batch"]):
                part = list(prompts[start : start + request["batch"]])
                inputs = peer.tokenizer(part, return_tensors="pt", padding=True)
                with torch.inference_mode():
                    whole = model.generate(**inputs, max_new_tokens=request["new_tokens"], do_sample=False)
                said = whole[:, inputs["input_ids"].shape[1] :]
                peer.tokenizer.batch_decode(said, skip_special_tokens=True)
                answers.extend(list(takewhile(model.config.eos_token_id.__ne__, row)) for row in said.tolist())
    return answers


@contextmanager
def _steered(name: str, peer: Any, layer: int, vector: torch.Tensor) -> Iterator[Any]:
    """The model with a vector added to a layer's output, in the way of a library."""
    if name == "repeng":
        from repeng import ControlModel, ControlVector

        control = ControlVector(peer.model.config.model_type, {layer: vector.numpy()})
        model = ControlModel(peer.model, [layer])
        model.set_control(control, 1.0)
        try:
            yield model
        finally:
            model.unwrap()
    elif name == "steering-vectors":
        from steering_vectors import SteeringVector

        with SteeringVector({layer: vector}).apply(peer.model):
            yield peer.model
    else:
        handle = peer.model.model.layers[layer].register_forward_hook(lambda _module, _inputs, output: output + vector)
        with handle:
            yield peer.model


def serve(name: str, folder: str, file: str) -> int:
    """Answer the requests of standard input: one JSON line each."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer, prompts = Transformers(folder), json.loads(Path(file).read_text())
    for line in sys.stdin:
        start = time.perf_counter()
        tokens = loop(name, peer, prompts, json.loads(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=reply, flush=True)
    return 0


@dataclass(frozen=True, eq=False)
class Bench:
    """The grid on the bundled model, in random order, so that its first ways are a random part of it."""

    engine: HFEngine
    concept: Concept
    direction: Direction
    ways: list[Configuration]
    edits: list[Edit]
    prompts: list[Prompt]
    sampling: Sampling
    tokens: dict[int, int] = field(default_factory=dict)  # in the answers of every way tried so far

    @classmethod
    def load(cls) -> Bench:
        """Load the model, fit the direction."""
        engine = HFEngine.load(dtype="float32")
        concept = load_concept("dishonesty", engine.info.language)
        direction = fit(engine, concept)
        ways = grid(range(engine.info.n_layers), positions=("all", "response"))
        random.Random(0).shuffle(ways)
        edits = edits_of(dict.fromkeys((way.reading for way in ways), direction), ways)
        prompts = attack_prompts(concept, "validation", SCENARIOS)
        return cls(engine, concept, direction, ways, edits, prompts, Sampling(max_new_tokens=NEW_TOKENS))

    def mixed(self, ways: Ways, batch: int) -> Tokens:
        """Answers under all of some ways in one engine call, way by way."""
        self.engine.batch_size = batch
        edits = [self.edits[way] for way in ways for _ in self.prompts]
        answers = self.engine.generate(self.prompts * len(ways), self.sampling, edits)
        said = [list(answer.token_ids) for answer in answers]
        size = len(self.prompts)
        for number, way in enumerate(ways):
            self.tokens[way] = sum(map(len, said[number * size : (number + 1) * size]))
        return said

    def alone(self, ways: Ways, batch: int) -> Tokens:
        """The same, one engine call for each way."""
        return [answer for way in ways for answer in self.mixed([way], batch)]

    def count(self, ways: Ways) -> int:
        """Answer tokens of some ways."""
        return sum(self.tokens[way] for way in ways)


def turns(runs: Mapping[str, Run], small: Ways, parts: Sequence[Ways]) -> Times:
    """Seconds of every contestant on every part, taking turns, after a small part that does not count."""

    def contestant(run: Run, work: Iterator[Ways]) -> Callable[[], float]:
        return lambda: run(next(work))

    return take_turns({name: contestant(runs[name], iter([small, *parts])) for name in runs}, Pace(0, len(parts)))


def _timed(run: Callable[[Ways, int], object], batch: int) -> Run:
    return lambda ways: clocked(lambda: run(ways, batch))()


def best_sizes(bench: Bench, ways: Ways, rounds: int) -> tuple[int, int, Section]:
    """Batch sizes at which mixed ways, and ways one at a time, take least time."""
    runs = {f"mixed, {size} rows": _timed(bench.mixed, size) for size in MIXED}
    runs |= {f"one way at a time, {size} rows": _timed(bench.alone, size) for size in ALONE}
    times = turns(runs, ways[:2], [ways] * rounds)
    speed = {name: bench.count(ways) / Summary.of(times[name]).median for name in runs}
    mixed = max(MIXED, key=lambda size: speed[f"mixed, {size} rows"])
    alone = max(ALONE, key=lambda size: speed[f"one way at a time, {size} rows"])
    note = (
        f"Tokens per second on {len(ways)} ways, median of {rounds}. Each side goes on with its best, {mixed} and "
        f"{alone}; one way at a time has {len(bench.prompts)} prompts, so its batch can be no larger."
    )
    remarks = [f"{name}: {value:,.0f} tokens/s" for name, value in speed.items()]
    return mixed, alone, Section("Batch sizes", note, remarks=remarks)


def beside_alone(bench: Bench, sizes: tuple[int, int], parts: Sequence[Ways]) -> Section:
    """Mixed beside one way at a time over the whole grid, in parts."""
    runs = {"mixed": _timed(bench.mixed, sizes[0]), "alone": _timed(bench.alone, sizes[1])}
    times = turns(runs, parts[0][:1], parts)
    ways = [way for part in parts for way in part]
    whole = {name: sum(times[name]) for name in runs}
    figures = " / ".join(f"{whole[name]:.1f} s ({bench.count(ways) / whole[name]:,.0f} tokens/s)" for name in runs)
    return Section(
        "Mixed beside one way at a time",
        f"Time of one engine call per way over that of one call for all, in {len(parts)} random parts. Absolute: all "
        f"{len(ways)} ways ({len(ways) * len(bench.prompts)} answers, {bench.count(ways)} tokens), mixed / one by one.",
        [Row("one way at a time / mixed", ratio(times, "alone", "mixed"), figures)],
    )


def linear(bench: Bench, batch: int, ways: Ways, rounds: int) -> Section:
    """Time of a quarter, a half and the whole of some ways."""
    shares = {"a quarter": 4, "a half": 2}
    run = _timed(bench.mixed, batch)
    runs = {name: lambda part, n=n: run(part[: len(part) // n]) for name, n in shares.items()}
    times = turns({"all": run} | runs, ways[:4], [ways] * rounds)
    section = Section(
        "Cost beside the number of ways",
        f"Time of {len(ways)} ways over that of a random quarter or half of them, divided by how many times more ways "
        "(or answer tokens) that is. 1: linear; above 1: worse.",
    )
    for name, n in shares.items():
        part = ways[: len(ways) // n]
        figures = " / ".join(f"{Summary.of(times[side]).median:.2f} s" for side in ("all", name))
        for what, factor in (("ways", len(ways) / len(part)), ("tokens", bench.count(ways) / bench.count(part))):
            scaled = {"all": times["all"], name: [factor * seconds for seconds in times[name]]}
            section.rows.append(Row(f"all / {name}, by {what}", ratio(scaled, "all", name), figures))
    return section


@contextmanager
def peers(python: str, prompts: Sequence[Prompt]) -> Iterator[dict[str, Worker]]:
    """A process for every loop, with the prompts in the model's chat format."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(bundled_path())
    chats = [[{"role": turn.role, "content": turn.content} for turn in prompt.messages] for prompt in prompts]
    places = {"transformers": sys.executable} | dict.fromkeys(PEERS, python)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder) / "prompts.json"
        file.write_text(json.dumps(tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)))
        workers = {}
        for name, place in places.items():
            command, pipe = [place, __file__, name, str(bundled_path()), str(file)], subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
            workers[name] = Worker(stack.enter_context(process), name)  # its standard input ends with the block
        yield workers


def beside_peers(bench: Bench, python: str, batch: int, ways: Ways, rounds: int) -> Section:
    """Some additive ways, mixed in one call, beside the loops that users of other libraries write."""
    size, plain = len(bench.prompts), bench.mixed(ways, batch)
    section = Section(
        "Beside loops in other libraries",
        f"Time of theirs over ours for {len(ways)} random ways of the method that all have (a vector added at every "
        f"token): {len(plain)} answers, {bench.count(ways)} tokens. Ours: one call, batches of up to {batch}. Theirs: "
        "`for way: with vector.apply(model): model.generate(...)`, one prompt at a time as in their READMEs, or the "
        f"{size} prompts padded into one batch. `transformers`: a forward hook around `generate` of the newer "
        "transformers that ours builds on; steering-vectors needs an older one. Other tokens than ours are told below.",
    )
    unlike: dict[str, list[str]] = {}

    def run(label: str, worker: Worker, rows: int, part: Ways) -> float:
        terms = [bench.edits[way].terms[0] for way in part]
        vectors = [(term.layer, (term.offset * term.direction).tolist()) for term in terms]
        got = worker.ask(vectors=vectors, batch=rows, new_tokens=NEW_TOKENS)
        unlike[label] = differences(label, plain[: len(got["tokens"])], got["tokens"])
        return float(got["seconds"])

    with peers(python, bench.prompts) as workers:
        runs: dict[str, Run] = {"ours": _timed(bench.mixed, batch)}
        for name, worker in workers.items():
            for what, rows in (("padded batches", size), ("one prompt at a time", 1)):
                if name in PEERS or rows > 1:
                    runs[f"{name}, {what}"] = partial(run, f"{name}, {what}", worker, rows)
        times = turns(runs, ways[:1], [ways] * rounds)
    section.remarks.extend(remark for found in unlike.values() for remark in found)
    every, mean = len(bench.ways), statistics.mean(bench.tokens.values())  # tokens of a way, of those tried so far
    for name in runs:
        seconds = Summary.of(times[name]).median
        by_answers, by_tokens = (seconds / 60 * more for more in (every / len(ways), every * mean / bench.count(ways)))
        figures = f"{seconds:.2f} s, {bench.count(ways) / seconds:,.0f} tokens/s; all {every} ways would take "
        figures += f"{by_answers:.1f} min by answers, {by_tokens:.1f} by tokens"
        if name == "ours":
            section.remarks.append(f"ours: {figures}")
        else:
            section.rows.append(Row(f"{name} / ours", ratio(times, name, "ours"), figures, at_least=GOAL))
    return section


@contextmanager
def watched(seconds: defaultdict[str, float]) -> Iterator[None]:
    """Add up the seconds spent in the parts of a sweep; only those called `of it` lie inside others."""

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                phase = {None: "", True: "prefill", False: "decode"}[options.get("prompt")]
                seconds[part + phase] += time.perf_counter() - start

        return run

    text, receipts = "tokens and text", "receipts"
    with ExitStack() as stack:
        for owner, name, part in (
            (model.LoadedModel, "step", ""),
            (torch.nn.functional, "linear", "of it matrix products"),
            (torch.nn.functional, "scaled_dot_product_attention", "of it attention"),
            (cache.Columns, "update", "of it growth of the cache"),
            (plan, "gated_affine", "of it steering"),
            (cache, "keep", "finished rows leave the cache"),
            (plan.Plan, "keep", receipts),
            (plan.Plan, "receipt", receipts),
            (batches, "draw", "sampling"),
            (batches.Row, "append", text),
            (HFEngine, "_rows", text),
            (batches.Row, "response", text),
            (sweep, "verdicts", "judge"),
            (Ledger, "record", "ledger"),
            (sweep, "heat_map", "heat map"),
        ):
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
        yield


def profile(bench: Bench, batch: int, ways: Ways) -> Section:
    """A sweep, its direction fitted before, by where its time goes."""
    tried = tuple(bench.ways[way] for way in ways)
    work = sweep.Sweep(bench.concept, tried, validation=SCENARIOS, test=1, sampling=bench.sampling)
    bench.engine.batch_size, seconds = batch, defaultdict[str, float](float)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_direction(bench.direction, folder / "directions" / "-".join(tried[0].reading))
        quiet, judge = (lambda *_: lambda _: None), ExactJudge()
        with watched(seconds):
            whole = clocked(lambda: work.run(bench.engine, judge, folder, rows_per_unit=batch, say=quiet))()
    inner = sum(value for part, value in seconds.items() if part.startswith("of it"))
    seconds["the rest"] = whole - sum(seconds.values()) + inner
    seconds["of it norms, rotary embedding, activations, Python"] = seconds["prefill"] + seconds["decode"] - inner
    layers, before = bench.engine.info.n_layers, seconds["prefill"] / whole
    common = statistics.mean(1 if way.position == "response" else (way.layer + 1) / layers for way in tried)
    parts = sorted(seconds, key=lambda part: (part not in ("prefill", "decode"), part[:5] != "of it", -seconds[part]))
    return Section(
        "Where the time goes",
        f"`Sweep.run` over {len(ways)} ways, {whole:.1f} s. `prefill`, `decode`: the model reads prompts, or goes on; "
        "*of it*: parts of these two.\n\n| part | share | seconds |\n|---|---|---|\n"
        + "\n".join(f"| {part} | {seconds[part] / whole:.1%} | {seconds[part]:.2f} |" for part in parts),
        remarks=[
            f"Equal prompts share {common:.0%} of the prefill: layers up to the steered one (position `all`), or all "
            f"but the last token (`response`). So reading each prompt once would save at most {before * common:.0%}. "
            "Decoded tokens differ between ways; there untouched lower layers have nothing to share.",
        ],
    )


HEAD = """# What a sweep costs

Written by `python -m benchmarks.sweeping`; do not edit.

{}

The bundled model, float32, greedy, at most {} new tokens. The grid: every layer, three methods, the paper's strengths,
both positions: {} ways to steer, each on the same validation scenarios under attack. Contestants take turns, only times
of one round are divided, and medians and middle halves over the rounds are given.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeping", description="Measure; see SWEEP.md.")
    parser.add_argument("--quick", action="store_true", help="a few ways, to try out; does not write SWEEP.md")
    quick = parser.parse_args(argv).quick
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    began, sections = time.perf_counter(), []
    python, side = side_environment()
    bench = Bench.load()
    for section in measure(bench, python, 0.04 if quick else 1, 1 if quick else 3):
        print(f"{time.perf_counter() - began:4.0f} s  {section.title}", file=sys.stderr, flush=True)
        sections.append(section)
    lines = "\n".join(machine([side], time.perf_counter() - began))
    page = HEAD.format(lines, NEW_TOKENS, len(bench.ways)) + "\n".join(section.markdown() for section in sections)
    print(page)
    if not quick:
        write_atomic(ROOT / "benchmarks" / "SWEEP.md", page)
    return 0


def measure(bench: Bench, python: str | None, share: float, rounds: int) -> Iterator[Section]:
    """Everything, over a share of the grid."""
    every = list(range(round(share * len(bench.ways))))
    added = [way for way, item in enumerate(bench.ways) if item.method == "swfc" and item.position == "all"][:6]
    mixed, alone, section = best_sizes(bench, every[:24], min(rounds, 2))
    yield section
    yield beside_alone(bench, (mixed, alone), [every[start::4] for start in range(4)])
    if python:
        yield beside_peers(bench, python, mixed, added, rounds)
    yield linear(bench, mixed, every[: len(every) // 2], min(rounds, 2))
    yield profile(bench, mixed, every)


if __name__ == "__main__":
    raise SystemExit(serve(*sys.argv[1:]) if sys.argv[1:2] and sys.argv[1] in CONTESTANTS else main())
