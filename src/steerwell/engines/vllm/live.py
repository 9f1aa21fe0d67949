"""A request under steering, and which rows of the buffers the tokens of a step get from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steerwell.core.records import Vectors
from steerwell.engines.vllm.ops import CAPTURE, ROW, TALLY
from steerwell.engines.vllm.traces import Trace
from steerwell.engines.vllm.wire import Request, Term

FOREVER = np.iinfo(np.int64).max


@dataclass(slots=True)
class Live:
    """A steered request that has not finished."""

    request: Request
    start: int  # first token in the scope of `response`
    places: list[tuple[int, Term, int, int]]  # index in the request, term, layer of the buffers, terms before it there
    vectors: Mapping[str, Vectors]
    slot: int = 0  # 0: it has none now
    computed: int = 0  # tokens that ran in earlier steps
    mark: int = 0  # tokens before this one were counted: those that run again after a preemption are not
    seen: dict[str, int] = field(default_factory=lambda: {"all": 0, "response": 0})
    stash: list[Tensor] = field(default_factory=list)  # sums from before it lost its slot, [terms, 6] each
    capture: int = 0
    read: int = 0  # tokens whose states were added up
    state: Tensor | None = None  # [layers, d_model], set when it has finished
    trace: Trace | None = None


def column(live: Live | None) -> tuple[int, ...]:
    """What `spread` has to know of a request."""
    if live is None:
        return (0,) * 8
    first, last = live.request.read or (0, 0)
    end = FOREVER if live.request.end is None else live.request.end
    return live.slot, live.computed, live.start, end, live.mark, live.capture, first, last


def spread(
    lengths: NDArray[np.int64], columns: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of `Buffers.tokens` [4, T] from what is known of each request [8, n], and tokens counted per request."""
    which = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.cumsum(lengths) - lengths
    slot, computed, start, end, mark, capture, first, last = columns[:, which]
    position = np.arange(len(which)) - begins[which] + computed
    steered = (slot > 0) & (position < end)
    response = steered & (position >= start)
    counted = steered & (position >= mark)
    reading = (capture > 0) & (position >= first) & (position < last) & (position >= mark)
    rows = np.zeros((4, len(which)), np.int32)
    rows[ROW] = np.where(steered, 2 * slot - 1 + response, 0)
    rows[TALLY] = np.where(counted, slot, 0)
    rows[CAPTURE] = np.where(reading, capture, 0)
    tallied, answered, read = (
        np.bincount(which[chosen], minlength=len(lengths)) for chosen in (counted, counted & response, reading)
    )
    return rows, tallied, answered, read
