"""A batch's steering: every row's edit laid out as coefficients per layer, hooked in for one forward pass at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerwell.core.errors import EngineError, NotFiniteError
from steerwell.core.records import Edit, EditTerm, Receipt, TermReceipt, TokenTrace
from steerwell.engines.hf.blocks import hidden_of, with_hidden
from steerwell.steering.kernel import Coefficients, Trace, gated_affine

FLUSH_EVERY = 256  # forward passes whose traces are kept before they are summed
SCOPES = ("real", "response")
SUMS = ("seen", "edited", "before", "moved", "distance", "margin")  # over a term's tokens; the margin is a minimum


@dataclass(frozen=True, slots=True)
class Scope:
    """Which tokens of a forward pass count, each bool [B, T].

    Attributes:
        real: tokens that are no padding and belong to rows not yet finished.
        response: those in the scope of position `response`.
    """

    real: Tensor
    response: Tensor


@dataclass(slots=True)
class _Slot:
    """The k-th term at one layer, of every row that has one; `place` is (layer, k)."""

    place: tuple[int, int]
    terms: list[EditTerm | None]
    coefficients: Coefficients
    response_only: Tensor | None  # bool [B, 1]; None: no row; True everywhere is kept as a tensor
    traces: list[Trace] = field(default_factory=list)  # one per pass since the last flush

    @property
    def layer(self) -> int:
        return self.place[0]

    def seen(self, real: Tensor, response: Tensor) -> Tensor:
        """Tokens in scope of each row's own position, bool [B, T]."""
        return real if self.response_only is None else torch.where(self.response_only, response, real)

    def select(self, rows: Sequence[int], index: Tensor) -> None:
        """Keep some rows, given as numbers and as a tensor."""
        self.terms = [self.terms[row] for row in rows]
        self.coefficients = self.coefficients.select(index)
        if self.response_only is not None:
            self.response_only = self.response_only[index.to(self.response_only.device)]

    def idle(self, rows: int) -> _Slot:
        """The same place for rows that have no term there."""
        return _Slot(self.place, [None] * rows, self.coefficients.idle(rows), None)

    def joined(self, other: _Slot) -> _Slot:
        """The same place for the rows of both, this one's first."""
        response = None
        if self.response_only is not None or other.response_only is not None:
            pair = [slot.coefficients.gate > math.inf if slot.response_only is None else slot.response_only
                    for slot in (self, other)]  # fmt: skip
            response = torch.cat([pair[0], pair[1].to(pair[0].device)])
        both = self.coefficients.joined(other.coefficients)
        return _Slot(self.place, self.terms + other.terms, both, response)


