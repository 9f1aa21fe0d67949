"""The gated affine edit: every rank-1 steering method in one vectorised operation (METHODS section 3).

    h  <-  h + 1[h . c < g] * (a + b * (h . v)) * v

Shapes: B rows, T tokens, D = d_model. Every row has its own (v, c, g, a, b). There is no data-dependent control flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One term per row, on one device, in float32.

    Attributes:
        direction: v, [B, 1, D]; zeros in a row without edit.
        gate_direction: c, [B, 1, D]; None means v in every row.
        gate: g, [B, 1]; minus infinity never fires, infinity always does.
        offset: a, [B, 1].
        gain: b, [B, 1].
    """

    direction: Tensor
    gate_direction: Tensor | None
    gate: Tensor
    offset: Tensor
    gain: Tensor

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> Self:
        """The coefficients of some rows, in the order given."""
        return self._each(lambda tensor: tensor[rows.to(tensor.device)])

    def idle(self, rows: int) -> Self:
        """As many rows of the same width that change nothing: zero vectors behind a gate that never opens."""
        like = self.gate.new_zeros((rows, 1))
        vectors = self.direction.new_zeros((rows, *self.direction.shape[1:]))
        return type(self)(vectors, None, like - math.inf, like, like)

    def joined(self, other: Self) -> Self:
        """These rows and then the other's, on this one's device."""
        other = other.to(self.gate.device)
        gated = self.gate_direction is not None or other.gate_direction is not None
        gates = [terms.direction if terms.gate_direction is None else terms.gate_direction for terms in (self, other)]
        return type(self)(
            torch.cat([self.direction, other.direction]),
            torch.cat(gates) if gated else None,
            *(torch.cat([getattr(self, name), getattr(other, name)]) for name in ("gate", "offset", "gain")),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one application did: tensors [B, T]; `gate_projection` is h . c, `displacement` is 0 where nothing fired."""

    projection: Tensor
    gate_projection: Tensor
    displacement: Tensor
    fired: Tensor


def gated_affine(hidden: Tensor, terms: Coefficients, mask: Tensor | None = None) -> tuple[Tensor, Trace]:
    """Apply one term per row to a block's output.

    Args:
        hidden: residual states [B, T, D], any float dtype; the edit is computed in float32.
        terms: one term per row.
        mask: bool [B, T], tokens in scope; None: all of them. Tokens out of scope keep their value exactly.

    Returns:
        The edited states (same shape and dtype), and the trace.
    """
    states = hidden.float()
    projection = torch.linalg.vecdot(states, terms.direction)
    gating = projection if terms.gate_direction is None else torch.linalg.vecdot(states, terms.gate_direction)
    fired = gating < terms.gate
    if mask is not None:
        fired = fired & mask
    # `where`, not a product: a row that is not steered stays as it is even if its activations overflow.
    displacement = torch.where(fired, torch.addcmul(terms.offset, terms.gain, projection), 0.0)
    edited = torch.addcmul(states, displacement.unsqueeze(-1), terms.direction)
    return edited.to(hidden.dtype), Trace(projection, gating, displacement, fired)
