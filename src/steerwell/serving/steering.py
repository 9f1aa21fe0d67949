"""What a request says about steering, and what it comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from steerwell.core.policy import Bounds, Policy
from steerwell.core.records import Edit, Position, Receipt, Toward
from steerwell.core.settings import Settings

MONITOR = "monitor"  # the method that only observes
MAX_TERMS = 8  # of a request
MAX_EDITS = 64  # pairs of a term and a layer in a request

Name = Annotated[str, Field(min_length=1, max_length=64)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e9, le=1e9)]  # beyond: no sense, and overflow
Block = Annotated[int, Field(strict=True, ge=0, le=9999)]


class Term(Settings):
    """One step of steering: a registered policy by its name, or a registered direction and what to do along it.

    Beside `policy` only `strength` may stand. Beside `direction` stand `method`, `layers` (or one `layer`), `strength`
    (without effect for `monitor`, which needs none) and the other options of `steering.interventions.build`; `gate`
    names a second registered direction. Names are looked up among what is registered; they are never paths.
    """

    policy: Name | None = None
    direction: Name | None = None
    method: Name | None = None
    layers: Annotated[tuple[Block, ...], Field(min_length=1, max_length=MAX_EDITS)] | None = None
    layer: Block | None = None
    strength: Number | None = None
    position: Position = "all"
    toward: Toward = "aligned"
    gate: Name | None = None
    threshold: Number | None = None
    above: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if self.policy is not None:
            if more := sorted(given - {"policy", "strength"}):
                raise ValueError(f"beside 'policy' only 'strength' may stand, got {', '.join(more)}; leave that out")
            return self
        if self.direction is None:
            raise ValueError("expected a 'policy', or a 'direction' with 'method', 'layers' and 'strength'")
        if {"layer", "layers"} <= given:
            raise ValueError("got both 'layer' and 'layers'; give one of them")
        needed = ["method"] if self.method == MONITOR else ["method", "strength"]
        missing = [name for name in needed if name not in given] + ["layers"] * (not self.blocks)
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; a 'direction' needs 'method', 'layers' and 'strength'")
        return self

    @property
    def blocks(self) -> tuple[int, ...]:
        """The layers, however they were given; none beside a policy."""
        return self.layers or (() if self.layer is None else (self.layer,))


class PolicySpec(Term):
    """A policy as it is registered: a term along a registered direction, and what requests may set the strength to."""

    bounds: Bounds | None = None

    @model_validator(mode="after")
    def _policy(self) -> Self:
        if self.policy is not None:
            raise ValueError("a policy cannot stand for another one; give its 'direction'")
        if self.strength is not None:
            self.require_bounds("strength", self.strength)
        return self

    def require_bounds(self, what: str, strength: float) -> None:
        """Raise `ValueError` if the strength is outside the bounds; `what` names it."""
        low, high = self.bounds.strength if self.bounds else (-math.inf, math.inf)
        if not low <= strength <= high:
            raise ValueError(f"{what}: got {strength:g}; its bounds allow {low:g} to {high:g}; stay within them")

    @classmethod
    def of(cls, policy: Policy, direction: str, gate: str | None = None) -> Self:
        """A policy file's content, with the names under which its directions are registered in place of folders."""
        kept = policy.model_dump(include=set(cls.model_fields) - {"direction", "gate"})
        return cls.model_validate(kept | {"direction": direction, "gate": gate})


def _listed(value: Any) -> Any:
    if not isinstance(value, (dict, Term, list, tuple)):
        raise ValueError("expected one term, such as {'policy': 'NAME'}, or a list of terms")
    return [value] if isinstance(value, (dict, Term)) else value


SteeringField = Annotated[
    tuple[Term, ...],
    Field(max_length=MAX_TERMS),
    BeforeValidator(_listed, json_schema_input_type=Term | list[Term]),
]
"""A request's `steering`: one term, or a list of terms that apply in order; an empty list is: unsteered."""


@dataclass(frozen=True, slots=True)
class Watch:
    """How to read the projections of one term of an edit.

    A term reads `h . u` with `u = sign v`: toward the violating class `build` turns v round. `sign * projection` is
    therefore the projection on the direction itself, in which its calibration is told.

    Attributes:
        term: index in the edit's terms, and in the receipt's.
        layer: the block.
        direction: name of the registered direction.
        boundary: between its classes there, activation units; below lies the violating class.
        separation: distance of its class means there, activation units.
        sign: -1 where the term steers toward violating, else 1.
    """

    term: int
    layer: int
    direction: str
    boundary: float
    separation: float
    sign: int

    def reading(self, projection: float) -> float:
        """`(sign * projection - boundary) / separation`: below 0 on the violating side; NaN: the classes do not differ.

        The class means lie 1 apart; where the boundary is half-way they are at -0.5 and 0.5.
        """
        return (self.sign * projection - self.boundary) / self.separation if self.separation > 0 else math.nan


@dataclass(frozen=True, slots=True)
class Steering:
    """What a request gets.

    Attributes:
        edit: what is done to its rows; None: unsteered.
        name: the policy's name, "custom" (the request's own, or several), or "unsteered".
        watches: how to read the edit's terms.
        monitors: whether the edit only observes.
    """

    edit: Edit | None
    name: str
    watches: tuple[Watch, ...]
    monitors: bool


def flagged(receipt: Receipt | None, steering: Steering) -> bool | None:
    """Whether an answer stays misaligned: a watched term's mean projection, after the edit, is below its boundary.

    A monitor leaves the projection as it is, so after is before there. The mean runs over the tokens in the term's
    scope, with `position` all over the prompt's too. None: nothing was watched, or no token was seen.

    Args:
        receipt: of an edit of this steering.
        steering: what the request got.
    """
    if receipt is None:
        return None
    after = [(watch, receipt.terms[watch.term].projection_after) for watch in steering.watches]
    known = [watch.sign * mean < watch.boundary for watch, mean in after if not math.isnan(mean)]
    return any(known) if known else None
