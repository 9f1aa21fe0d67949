"""Speed of steering inside vLLM: throughput beside vLLM without the plugin, in one run, rounds interleaved.

    .venv-vllm/bin/python -m benchmarks.vllm_speed [--batch 32] [--rounds 7] [--width 512] [--layers 8]

Two engines of the same random model stand in one process, one plain, one that can steer. Every round measures every
condition once, in an order of its own; a condition's ratio is its throughput over the plain engine's of that round, and
the table shows the median and the range of the ratios. The prefix cache is off; all requests give as many tokens.

On the CPU the clock is the process's own time on the processor, which other work on the machine hardly changes; on CUDA
it is the clock on the wall.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steerwell.core.records import Edit, EditTerm
from steerwell.engines.vllm.plugin import REGISTERED
from steerwell.engines.vllm.wire import KEY, encode, packed, vector_name

PROMPT, ANSWER = 16, 64  # tokens
Edits = list[Edit | None]


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


def throughput(core: Any, edits: Edits) -> float:
    """Generated tokens per second of one batch, a request per edit."""
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
    return len(edits) * ANSWER / (clock() - began)


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


def measure(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Throughput of every condition in every round; the first round, which warms up, is left out."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds + 1):
        names = list(runs)
        order.shuffle(names)
        for name in names:
            found[name].append(runs[name]())
    return {name: values[1:] for name, values in found.items()}


def table(found: dict[str, list[float]]) -> str:
    """Ratios to the first condition, round by round."""
    plain = next(iter(found.values()))
    lines = ["| condition | tokens/s, median | ratio to plain vLLM, median (range) |", "|---|---|---|"]
    for name, values in found.items():
        ratios = [value / base for value, base in zip(values, plain, strict=True)]
        shown = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        lines.append(f"| {name} | {statistics.median(values):.0f} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("batch", 32), ("rounds", 7), ("width", 512), ("layers", 8), ("captures", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--eager", action="store_true", help="without compilation")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), given.width, given.layers)
        plain = start(Path(folder), given.batch, given.eager, {})
        steered = start(Path(folder), given.batch, given.eager, {KEY: {"captures": given.captures}})
        cases = conditions(given.batch, given.width, given.layers)
        for edits in cases.values():
            register(steered, edits)
        runs = {"plain vLLM": lambda: throughput(plain, [None] * given.batch)}
        for name, edits in cases.items():
            runs[name] = lambda edits=edits: throughput(steered, edits)
        print(f"batch {given.batch}, {given.layers} layers of width {given.width}, {PROMPT} tokens in, {ANSWER} out;")
        print(f"{'eager' if given.eager else 'compiled'}; {given.rounds} rounds, interleaved\n")
        print(table(measure(runs, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
