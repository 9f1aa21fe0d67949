"""The ops of `ops` on the CPU, where values can be looked at, and where every call of PyTorch costs microseconds.

What the tokens of a step are under is worked out when a layer first runs, in NumPy, and kept as long as the buffers are
the same: from one step of decoding to the next they mostly are. PyTorch counts the changes of a tensor (`_version`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerwell.engines.vllm.ops import CAPTURE, MARGIN, ROW, TALLY, TOLD, TRACE

KEPT = 1 << 18  # numbers in the directions of a term's tokens; more are gathered from the table again at every step


@dataclass(frozen=True, slots=True)
class Term:
    """The k-th term at one layer, for the n tokens that `Chosen` has picked; those without one have a shut gate.

    Attributes:
        v: the direction of all tokens [d_model], or of each [n, d_model]; or the row of the table of each, int64 [n].
        c: the same for the gate's direction; None: it is v.
        gate: float32 [n]; `offset` and `gain` too.
        bounded: whether any gate is finite.
        seen: ones [n].
        sums: int64 [n], where each token is added in `Step.sums`.
        traced: int64 [n], where each token is told in `Step.traced`; None: no token of this step is.
    """

    v: Tensor
    c: Tensor | None
    gate: Tensor
    offset: Tensor
    gain: Tensor
    bounded: bool
    seen: Tensor
    sums: Tensor
    traced: Tensor | None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens of a step under an edit at one layer, int64 [n] (None: all), and its terms."""

    picked: Tensor | None
    terms: tuple[Term, ...]


class Step:
    """What the tokens of a step are under, as long as none of the buffers changes.

    Attributes:
        sums: `Buffers.sums` with one row for each layer, slot and term [L (S + 1) K, 5]; `margins`, too [L (S + 1) K].
        traced: `Buffers.traced` with one row for each layer, place and term [L (P + 1) K, 2].
    """

    def __init__(self, key: tuple[int, ...], width: int, *parts: Any) -> None:
        tokens, self._live, self._ids, self._numbers, self._table, sums, traced = parts
        self.key, self._held = key, parts  # held, so that no other tensor gets the id of one in the key
        self._width, self._layers = width, dict[int, Chosen | None]()
        flat = sums.flatten(0, 2)
        self.sums, self.margins = flat[:, :MARGIN], flat[:, MARGIN]
        self._slots, self._terms = sums.shape[1:3]
        self.traced: Tensor | None = None if traced is None else traced.flatten(0, 2)
        self._places = 0 if traced is None else int(traced.shape[1])
        rows = tokens[:, :width].numpy()
        self._steered = np.flatnonzero(rows[ROW])
        self._rows = rows[:, self._steered].astype(np.int64)
        self._traces = traced is not None and bool(self._rows[TRACE].any())

    def at(self, layer: int) -> Chosen | None:
        """Of one layer; None: no token is under an edit there."""
        if layer not in self._layers:
            self._layers[layer] = self._chosen(layer)
        return self._layers[layer]

    def _chosen(self, layer: int) -> Chosen | None:
        if not int(self._live[layer]) or not len(self._steered):
            return None
        rows, picked = self._rows, self._steered
        ids = self._ids.numpy()[layer, rows[ROW]]  # [n, K, 2]
        is_term = ids[..., 0] >= 0
        mine, used = is_term.any(1), np.flatnonzero(is_term.any(0))
        if not mine.all():
            rows, picked, ids = rows[:, mine], picked[mine], ids[mine]
        numbers = self._numbers.numpy()[layer, rows[ROW]]
        terms = tuple(self._term(layer, int(term), rows, ids[:, term], numbers[:, term]) for term in used)
        return Chosen(None if len(picked) == self._width else torch.from_numpy(picked), terms) if terms else None

    def _term(self, layer: int, term: int, rows: Any, ids: Any, numbers: Any) -> Term:
        gate, offset, gain = numbers.T.copy()
        here, slots, places = ids[:, 0] >= 0, rows[TALLY], rows[TRACE]
        if not here.all():
            ids, gate = np.where(here[:, None], ids, ids.max(0)), np.where(here, gate, -np.inf).astype(np.float32)
            slots, places = slots * here, places * here
        first, second = ids.T
        traced = ((layer * self._places + places) * self._terms + term) if self._traces else None
        return Term(
            v=_vectors(self._table, first),
            c=None if (first == second).all() else _vectors(self._table, second),
            gate=torch.from_numpy(gate),
            offset=torch.from_numpy(offset),
            gain=torch.from_numpy(gain),
            bounded=bool(np.isfinite(gate).any()),
            seen=torch.ones(len(gate)),
            sums=torch.from_numpy((layer * self._slots + slots) * self._terms + term),
            traced=None if traced is None else torch.from_numpy(traced),
        )


