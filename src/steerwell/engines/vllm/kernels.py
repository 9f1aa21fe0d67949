"""The ops of `ops` in Triton: one program per token, nothing read but that token's rows.

They were run in Triton's interpreter only, against the references in `ops` (tests/vllm/test_ops.py): no GPU was at
hand when they were written. The sums are added up with atomics, so their last bits may differ from run to run; the
states do not depend on them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor


@triton.jit
def _steer(
    hidden, residual, layer, tokens, live, ids, numbers, table, sums, traced,
    hidden_stride, residual_stride, tokens_stride, rows, slots, places, width,
    has_residual: tl.constexpr, traces: tl.constexpr, terms: tl.constexpr, power: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(layer)
    row = tl.load(tokens + token).to(tl.int64)
    if (tl.load(live + at) > 0) & (row > 0):
        base = (at * rows + row) * terms
        lanes = tl.arange(0, power)
        chosen = tl.load(ids + (base + lanes) * 2, mask=lanes < terms, other=-1)
        if tl.max(chosen, 0) >= 0:
            slot = tl.load(tokens + tokens_stride + token).to(tl.int64)
            told = tl.load(tokens + 3 * tokens_stride + token).to(tl.int64) if traces else 0
            columns = tl.arange(0, block)
            inside = columns < width
            own = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
            state = own
            if has_residual:
                state += tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
            for term in tl.static_range(terms):
                first = tl.load(ids + (base + term) * 2).to(tl.int64)
                if first >= 0:
                    second = tl.load(ids + (base + term) * 2 + 1).to(tl.int64)
                    v = tl.load(table + first * width + columns, mask=inside, other=0.0)
                    c = tl.load(table + second * width + columns, mask=inside, other=0.0)
                    gate = tl.load(numbers + (base + term) * 3)
                    offset = tl.load(numbers + (base + term) * 3 + 1)
                    gain = tl.load(numbers + (base + term) * 3 + 2)
                    projection = tl.sum(state * v, 0)
                    gating = tl.sum(state * c, 0)
                    fired = gating < gate
                    moved = tl.where(fired, offset + gain * projection, 0.0)
                    own += moved * v
                    state += moved * v
                    if slot > 0:
                        place = sums + ((at * slots + slot) * terms + term) * 6
                        tl.atomic_add(place, 1.0)
                        tl.atomic_add(place + 1, fired.to(tl.float32))
                        tl.atomic_add(place + 2, projection)
                        tl.atomic_add(place + 3, moved)
                        tl.atomic_add(place + 4, tl.abs(moved))
                        tl.atomic_min(place + 5, tl.abs(gating - gate))
                    if traces:
                        place = traced + ((at * places + told) * terms + term) * 2
                        tl.store(place, fired.to(tl.float32), mask=told > 0)
                        tl.store(place + 1, projection, mask=told > 0)
            tl.store(hidden + token * hidden_stride + columns, own.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _read(
    hidden, residual, layer, tokens, captured,
    hidden_stride, residual_stride, tokens_stride, places, width,
    has_residual: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(tokens + 2 * tokens_stride + token).to(tl.int64)
    if place > 0:
        columns = tl.arange(0, block)
        inside = columns < width
        state = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if has_residual:
            state += tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.atomic_add(captured + (tl.load(layer) * places + place) * width + columns, state, mask=inside)


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
    """As `ops.steer`."""
    other: Any = hidden if residual is None else residual
    told: Any = sums if traced is None else traced
    width, block = hidden.shape[1], triton.next_power_of_2(hidden.shape[1])
    terms = ids.shape[2]
    _steer[(hidden.shape[0],)](
        hidden, other, layer, tokens, live, ids, numbers, table, sums, told,
        hidden.stride(0), other.stride(0), tokens.stride(0), ids.shape[1], sums.shape[1], told.shape[1], width,
        has_residual=residual is not None, traces=traced is not None, terms=terms,
        power=triton.next_power_of_2(terms), block=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip


def read(hidden: Tensor, residual: Tensor | None, layer: Tensor, tokens: Tensor, captured: Tensor) -> None:
    """As `ops.read`."""
    other: Any = hidden if residual is None else residual
    width, block = hidden.shape[1], triton.next_power_of_2(hidden.shape[1])
    _read[(hidden.shape[0],)](
        hidden, other, layer, tokens, captured,
        hidden.stride(0), other.stride(0), tokens.stride(0), captured.shape[1], width,
        has_residual=residual is not None, block=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
