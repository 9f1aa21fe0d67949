"""The two custom ops that decoder blocks call, and the persistent buffers that they read and write.

`steerwell::steer` applies the gated affine edit of METHODS section 3 to the tokens of a step, every token under the
terms of its own request; `steerwell::read` sums up the states of the tokens whose mean is asked for. A compiled graph,
and a replayed CUDA graph, see the same buffers at every step: only what is in them changes.

vLLM's blocks return `(hidden, residual)`, whose sum is the residual stream. Projections are of the sum; the edit is
added to `hidden` in place. The arithmetic is float32, as in `steerwell.steering.kernel`, term after term.

Here is the reference in torch. On CUDA, where Triton is installed, `kernels` does the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

SEEN, EDITED, BEFORE, MOVED, DISTANCE, MARGIN = range(6)  # the columns of `Buffers.sums`
ROW, TALLY, CAPTURE = range(3)  # the rows of `Buffers.tokens`

STEER = (
    "steer(Tensor(a!) hidden, Tensor? residual, Tensor layer, Tensor tokens, Tensor live, Tensor ids, Tensor numbers,"
    " Tensor table, Tensor(b!) sums) -> ()"
)
READ = "read(Tensor hidden, Tensor? residual, Tensor layer, Tensor tokens, Tensor(a!) captured) -> ()"


@dataclass(frozen=True, slots=True)
class Buffers:
    """What the ops share, on the model's device. L layers, S requests at one time, K terms, T tokens of a step.

    A running request has a slot s from 1 to S, and two rows of coefficients: 2 s - 1 for tokens in the scope of
    position `all` only, 2 s for those in the scope of `response` too. Row 0 and slot 0 are nobody's.

    Attributes:
        tokens: int32 [3, T]: every token's row of coefficients, its slot in `sums`, and its place in `captured`.
        live: int32 [L], how many terms now stand at each layer; 0 lets the op return at once.
        ids: int32 [L, 2 S + 1, K, 2], rows of `table` for v and c; -1: no term.
        numbers: float32 [L, 2 S + 1, K, 3]: gate, offset, gain.
        table: float32 [N, d_model], the directions.
        sums: float32 [L, S + 1, K, 6], what each term did: tokens seen, tokens edited, and over the seen ones the sum
            of projections before, of displacements and of their sizes, and the smallest |h . c - g|.
        captured: float32 [L, C + 1, d_model], sums of states; place 0 is nobody's.
    """

    tokens: Tensor
    live: Tensor
    ids: Tensor
    numbers: Tensor
    table: Tensor
    sums: Tensor
    captured: Tensor

    @classmethod
    def empty(
        cls, *, layers: int, slots: int, terms: int, tokens: int, rows: int, captures: int, width: int, device: Any
    ) -> Buffers:
        """Buffers that steer nothing."""
        sums = torch.zeros((layers, slots + 1, terms, 6), device=device)
        sums[..., MARGIN] = math.inf
        return cls(
            tokens=torch.zeros((3, tokens), dtype=torch.int32, device=device),
            live=torch.zeros(layers, dtype=torch.int32, device=device),
            ids=torch.full((layers, 2 * slots + 1, terms, 2), -1, dtype=torch.int32, device=device),
            numbers=torch.zeros((layers, 2 * slots + 1, terms, 3), device=device),
            table=torch.zeros((rows, width), device=device),
            sums=sums,
            captured=torch.zeros((layers, captures + 1, width), device=device),
        )

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(getattr(self, item.name).nbytes for item in fields(self))


def stream(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream in float32."""
    return hidden.float() if residual is None else hidden.float() + residual.float()


def steer(hidden: Tensor, residual: Tensor | None, layer: Tensor, tokens: Tensor, live: Tensor, *rest: Tensor) -> None:
    """The reference: edits `hidden` [T, d_model] in place and adds to `sums`; the other arguments as in `Buffers`."""
    apply(hidden, residual, layer, tokens, live, *rest, on_host=hidden.device.type == "cpu")


