"""Speed of steering inside vLLM: `make bench-vllm` measures it beside vLLM without the plugin and writes VLLM.md.

--batch, --widths, --layers, --rounds   what is measured; with anything else than the defaults VLLM.md is not written
--eager                                 without compilation
--captures                              with the op in the graph that reads states
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import ROOT
from benchmarks.report import Row, Section, machine
from benchmarks.timing import Pace, Summary, Times, ratio, take_turns
from steerwell.core.artifacts import write_atomic
from steerwell.core.records import Edit, EditTerm
from steerwell.engines.vllm.front import REGISTERED
from steerwell.engines.vllm.wire import KEY, encode, packed, vector_name

PROMPT, ANSWER = 16, 64  # tokens
Edits = list[Edit | None]
PLAIN = "plain vLLM"
RESULTS = ROOT / "benchmarks" / "VLLM.md"
HOW_TO_READ = f"""\
Two engines of the same random float32 Llama stand in one process: vLLM as it is, and vLLM that can steer. All requests
of a batch come at once, {PROMPT} tokens each, and give {ANSWER} tokens, so that every batch is the same work but for
the steering; the prefix cache is off. Every round measures every condition once, in an order that turns around; a ratio
is a condition's throughput over plain vLLM's of the same round, and given are the median over the rounds and their
middle half. A ratio whose middle half spans its target is not decided by this run.

On the CPU the clock is the process's own time on the processor, which other work on the machine changes less than the
time on the wall; on CUDA it is the clock on the wall.\
"""


def save_model(folder: Path, width: int, layers: int) -> None:
    """A random Llama in float32, with a vocabulary of 4096 and no tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def start(folder: Path, batch: int, eager: bool, steering: dict[str, Any]) -> Any:
    """A vLLM engine; `steering` is its additional configuration."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm import EngineArgs

    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=batch,
        enforce_eager=eager,
        enable_prefix_caching=False,
        async_scheduling=False,
        disable_log_stats=True,
        kv_cache_memory_bytes=1 << 29,
        seed=0,
        additional_config=steering,
    )
    return LLMEngine.from_engine_args(arguments)


def seconds(core: Any, edits: Edits) -> float:
    """What one batch takes, a request per edit."""
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

    clock = time.process_time if core.vllm_config.device_config.device_type == "cpu" else time.perf_counter
    rng = np.random.default_rng(0)
    common = {"temperature": 0.0, "max_tokens": ANSWER, "ignore_eos": True, "detokenize": False}
    began = clock()
    for row, edit in enumerate(edits):
        extra = None if edit is None else {KEY: encode(edit, known=REGISTERED)}
        how = SamplingParams(**common, extra_args=extra, output_kind=RequestOutputKind.FINAL_ONLY)
        core.add_request(str(row), tokens_input(rng.integers(3, 4096, PROMPT).tolist()), how)
    while core.has_unfinished_requests():
        core.step()
    return float(clock() - began)


def conditions(batch: int, width: int, layers: int) -> dict[str, Edits]:
    """What the rows of a batch are steered with."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(batch + 1, layers, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)

    def edit(which: int, strength: float, chosen: list[int]) -> Edit:
        terms = (EditTerm(layer, vectors[which, layer], math.inf, strength, -0.5 * strength) for layer in chosen)
        return Edit(tuple(terms))

    middle, every = [layers // 2], list(range(layers))
    return {
        "no request steered": [None] * batch,
        "half of the requests, one layer": [edit(0, 0.1, middle) if row % 2 else None for row in range(batch)],
        "one layer, one configuration": [edit(0, 0.1, middle)] * batch,
        f"one layer, {batch} strengths": [edit(0, 0.01 * row, middle) for row in range(batch)],
        f"one layer, {batch} directions and strengths": [edit(row, 0.01 * row, middle) for row in range(batch)],
        "all layers, one configuration": [edit(0, 0.1, every)] * batch,
        f"all layers, {batch} directions and strengths": [edit(row, 0.01 * row, every) for row in range(batch)],
    }


def register(core: Any, edits: Edits) -> None:
    """Send the vectors ahead, as a server does with its policies."""
    vectors = [term.direction for edit in edits if edit is not None for term in edit.terms]
    named = {vector_name(vector): packed(vector) for vector in vectors}
    core.collective_rpc("steerwell_register", args=(named,))
    REGISTERED.update(named)


def version() -> str:
    """vLLM's, whatever its distribution is called."""
    import vllm

    return str(vllm.__version__)


def section(times: Times, batch: int, width: int, layers: int, on_cpu: bool) -> Section:
    """Ratios to plain vLLM, round by round."""
    tokens, one = batch * ANSWER, 0.95 if on_cpu else 0.97
    rows = []
    for name, spent in times.items():
        if name == PLAIN:
            continue
        against = ratio(times, PLAIN, name)
        figures = " / ".join(f"{tokens / Summary.of(side).median:,.0f}" for side in (spent, times[PLAIN]))
        target = one if name.startswith("one layer") else None if on_cpu or "all" not in name else 0.9
        rows.append(Row(name, against, f"{figures} tokens/s", at_least=target))
    return Section(f"{layers} layers of width {width}", f"{batch} requests at one time.", rows)


def measured(width: int, given: argparse.Namespace) -> Section:
    """One model's table."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), width, given.layers)
        plain = start(Path(folder), given.batch, given.eager, {})
        steered = start(Path(folder), given.batch, given.eager, {KEY: {"captures": given.captures}})
        cases = conditions(given.batch, width, given.layers)
        for edits in cases.values():
            register(steered, edits)
        runs: dict[str, Callable[[], float]] = {PLAIN: lambda: seconds(plain, [None] * given.batch)}
        for name, edits in cases.items():
            runs[name] = lambda edits=edits: seconds(steered, edits)
        times = take_turns(runs, Pace(0, given.rounds))
    on_cpu = plain.vllm_config.device_config.device_type == "cpu"
    return section(times, given.batch, width, given.layers, on_cpu)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_speed", description="Speed of steering in vLLM.")
    for name, value in (("batch", 32), ("rounds", 9), ("layers", 8), ("captures", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--widths", type=int, nargs="+", default=[512])
    parser.add_argument("--eager", action="store_true", help="without compilation")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    began = time.perf_counter()
    tables = [measured(width, given).markdown() for width in given.widths]
    versions = [f"vllm {version()}, {'eager' if given.eager else 'compiled'}"]
    here = machine(versions, time.perf_counter() - began)
    head = ["# Steering inside vLLM: speed", "", "Written by `make bench-vllm`; do not edit.", "", *here, ""]
    text = "\n".join([*head, HOW_TO_READ, "", *tables])
    print(text, flush=True)
    if given == parser.parse_args([]):
        write_atomic(RESULTS, text)


if __name__ == "__main__":
    main()