def _vectors(table: Tensor, rows: NDArray[np.int32]) -> Tensor:
    """One direction for all tokens where it is one; else each token's, or where that were many numbers, its row."""
    if (rows == rows[0]).all():
        return table[int(rows[0])]
    found = torch.from_numpy(rows.astype(np.int64))
    return table.index_select(0, found) if len(rows) * table.shape[1] <= KEPT else found


def steer(
    hidden: Tensor, residual: Tensor | None, layer: Tensor, tokens: Tensor, live: Tensor, ids: Tensor,
    numbers: Tensor, table: Tensor, sums: Tensor, traced: Tensor | None = None,
) -> None:  # fmt: skip
    """As `ops.steer`; only the tokens under an edit are touched."""
    step = _step(hidden.shape[0], tokens, live, ids, numbers, table, sums, traced)
    chosen = step.at(int(layer))
    if chosen is None:
        return
    picked = chosen.picked
    own = (hidden if picked is None else hidden.index_select(0, picked)).float()  # in place where nothing is converted
    state = own
    if residual is not None:
        state = own + (residual if picked is None else residual.index_select(0, picked))
    for term in chosen.terms:
        v = term.v if term.v.is_floating_point() else table.index_select(0, term.v)
        projection = gating = torch.linalg.vecdot(state, v)
        if term.c is not None:
            gating = torch.linalg.vecdot(state, term.c if term.c.is_floating_point() else table[term.c])
        fired = gating < term.gate
        moved = torch.where(fired, torch.addcmul(term.offset, term.gain, projection), 0.0)
        own.addcmul_(moved.unsqueeze(-1), v)
        if state is not own and term is not chosen.terms[-1]:
            state.addcmul_(moved.unsqueeze(-1), v)
        columns = torch.stack([term.seen, fired.float(), projection, moved, moved.abs()], -1)
        step.sums.index_add_(0, term.sums, columns)
        if term.bounded:
            step.margins.scatter_reduce_(0, term.sums, (gating - term.gate).abs(), "amin")
        if term.traced is not None and step.traced is not None:
            step.traced.index_copy_(0, term.traced, columns[:, TOLD])
    if picked is not None:
        hidden.index_copy_(0, picked, own.to(hidden.dtype))
    elif own is not hidden:
        hidden.copy_(own)


def read(hidden: Tensor, residual: Tensor | None, layer: Tensor, tokens: Tensor, captured: Tensor) -> None:
    """As `ops.read`; only the tokens that are read are touched."""
    places = _read(hidden.shape[0], tokens)
    if places is None:
        return
    picked, at = places
    states = hidden.index_select(0, picked).float()
    if residual is not None:
        states = states + residual.index_select(0, picked)
    captured[int(layer)].index_add_(0, at, states)


def _step(width: int, *parts: Any) -> Step:
    """The step that these buffers make; it stands on the first of them, `tokens`, until one has changed."""
    key = (width, *(id(part) for part in parts), *(part._version for part in parts[:5]))
    found: Step | None = getattr(parts[0], "steerwell_step", None)
    if found is None or found.key != key:
        found = parts[0].steerwell_step = Step(key, width, *parts)
    return found


def _read(width: int, tokens: Any) -> tuple[Tensor, Tensor] | None:
    """Tokens whose states are read, and their places; None: there are none."""
    key = (width, tokens._version)
    found = getattr(tokens, "steerwell_read", None)
    if found is None or found[0] != key:
        places = tokens[CAPTURE, :width].numpy()
        picked = np.flatnonzero(places)
        pair = (torch.from_numpy(picked), torch.from_numpy(places[picked].astype(np.int64))) if len(picked) else None
        found = tokens.steerwell_read = (key, pair)
    return cast(tuple[Tensor, Tensor] | None, found[1])