def apply(
    hidden: Tensor,
    residual: Tensor | None,
    layer: Tensor,
    tokens: Tensor,
    live: Tensor,
    ids: Tensor,
    numbers: Tensor,
    table: Tensor,
    sums: Tensor,
    *,
    on_host: bool,
) -> None:
    """`steer`. On the host only the tokens under an edit are touched; elsewhere all are, without a look at values."""
    if on_host and not int(live[layer]):
        return
    width = hidden.shape[0]
    rows, slots = tokens[ROW, :width].long() + layer * ids.shape[1], tokens[TALLY, :width].long()
    chosen = ids.flatten(0, 1)[rows]  # [T, K, 2]
    used, picked = [True] * ids.shape[2], cast(Any, slice(None))
    if on_host:
        is_term = chosen[..., 0] >= 0
        used, picked = is_term.any(0).tolist(), is_term.any(1).nonzero()[:, 0]
        if len(picked) == 0:
            return
        if len(picked) < width:
            rows, slots, chosen = rows[picked], slots[picked], chosen[picked]
        else:
            picked = slice(None)
    own = hidden[picked].float()
    state = own if residual is None else own + residual[picked].float()
    nobodys = layer * sums.shape[1]
    slots, numbers, sums = slots + nobodys, numbers.flatten(0, 1)[rows], sums.flatten(0, 1)
    for term in (term for term, is_used in enumerate(used) if is_used):
        first, second = chosen[:, term].long().unbind(-1)
        here = first >= 0
        v = table[first.clamp(min=0)]
        projection = torch.linalg.vecdot(state, v)
        own_gate = on_host and torch.equal(first, second)
        gating = projection if own_gate else torch.linalg.vecdot(state, table[second.clamp(min=0)])
        gate, offset, gain = numbers[:, term].unbind(-1)
        fired = here & (gating < gate)
        moved = torch.where(fired, torch.addcmul(offset, gain, projection), 0.0)
        own, state = (torch.addcmul(one, moved[:, None], v) for one in (own, state))
        counted = here & (slots > nobodys)
        columns = torch.stack([counted.float(), fired.float(), projection, moved, moved.abs()], -1)
        columns, places = torch.where(counted[:, None], columns, 0.0), torch.where(counted, slots, nobodys)
        sums[:, term, :MARGIN].index_add_(0, places, columns)
        margin = torch.where(counted, (gating - gate).abs(), math.inf)
        sums[:, term, MARGIN].scatter_reduce_(0, places, margin, "amin")
    hidden[picked] = own.to(hidden.dtype)


def read(hidden: Tensor, residual: Tensor | None, layer: Tensor, tokens: Tensor, captured: Tensor) -> None:
    """The reference: adds the states of the tokens that have a place in `captured` to it."""
    places, picked = tokens[CAPTURE, : hidden.shape[0]].long(), cast(Any, slice(None))
    if hidden.device.type == "cpu":
        picked = places.nonzero()[:, 0]
        if len(picked) == 0:
            return
    states = stream(hidden[picked], None if residual is None else residual[picked])
    captured.flatten(0, 1).index_add_(0, places[picked] + layer * captured.shape[1], states)


def _on_cuda(name: str, reference: Any) -> Any:
    """The Triton kernel where Triton is at hand; the reference otherwise."""

    def run(*arguments: Any) -> None:
        try:
            from steerwell.engines.vllm import kernels
        except ImportError:
            reference(*arguments)
        else:
            getattr(kernels, name)(*arguments)

    return run


def _nothing(*_arguments: Any) -> None:
    """What tracing does: the ops return nothing."""


def _register() -> Any:
    library: Any = torch.library.Library("steerwell", "DEF")  # type: ignore[no-untyped-call]
    for schema, reference in ((STEER, steer), (READ, read)):
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, reference, "CPU")
        library.impl(name, _on_cuda(name, reference), "CUDA")
        library._register_fake(name, _nothing)
    return library


_LIBRARY = _register()  # the ops live as long as it does