class Plan:
    """The edits of a batch's rows. `applied` steers one forward pass; `receipt` tells what was done to a row.

    Args:
        edits: one per row, or None.
        d_model: width of the residual stream.
        device: where the coefficients start; each follows its block's device on first use.
    """

    def __init__(self, edits: Sequence[Edit | None], d_model: int, device: torch.device) -> None:
        self._edits = list(edits)
        self._slots = _lay_out(edits, d_model, device)
        self._scopes: list[Scope] = []  # of the passes since the last flush
        self._sums = _no_sums(len(self._slots), len(edits))
        self._broken: dict[int, int] = {}  # row -> layer that met activations that are not finite
        self._device = device

    @contextmanager
    def applied(self, blocks: Sequence[nn.Module], scope: Scope, *, prompt: bool) -> Iterator[None]:
        """Steer the forward passes inside; the model is as before afterwards, also after an exception.

        Args:
            blocks: the model's decoder blocks.
            scope: tokens of this pass.
            prompt: whether tokens out of scope may be among them (padding, or a prompt under position `response`).

        Raises:
            EngineError: a steered block did not run its hook exactly once (a compiled model, say).
        """
        if len(self._scopes) == FLUSH_EVERY:
            self._flush()
        handles: list[RemovableHandle] = []
        try:
            for slot in self._slots:
                handles.append(blocks[slot.layer].register_forward_hook(_hook(slot, scope, prompt)))
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._scopes.append(scope)
        for slot in self._slots:
            if len(slot.traces) != len(self._scopes):
                raise EngineError(
                    f"layer {slot.layer} ran its steering {len(slot.traces) - len(self._scopes) + 1} times in one "
                    "pass, expected once; load the model without torch.compile and without gradient checkpointing"
                )

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the rows of the batch that are not in `rows` (indices into the current batch)."""
        self._flush()
        index = torch.tensor(list(rows), device=self._device)
        kept = []
        for number, slot in enumerate(self._slots):
            slot.select(rows, index)
            if any(slot.terms):
                kept.append(number)
        self._sums = self._sums[kept][:, rows]
        self._slots = [self._slots[number] for number in kept]
        self._edits = [self._edits[row] for row in rows]
        self._broken = {new: self._broken[row] for new, row in enumerate(rows) if row in self._broken}

    def join(self, other: Plan) -> None:
        """Add the rows of `other` after this plan's own; `other` is used up."""
        self._flush()
        other._flush()
        mine, theirs = ({slot.place: (slot, plan._sums[n]) for n, slot in enumerate(plan._slots)}
                        for plan in (self, other))  # fmt: skip
        slots, sums, sizes = [], [], (len(self._edits), len(other._edits))
        for place in sorted(mine.keys() | theirs.keys()):
            known = mine.get(place) or theirs[place]
            pair = [found.get(place) or (known[0].idle(size), _no_sums(1, size)[0])
                    for found, size in zip((mine, theirs), sizes, strict=True)]  # fmt: skip
            slots.append(pair[0][0].joined(pair[1][0]))
            sums.append(np.concatenate([pair[0][1], pair[1][1]]))
        self._slots, self._sums = slots, np.stack(sums) if sums else _no_sums(0, sum(sizes))
        self._broken |= {sizes[0] + row: layer for row, layer in other._broken.items()}
        self._edits += other._edits

    def latest(self) -> list[tuple[tuple[float, bool], ...]]:
        """What every row's terms met at the newest token: (projection before, whether the gate was open)."""
        if not self._slots:
            return [()] * len(self._edits)
        traces = [slot.traces[-1] for slot in self._slots]
        projections = torch.stack([trace.projection[:, -1].float().to(self._device) for trace in traces]).tolist()
        fired = torch.stack([trace.fired[:, -1].to(self._device) for trace in traces]).tolist()
        at = {slot.place: number for number, slot in enumerate(self._slots)}
        return [
            tuple((projections[at[place]][row], fired[at[place]][row]) for place, _ in _places(edit)) if edit else ()
            for row, edit in enumerate(self._edits)
        ]

    def traced(self, spans: Sequence[tuple[int, int]]) -> list[tuple[TokenTrace, ...]]:
        """What every row's terms did in the latest pass, token by token; (first, end) tokens of each row."""
        last = {slot.place: slot.traces[-1] for slot in self._slots}
        found = {
            place: (trace.projection.float().cpu().numpy(), trace.fired.cpu().numpy()) for place, trace in last.items()
        }

        def cut(row: int, place: tuple[int, int]) -> TokenTrace:
            first, end = spans[row]
            projection, fired = found[place]
            return TokenTrace(place[0], projection[row, first:end], fired[row, first:end])

        return [
            tuple(cut(row, place) for place, _ in _places(edit)) if edit else () for row, edit in enumerate(self._edits)
        ]

    def fault(self, row: int) -> EngineError | None:
        """Why a row cannot be steered: its activations are not finite, so a gate would stay shut."""
        self._flush()
        if row not in self._broken:
            return None
        return NotFiniteError(
            f"layer {self._broken[row]}, row {row}: the activations are not finite, so they cannot be steered; load "
            "the model with dtype='bfloat16' or 'float32', or steer with less strength"
        )

    def receipt(self, row: int) -> Receipt | None:
        """What was done to a row of the batch; None: it has no edit."""
        self._flush()
        edit = self._edits[row]
        if edit is None:
            return None
        at = {slot.place: number for number, slot in enumerate(self._slots)}
        terms = (TermReceipt.of(term, *self._sums[at[place], row].tolist()) for place, term in _places(edit))
        return Receipt(edit.id, tuple(terms))

    def receipts(self) -> list[Receipt | None]:
        """The receipt of every row.

        Raises:
            EngineError: the activations of a row are not finite.
        """
        for row in range(len(self._edits)):
            if (fault := self.fault(row)) is not None:
                raise fault
        return [self.receipt(row) for row in range(len(self._edits))]

    def _flush(self) -> None:
        """Add the traces to their rows' sums. A projection that is not finite is a fault: its gate would stay shut."""
        if not (self._slots and self._scopes):
            self._scopes.clear()
            return
        sums = self._added_up()
        steered = np.array([[term is not None for term in slot.terms] for slot in self._slots], bool)
        for number, row in np.argwhere(steered & ~np.isfinite(sums[..., SUMS.index("before")])).tolist():
            self._broken.setdefault(row, self._slots[number].layer)
        self._sums[..., :-1] += sums[..., :-1]
        self._sums[..., -1] = np.minimum(self._sums[..., -1], sums[..., -1])
        self._scopes.clear()
        for slot in self._slots:
            slot.traces.clear()

    def _added_up(self) -> NDArray[np.float64]:
        """`SUMS` of every slot and every row in the batch over the passes since the last flush, [slots, B, SUMS]."""

        def joined(name: str) -> Tensor:
            """One field of every trace, [slots, B, tokens of all passes]."""
            return stacked([torch.cat([getattr(trace, name) for trace in slot.traces], 1) for slot in self._slots])

        def stacked(tensors: list[Tensor]) -> Tensor:
            return torch.stack([tensor.to(self._device) for tensor in tensors])

        real, response = (torch.cat([getattr(scope, name) for scope in self._scopes], 1) for name in SCOPES)
        seen = stacked([slot.seen(real, response) for slot in self._slots])
        before, moved = joined("projection"), joined("displacement")
        second = any(slot.coefficients.gate_direction is not None for slot in self._slots)
        gating = joined("gate_projection") if second else before
        gate = stacked([slot.coefficients.gate for slot in self._slots])
        fired = seen & (gating < gate)
        sums = {
            "seen": seen.sum(-1),
            "edited": fired.sum(-1),
            "before": torch.where(seen, before, 0.0).sum(-1),
            "moved": torch.where(fired, moved, 0.0).sum(-1),
            "distance": torch.where(fired, moved.abs(), 0.0).sum(-1),
            "margin": torch.where(seen, (gating - gate).abs(), math.inf).amin(-1),
        }
        array: NDArray[np.float64] = torch.stack([sums[name] for name in SUMS], -1).cpu().double().numpy()
        return array


