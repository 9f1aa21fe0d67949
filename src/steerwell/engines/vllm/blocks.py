"""Find the decoder blocks of a vLLM model by structure, and put the ops behind each of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from steerwell.core.errors import EngineError
from steerwell.engines.vllm.ops import Buffers

OWN_SUM = re.compile(r"residual\s*\+\s*\w|[\w)]\s*\+\s*residual\b")  # in a block's source: it adds the residual itself
PAIR = re.compile(r"return \(?hidden_states, residual\b")


class Point(nn.Module):
    """Calls the ops behind one decoder block. Its buffers are the shared ones, so they are inputs of the graph."""

    def __init__(self, buffers: Buffers, index: int, reads: bool, traces: bool) -> None:
        super().__init__()
        for item in fields(buffers):
            self.register_buffer(item.name, getattr(buffers, item.name), persistent=False)
        # A tensor, not a number: the graphs of all blocks are the same and are compiled once.
        self.register_buffer("layer", torch.tensor(index, device=buffers.tokens.device), persistent=False)
        self.reads, self.traces = reads, traces

    def forward(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Steer `hidden` [T, d_model] in place; then read the states that steering left."""
        torch.ops.steerwell.steer(
            hidden,
            residual,
            self.layer,
            self.tokens,
            self.live,
            self.ids,
            self.numbers,
            self.table,
            self.sums,
            self.traced if self.traces else None,
        )
        if self.reads:
            torch.ops.steerwell.read(hidden, residual, self.layer, self.tokens, self.captured)


def decoder_blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of `count` decoder blocks: the one whose owner knows which of them this process runs, else the only one.

    Raises:
        EngineError: none, or several.
    """
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    owned = [item for item in stacks if hasattr(model.get_submodule(item[0].rpartition(".")[0]), "start_layer")]
    found = owned or stacks
    if len(found) != 1:
        raise EngineError(
            f"{type(model).__name__}: found {len(found)} lists of {count} decoder blocks, expected one; "
            "this model cannot be steered in vLLM"
        )
    return found[0][1]


def own_layers(blocks: nn.ModuleList) -> list[int]:
    """Layers that this process runs; in a pipeline the others are placeholders."""
    return [layer for layer, block in enumerate(blocks) if type(block).__name__ != "PPMissingLayer"]


def attach(blocks: nn.ModuleList, layers: Sequence[int], buffers: Buffers, reads: bool, traces: bool = False) -> None:
    """Put the ops behind the blocks that this process runs; to be called before anything is compiled.

    Raises:
        EngineError: a block's output is not understood.
    """
    for index, layer in enumerate(layers):
        block = blocks[layer]
        _check_convention(block)
        block.add_module("steerwell", Point(buffers, index, reads, traces))
        block.register_forward_hook(_after)


def _after(block: nn.Module, _inputs: Any, output: Any) -> None:
    """A hook that stands before compilation becomes part of the graph; one added later would be ignored."""
    hidden, residual = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 2:
        raise EngineError(f"{type(block).__name__} returned no state [tokens, d_model]; it cannot be steered in vLLM")
    if residual is not None and (not isinstance(residual, Tensor) or residual.shape != hidden.shape):
        raise EngineError(f"{type(block).__name__}: its second output is no residual; it cannot be steered in vLLM")
    block.steerwell(hidden, residual)  # type: ignore[operator]


def _check_convention(block: nn.Module) -> None:
    """Refuse blocks that add the residual themselves and return it all the same: the sum is not the stream there."""
    try:
        source = inspect.getsource(type(block).forward)
    except (OSError, TypeError):
        return
    if PAIR.search(source) and OWN_SUM.search(source):
        raise EngineError(
            f"{type(block).__name__} returns a residual that is in its hidden state already (Cohere's convention); "
            "this model cannot be steered in vLLM - use --engine hf"
        )
