"""The start-up test: is the op live in the graph that will answer requests?

Dummy steps run through the very path that requests take (compiled, and on CUDA replayed graphs), with an edit behind
every block. Each block must have seen every token, and each edit must have reached the next block and the output.
Where traces are kept, the op must have told them.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerwell.core.errors import EngineError
from steerwell.engines.vllm.ops import BEFORE, MARGIN, MOVED, ROW, SEEN, TALLY, TRACE
from steerwell.engines.vllm.state import Steering

PUSH = 8.0  # displacement in activation units
TOKENS = 4


def prove(runner: Any, steering: Steering) -> None:
    """Run the test on a loaded and warmed-up model runner.

    Raises:
        EngineError: a block was not steered; the server must not start.
    """
    tokens = min(TOKENS, runner.max_num_reqs, runner.max_num_tokens)
    for uniform in (False, True):  # a mixed step, and a step of decoding only, which may replay another graph
        plain, steered, last = (
            _run(runner, steering, offsets, tokens, uniform)
            for offsets in (_offsets(steering), _offsets(steering, first=True), _offsets(steering, last=True))
        )
        _check(steering, plain, steered, last, tokens)


def _offsets(steering: Steering, *, first: bool = False, last: bool = False) -> NDArray[np.float32]:
    """Displacement at each layer: all of them (`first`), the last one, or none."""
    offsets = np.full(len(steering.layers), PUSH if first else 0.0, np.float32)
    offsets[-1] = PUSH if first or last else 0.0
    return offsets


def _run(
    runner: Any, steering: Steering, offsets: NDArray[np.float32], tokens: int, uniform: bool
) -> tuple[NDArray[np.float64], Tensor | None, Tensor]:
    """One dummy step with an ungated edit at every layer: the sums [L, 6], the output of the model, and the traces."""
    buffers = steering.buffers
    vector = torch.linspace(-1, 1, buffers.table.shape[1], device=buffers.table.device)
    before = {name: getattr(buffers, name).clone() for name in ("live", "ids", "numbers", "sums")}
    buffers.table[0] = vector / vector.norm()
    buffers.ids[:, 2, 0] = 0
    buffers.numbers[:, 2, 0, 0] = torch.inf
    buffers.numbers[:, 2, 0, 1] = torch.from_numpy(offsets).to(vector.device)
    buffers.live.fill_(1)
    buffers.tokens.zero_()
    buffers.tokens[ROW, :tokens], buffers.tokens[TALLY, :tokens] = 2, 1
    traced = buffers.traced[:, 1 : tokens + 1, 0]  # [L, tokens or what there is room for, 2]
    places = traced.shape[1]
    buffers.tokens[TRACE, :places] = torch.arange(1, places + 1, device=vector.device)
    try:
        # V1 leaves attention out of a dummy step unless told otherwise; what it returns is then never written.
        known = signature(runner.steerwell_dummy_run).parameters
        forced = {"force_attention": True} if "force_attention" in known else {}
        output = runner.steerwell_dummy_run(tokens, uniform_decode=uniform, **forced)
        hidden = output[0] if isinstance(output, tuple) else None
        shown = hidden[:tokens].float().cpu().clone() if isinstance(hidden, Tensor) else None
        return buffers.sums[:, 1, 0].cpu().double().numpy(), shown, traced.cpu().clone()
    finally:
        buffers.tokens.zero_()
        traced.fill_(torch.nan)
        for name, value in before.items():
            getattr(buffers, name).copy_(value)


def _check(steering: Steering, plain: Any, steered: Any, last: Any, tokens: int) -> None:
    for index, layer in enumerate(steering.layers):
        sums = steered[0][index]
        if sums[SEEN] != tokens or not np.isclose(sums[MOVED], tokens * PUSH, rtol=1e-5) or sums[MARGIN] != np.inf:
            raise EngineError(
                f"start-up test: the op behind layer {layer} saw {sums[SEEN]:g} of {tokens} tokens and moved them by "
                f"{sums[MOVED]:g} in all, expected {tokens * PUSH:g}; this vLLM cannot be steered"
            )
        if index and not abs(sums[BEFORE] - plain[0][index][BEFORE]) > 0:
            raise EngineError(
                f"start-up test: the edit behind layer {layer - 1} did not reach layer {layer}: the compiled graph "
                "has dropped it; this vLLM cannot be steered"
            )
    told = steered[2]
    if not bool((told[..., 0] == 1).all() and told.isfinite().all()):
        raise EngineError("start-up test: the op told no trace, or a wrong one; start without the setting 'traces'")
    if plain[1] is not None and not bool((plain[1] - last[1]).abs().amax() > 0):
        raise EngineError("start-up test: the edit behind the last layer did not reach the output")
