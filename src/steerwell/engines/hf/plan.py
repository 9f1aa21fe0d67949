"""A batch's steering: every row's edit laid out as coefficients per layer, hooked in for one forward pass at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerwell.core.errors import EngineError
from steerwell.core.records import Edit, EditTerm, Receipt, TermReceipt
from steerwell.engines.hf.blocks import hidden_of, with_hidden
from steerwell.steering.kernel import Coefficients, Trace, gated_affine

FLUSH_EVERY = 256  # forward passes whose traces are kept before they are summed


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
class _Sums:
    """Running sums of one term of one row."""

    seen: int = 0
    edited: int = 0
    before: float = 0.0
    moved: float = 0.0
    distance: float = 0.0
    margin: float = math.inf


@dataclass(slots=True)
class _Slot:
    """The k-th term at one layer, of every row that has one; `place` is (layer, k)."""

    place: tuple[int, int]
    terms: list[EditTerm | None]
    coefficients: Coefficients
    response_only: Tensor | None  # bool [B, 1]; None: no row; True everywhere is kept as a tensor
    sums: list[_Sums]
    traces: list[tuple[Trace, Tensor]] = field(default_factory=list)

    @property
    def layer(self) -> int:
        return self.place[0]

    def scope(self, scope: Scope) -> Tensor:
        """Tokens in scope of each row's own position, bool [B, T]."""
        if self.response_only is None:
            return scope.real
        return torch.where(self.response_only, scope.response, scope.real)


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
        self._passes = 0

    @contextmanager
    def applied(self, blocks: nn.ModuleList, scope: Scope, *, prompt: bool) -> Iterator[None]:
        """Steer the forward passes inside; the model is as before afterwards, also after an exception.

        Args:
            blocks: the model's decoder blocks.
            scope: tokens of this pass.
            prompt: whether tokens out of scope may be among them (padding, or a prompt under position `response`).

        Raises:
            EngineError: a steered block did not run its hook exactly once (a compiled model, say).
        """
        before = [len(slot.traces) for slot in self._slots]
        with ExitStack() as hooks:
            for slot in self._slots:
                hooks.callback(blocks[slot.layer].register_forward_hook(self._hook(slot, scope, prompt)).remove)
            yield
        for slot, count in zip(self._slots, before, strict=True):
            if len(slot.traces) != count + 1:
                raise EngineError(
                    f"layer {slot.layer} ran its steering {len(slot.traces) - count} times in one pass, expected once; "
                    "load the model without torch.compile and without gradient checkpointing"
                )
        self._passes += 1
        if self._passes % FLUSH_EVERY == 0:
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

    def receipts(self) -> list[Receipt | None]:
        """What was done to every row of the first batch, None for rows without edit."""
        self._flush()
        return [None if edit is None else self._receipt(row, edit) for row, edit in enumerate(self._edits)]

    def _receipt(self, row: int, edit: Edit) -> Receipt:
        slots = {slot.place: slot for slot in self._slots}
        return Receipt(edit.id, tuple(_term_receipt(term, slots[place].sums[row]) for place, term in _places(edit)))

    def _hook(self, slot: _Slot, scope: Scope, prompt: bool) -> Callable[..., Any]:
        def steer(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            if slot.coefficients.gate.device != hidden.device:
                slot.coefficients = slot.coefficients.to(hidden.device)
            seen = slot.scope(scope)
            edited, trace = gated_affine(hidden, slot.coefficients, seen.to(hidden.device) if prompt else None)
            slot.traces.append((trace, seen))
            return with_hidden(output, edited)

        return steer

    def _flush(self) -> None:
        for slot in self._slots:
            if slot.traces:
                _add_up(slot, self._rows)
                slot.traces.clear()


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
    return _Slot(place, terms, coefficients, response_only, [_Sums() for _ in terms])


def _add_up(slot: _Slot, rows: Sequence[int]) -> None:
    """Sum a slot's traces into its rows. Projections that are not finite are an error: their gate would stay shut."""
    traces = [trace for trace, _ in slot.traces]
    device = traces[0].projection.device
    seen = torch.cat([mask.to(device) for _, mask in slot.traces], 1)
    before = torch.cat([trace.projection for trace in traces], 1)
    gating = torch.cat([trace.gate_projection for trace in traces], 1)
    moved = torch.cat([trace.displacement for trace in traces], 1)
    fired = torch.cat([trace.fired for trace in traces], 1) & seen
    margins = (gating - slot.coefficients.gate).abs()
    sums = torch.stack(
        [
            seen.sum(1),
            fired.sum(1),
            torch.where(seen, before, 0.0).sum(1),
            torch.where(fired, moved, 0.0).sum(1),
            torch.where(fired, moved.abs(), 0.0).sum(1),
            torch.where(seen, margins, math.inf).amin(1),
        ]
    ).T.tolist()
    for row, (n_seen, n_edited, total, shift, distance, margin) in zip(rows, sums, strict=True):
        if slot.terms[row] is None:
            continue
        if not math.isfinite(total):
            raise EngineError(
                f"layer {slot.layer}, row {row}: the activations are not finite, so they cannot be steered; "
                "load the model with dtype='bfloat16' or 'float32'"
            )
        mine = slot.sums[row]
        mine.seen, mine.edited = mine.seen + int(n_seen), mine.edited + int(n_edited)
        mine.before, mine.moved, mine.distance = mine.before + total, mine.moved + shift, mine.distance + distance
        mine.margin = min(mine.margin, margin)


def _term_receipt(term: EditTerm, sums: _Sums) -> TermReceipt:
    seen = sums.seen or math.nan
    return TermReceipt(
        label=term.label,
        layer=term.layer,
        position=term.position,
        tokens_seen=sums.seen,
        tokens_edited=sums.edited,
        projection_before=sums.before / seen,
        projection_after=(sums.before + sums.moved) / seen,
        perturbation=sums.distance / sums.edited if sums.edited else 0.0,
        gate_margin=sums.margin,
    )