def _no_sums(slots: int, rows: int) -> NDArray[np.float64]:
    """`SUMS` of nothing, [slots, B, SUMS]."""
    sums = np.zeros((slots, rows, len(SUMS)))
    sums[..., -1] = math.inf
    return sums


def _hook(slot: _Slot, scope: Scope, prompt: bool) -> Callable[..., Any]:
    """The hook that applies one slot in one pass; only a prompt may hold tokens that are out of scope."""

    def steer(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        if slot.coefficients.gate.device != hidden.device:
            slot.coefficients = slot.coefficients.to(hidden.device)
        mask = slot.seen(scope.real, scope.response).to(hidden.device) if prompt else None
        edited, trace = gated_affine(hidden, slot.coefficients, mask)
        slot.traces.append(trace)
        return with_hidden(output, edited)

    return steer


def _places(edit: Edit) -> Iterator[tuple[tuple[int, int], EditTerm]]:
    """An edit's terms with their places: (layer, how many terms of that layer come before)."""
    counts: Counter[int] = Counter()
    for term in edit.terms:
        yield (term.layer, counts[term.layer]), term
        counts[term.layer] += 1


def _lay_out(edits: Sequence[Edit | None], d_model: int, device: torch.device) -> list[_Slot]:
    """Slots in the order in which they apply: by layer, then by each row's list order."""
    columns: dict[tuple[int, int], list[EditTerm | None]] = {}
    for row, edit in enumerate(edits):
        for place, term in _places(edit) if edit else ():
            columns.setdefault(place, [None] * len(edits))[row] = term
    return [_slot(place, columns[place], d_model, device) for place in sorted(columns)]


def _slot(place: tuple[int, int], terms: list[EditTerm | None], d_model: int, device: torch.device) -> _Slot:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    def rows(vectors: list[Any]) -> Tensor:
        return torch.from_numpy(np.stack(vectors).astype(np.float32))[:, None].to(device)

    nothing = np.zeros(d_model, np.float32)
    directions = [nothing if term is None else term.direction for term in terms]
    gated = any(term is not None and term.gate_direction is not None for term in terms)
    gates = [
        direction if term is None or term.gate_direction is None else term.gate_direction
        for term, direction in zip(terms, directions, strict=True)
    ]
    coefficients = Coefficients(
        direction=rows(directions),
        gate_direction=rows(gates) if gated else None,
        gate=column([-math.inf if term is None else term.gate for term in terms]),
        offset=column([0.0 if term is None else term.offset for term in terms]),
        gain=column([0.0 if term is None else term.gain for term in terms]),
    )
    response = [term is not None and term.position == "response" for term in terms]
    response_only = torch.tensor(response, device=device)[:, None] if any(response) else None
    return _Slot(place, terms, coefficients, response_only)
