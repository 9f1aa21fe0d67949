"""The vLLM engine: the same edits inside vLLM's compiled graph, one per request. Nothing heavy is imported until used.

wire     an edit as request data (`SamplingParams.extra_args["steerwell"]`), and the settings
ops      the custom ops that decoder blocks call, and the persistent buffers that they read
host     the same ops on the CPU
kernels  the same ops in Triton, for CUDA
blocks   find the decoder blocks of a vLLM model and put the ops behind them
state    which request has which rows of the buffers, step by step; live: one request; traces: its trace
proof    the start-up test that the ops are live in the compiled graph
plugin   what changes in vLLM: the entry point `vllm.general_plugins`; front: in its front ends
policy   a policy inside vLLM's own server
client   requests on their way to vLLM and back; batch: a running batch of them
engine   `VLLMEngine`, what users hold; options, about: what it is started with, and what the model is
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerwell.engines.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]


def __getattr__(name: str) -> Any:
    if name == "VLLMEngine":
        from steerwell.engines.vllm.engine import VLLMEngine

        return VLLMEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
