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

from steerwell.core.errors import EngineError
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


class Plan:
    """The edits of a batch. `applied` steers one forward pass; `receipts` tells what was done.

    Args:
        edits: one per row, or None.
        d_model: width of the residual stream.
        device: where the coefficients start; each follows its block's device on first use.
    """

    def __init__(self, edits: Sequence[Edit | None], d_model: int, device: torch.device) -> None:
        self._edits = list(edits)
        self._rows = list(range(len(edits)))  # rows still in the batch, by their first index
        self._slots = _lay_out(edits, d_model, device)
        self._scopes: list[Scope] = []  # of the passes since the last flush
        self._sums = np.zeros((len(self._slots), len(edits), len(SUMS)))
        self._sums[..., -1] = math.inf
        self._steered = np.array([[term is not None for term in slot.terms] for slot in self._slots], bool)
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
        if len(self._scopes) == FLUSH_EVERY:
            self._flush()

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Drop the rows of the batch that are not in `rows` (indices into the current batch)."""
        if not self._slots:
            return
        self._flush()
        index = torch.tensor(list(rows), device=device)
        for slot in self._slots:
            slot.coefficients = slot.coefficients.select(index)
            if slot.response_only is not None:
                slot.response_only = slot.response_only[index.to(slot.response_only.device)]
        self._rows = [self._rows[row] for row in rows]

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

    def receipts(self) -> list[Receipt | None]:
        """What was done to every row of the first batch, None for rows without edit."""
        self._flush()
        return [None if edit is None else self._receipt(row, edit) for row, edit in enumerate(self._edits)]

    def _receipt(self, row: int, edit: Edit) -> Receipt:
        slots = {slot.place: index for index, slot in enumerate(self._slots)}
        terms = (_term_receipt(term, *self._sums[slots[place], row].tolist()) for place, term in _places(edit))
        return Receipt(edit.id, tuple(terms))

    def _flush(self) -> None:
        """Add the traces to their rows' sums. A projection that is not finite is an error: its gate would stay shut."""
        if not (self._slots and self._scopes):
            self._scopes.clear()
            return
        sums = self._added_up()
        wrong = self._steered[:, self._rows] & ~np.isfinite(sums[..., SUMS.index("before")])
        if wrong.any():
            slot, row = np.argwhere(wrong)[0].tolist()
            raise EngineError(
                f"layer {self._slots[slot].layer}, row {self._rows[row]}: the activations are not finite, so they "
                "cannot be steered; load the model with dtype='bfloat16' or 'float32'"
            )
        self._sums[:, self._rows, :-1] += sums[..., :-1]
        self._sums[:, self._rows, -1] = np.minimum(self._sums[:, self._rows, -1], sums[..., -1])
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


def _term_receipt(
    term: EditTerm, seen: float, edited: float, before: float, moved: float, distance: float, margin: float
) -> TermReceipt:
    return TermReceipt(
        label=term.label,
        layer=term.layer,
        position=term.position,
        tokens_seen=int(seen),
        tokens_edited=int(edited),
        projection_before=before / seen if seen else math.nan,
        projection_after=(before + moved) / seen if seen else math.nan,
        perturbation=distance / edited if edited else 0.0,
        gate_margin=margin,
    )
