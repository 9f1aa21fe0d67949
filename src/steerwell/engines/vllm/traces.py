"""Which traced token has which place of `Buffers.traced`: from when its request joins until it has finished."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class Trace:
    """What the terms of one request meet at its tokens `first` to `end - 1`.

    Attributes:
        layers: int64 [terms, 1], each term's layer in the buffer; `before`: terms before it there.
        places: of each token; None: there was no room when the request joined.
        kept: [terms, tokens, 2], set when the request has finished.
    """

    first: int
    end: int
    layers: Tensor
    before: Tensor
    places: NDArray[np.int64] | None
    kept: Tensor | None = None

    def write(self, row: NDArray[np.int32], computed: int) -> None:
        """Give the tokens of a step their places; one that runs again, after a preemption, has the same.

        Args:
            row: of `Buffers.tokens`, the tokens of this request.
            computed: which token of the request is the first of them.
        """
        first, end = max(self.first, computed), min(self.end, computed + len(row))
        if self.places is not None and first < end:
            row[first - computed : end - computed] = self.places[first - self.first : end - self.first]


class Traces:
    """The places of `Buffers.traced`."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._free = np.arange(buffer.shape[1] - 1, 0, -1)

    def begin(self, span: tuple[int, int], terms: Sequence[tuple[int, int]]) -> Trace:
        """Give places to the tokens of a span; where there are too few, the request goes on without a trace.

        Args:
            span: first token, and the one after the last.
            terms: of each term its layer in the buffer, and the terms before it there.
        """
        first, end = span
        left, places = len(self._free) - (end - first), None
        if left >= 0:
            self._free, places = np.split(self._free, [left])
            self._buffer[:, self._index(places)] = math.nan
        layers, before = self._index(terms).reshape(-1, 2).T[..., None]
        return Trace(first, end, layers, before, places)

    def end(self, trace: Trace, keep: bool) -> None:
        """Take the places back; what stands there is kept where somebody may ask for it."""
        if trace.places is None:
            return
        trace.kept = self.read(trace, 0, len(trace.places)) if keep else None
        self._free = np.concatenate([self._free, trace.places])

    def read(self, trace: Trace, first: int, end: int) -> Tensor:
        """What the terms met at a span of the traced tokens, [terms, tokens, 2], on the device."""
        if trace.kept is not None:
            return trace.kept[:, first:end]
        places = self._index([] if trace.places is None else trace.places[first:end])
        return self._buffer[trace.layers, places[None], trace.before]

    def _index(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.long).to(self._buffer.device)


def fetched(tensors: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    """Tensors brought home from the device, which is waited for once."""
    if not tensors:
        return []
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()
    parts = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
