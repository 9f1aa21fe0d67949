"""The two custom ops that decoder blocks call, and the persistent buffers that they read and write.

`steerwell::steer` applies the gated affine edit of METHODS section 3 to the tokens of a step, every token under the
terms of its own request; `steerwell::read` sums up the states of the tokens whose mean is asked for. A compiled graph,
and a replayed CUDA graph, see the same buffers at every step: only what is in them changes.

vLLM's blocks return `(hidden, residual)`, whose sum is the residual stream. Projections are of the sum; the edit is
added to `hidden` in place. The arithmetic is float32, as in `steerwell.steering.kernel`, term after term.

Here is the reference in torch. On the CPU `host` does the work; on CUDA, where Triton is installed, `kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

SEEN, EDITED, BEFORE, MOVED, DISTANCE, MARGIN = range(6)  # the columns of `Buffers.sums`
ROW, TALLY, CAPTURE, TRACE = range(4)  # the rows of `Buffers.tokens`
TOLD = slice(EDITED, BEFORE + 1)  # what of these `Buffers.traced` holds of a single token

STEER = (
    "steer(Tensor(a!) hidden, Tensor? residual, Tensor layer, Tensor tokens, Tensor live, Tensor ids, Tensor numbers,"
    " Tensor table, Tensor(b!) sums, Tensor(c!)? traced=None) -> ()"
)
READ = "read(Tensor hidden, Tensor? residual, Tensor layer, Tensor tokens, Tensor(a!) captured) -> ()"


@dataclass(frozen=True, slots=True)
class Buffers:
    """What the ops share, on the model's device. L layers, S requests at one time, K terms, T tokens of a step.
    They are changed in place only, by PyTorch: `host` goes by its count of changes.

    A running request has a slot s from 1 to S, and two rows of coefficients: 2 s - 1 for tokens in the scope of
    position `all` only, 2 s for those in the scope of `response` too. Row 0 and slot 0 are nobody's.

    Attributes:
        tokens: int32 [4, T]: every token's row of coefficients, its slot in `sums`, its place in `captured`, and its
            place in `traced`.
        live: int32 [L], how many terms now stand at each layer; 0 lets the op return at once.
        ids: int32 [L, 2 S + 1, K, 2], rows of `table` for v and c; -1: no term.
        numbers: float32 [L, 2 S + 1, K, 3]: gate, offset, gain.
        table: float32 [N, d_model], the directions.
        sums: float32 [L, S + 1, K, 6], what each term did: tokens seen, tokens edited, and over the seen ones the sum
            of projections before, of displacements and of their sizes, and the smallest |h . c - g|.
        captured: float32 [L, C + 1, d_model], sums of states; place 0 is nobody's.
        traced: float32 [L, P + 1, K, 2], what each term met at single tokens: whether its gate was open, and the
            projection before; NaN until the token has run, and for terms in whose scope it is not. Place 0 is nobody's.
    """

    tokens: Tensor
    live: Tensor
    ids: Tensor
    numbers: Tensor
    table: Tensor
    sums: Tensor
    captured: Tensor
    traced: Tensor

    @classmethod
    @torch.inference_mode(False)  # tensors that are made in that mode do not count their changes
    def empty(
        cls,
        *,
        layers: int,
        slots: int,
        terms: int,
        tokens: int,
        rows: int,
        captures: int,
        width: int,
        device: Any,
        traces: int = 0,
    ) -> Buffers:
        """Buffers that steer nothing."""
        sums = torch.zeros((layers, slots + 1, terms, 6), device=device)
        sums[..., MARGIN] = math.inf
        return cls(
            tokens=torch.zeros((4, tokens), dtype=torch.int32, device=device),
            live=torch.zeros(layers, dtype=torch.int32, device=device),
            ids=torch.full((layers, 2 * slots + 1, terms, 2), -1, dtype=torch.int32, device=device),
            numbers=torch.zeros((layers, 2 * slots + 1, terms, 3), device=device),
            table=torch.zeros((rows, width), device=device),
            sums=sums,
            captured=torch.zeros((layers, captures + 1, width), device=device),
            traced=torch.full((layers, traces + 1, terms, 2), math.nan, device=device),
        )

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(getattr(self, item.name).nbytes for item in fields(self))


def stream(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream in float32."""
    return hidden.float() if residual is None else hidden.float() + residual.float()


def steer(
    hidden: Tensor,
    residual: Tensor | None,
    layer: Tensor,
    tokens: Tensor,
    live: Tensor,
    ids: Tensor,
    numbers: Tensor,
    table: Tensor,
    sums: Tensor,
    traced: Tensor | None = None,
) -> None:
    """The reference: edits `hidden` [T, d_model] in place and adds to `sums`; the other arguments as in `Buffers`.

    It looks at no value: every token goes through every term, in whose place there may be none.
    """
    rows, slots, _, places = tokens[:, : hidden.shape[0]].long()
    chosen, own = ids.flatten(0, 1)[rows + layer * ids.shape[1]].long(), hidden.float()  # [T, K, 2]
    state, coefficients = stream(hidden, residual), numbers.flatten(0, 1)[rows + layer * ids.shape[1]]
    for term in range(ids.shape[2]):
        first, second = chosen[:, term].unbind(-1)
        here = (first >= 0) & (live[layer] > 0)
        v, c = (table[which.clamp(min=0)] for which in (first, second))
        projection, gating = torch.linalg.vecdot(state, v), torch.linalg.vecdot(state, c)
        gate, offset, gain = coefficients[:, term].unbind(-1)
        fired = here & (gating < gate)
        moved = torch.where(fired, torch.addcmul(offset, gain, projection), 0.0)
        own, state = (torch.addcmul(one, moved[:, None], v) for one in (own, state))
        columns = torch.stack([here.float(), fired.float(), projection, moved, moved.abs()], -1)
        at = torch.where(here, slots, 0) + layer * sums.shape[1]  # what is nobody's is not looked at
        sums.flatten(0, 1)[:, term, :MARGIN].index_add_(0, at, columns)
        sums.flatten(0, 1)[:, term, MARGIN].scatter_reduce_(0, at, (gating - gate).abs(), "amin")
        if traced is not None:
            at = torch.where(here, places, 0) + layer * traced.shape[1]
            traced.flatten(0, 1)[:, term].index_copy_(0, at, columns[:, TOLD])
    hidden.copy_(own)


def read(hidden: Tensor, residual: Tensor | None, layer: Tensor, tokens: Tensor, captured: Tensor) -> None:
    """The reference: adds the states of the tokens that have a place in `captured` to it."""
    places = tokens[CAPTURE, : hidden.shape[0]].long() + layer * captured.shape[1]
    captured.flatten(0, 1).index_add_(0, places, stream(hidden, residual))


def _in(module: str, name: str, reference: Callable[..., None]) -> Callable[..., None]:
    """An op as a module of this package does it, which is imported when it first runs; else the reference."""
    found: list[Callable[..., None]] = []

    def run(*arguments: Any) -> None:
        if not found:
            try:
                found.append(getattr(import_module(f"steerwell.engines.vllm.{module}"), name))
            except ImportError:  # CUDA without Triton
                found.append(reference)
        found[0](*arguments)

    return run


def _nothing(*_arguments: Any) -> None:
    """What tracing does: the ops return nothing."""


def _register() -> Any:
    library: Any = torch.library.Library("steerwell", "DEF")  # type: ignore[no-untyped-call]
    for schema, reference in ((STEER, steer), (READ, read)):
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, _in("host", name, reference), "CPU")
        library.impl(name, _in("kernels", name, reference), "CUDA")
        library._register_fake(name, _nothing)
    return library


_LIBRARY = _register()  # the ops live as long as it does
