"""One state of what a server steers with: names, what they stand for, and the edits built from them so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import Direction, Edit
from steerwell.serving.steering import MAX_EDITS, MAX_TERMS, MONITOR, PolicySpec, Steering, SteeringField, Term, Watch
from steerwell.steering.interventions import build

UNSTEERED, CUSTOM = "unsteered", "custom"
CACHED = 256  # edits; the largest (64 terms toward violating, d_model 8192) hold 2 MB each
LARGEST = float(np.finfo(np.float32).max)


class Snapshot:
    """A state of the catalog: names and what they stand for, and the steering built from them so far."""

    def __init__(
        self, directions: Mapping[str, Direction], policies: Mapping[str, PolicySpec], monitor_only: bool
    ) -> None:
        self.directions, self.policies, self.monitor_only = directions, policies, monitor_only
        self.steering = lru_cache(maxsize=CACHED)(self._steering)  # holds no lock while it builds

    def direction(self, name: str) -> Direction:
        """Raises UnknownNameError."""
        if name not in self.directions:
            raise UnknownNameError("direction", name[:64], sorted(self.directions))
        return self.directions[name]

    def policy(self, name: str) -> PolicySpec:
        """Raises UnknownNameError."""
        if name not in self.policies:
            raise UnknownNameError("policy", name[:64], sorted(self.policies))
        return self.policies[name]

    def policy_at(self, name: str, strength: float | None) -> PolicySpec:
        """A policy at another strength (None: its own); ArgumentError: outside its bounds."""
        spec = self.policy(name)
        if strength is None or strength == spec.strength:
            return spec
        try:
            spec.require_bounds(f"strength of policy {name!r}", strength)
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        return spec.model_copy(update={"strength": strength})

    def choices(self, name: str) -> list[float | None]:
        """A policy's own strength (None), the ends of its bounds, and 0 if it lies within."""
        bounds = self.policies[name].bounds
        low, high = bounds.strength if bounds else (1.0, -1.0)
        return [None, *([low, high] if bounds else []), *([0.0] if low <= 0 <= high else [])]

    def edit(self, spec: Term) -> Edit:
        """What a term along a direction does when it acts."""
        edit = build(
            self.direction(spec.direction or ""),
            spec.method or "",
            spec.blocks,
            spec.strength or 0.0,
            position=spec.position,
            toward=spec.toward,
            gate=self.direction(spec.gate) if spec.gate else None,
            threshold=spec.threshold,
            above=spec.above,
        )
        for term in edit.terms:
            gate = 0.0 if math.isinf(term.gate) else term.gate
            if max(abs(term.offset), abs(term.gain), abs(gate)) > LARGEST:
                raise ArgumentError(
                    f"strength: got {spec.strength:g}; the edit of layer {term.layer} overflows; lower it"
                )
        return edit

    def _steering(self, terms: SteeringField) -> Steering:
        if not terms:
            return Steering(None, UNSTEERED, (), monitors=False)
        specs = [term if term.policy is None else self.policy_at(term.policy, term.strength) for term in terms]
        wanted = sum(len(spec.blocks) for spec in specs)
        if len(specs) > MAX_TERMS or wanted > MAX_EDITS:
            raise ArgumentError(
                f"steering: got {len(specs)} terms at {wanted} layers in all; "
                f"at most {MAX_TERMS} terms at {MAX_EDITS} layers in all; give fewer"
            )
        edits = [self.edit(spec) for spec in specs]
        if self.monitor_only:
            edits = [self._observed(spec) for spec in specs]
        return Steering(
            edit=edits[0] if len(edits) == 1 else Edit.compose(edits),
            name=terms[0].policy or CUSTOM if len(terms) == 1 else CUSTOM,
            watches=self._watches(specs),
            monitors=self.monitor_only or all(spec.method == MONITOR for spec in specs),
        )

    def _observed(self, spec: Term) -> Edit:
        """A monitor at the term's layers, along the direction itself, on the tokens that tell its classes apart.

        These are the answer's; of a direction that was read before the answer, `prompt_last`, the prompt's too
        (docs/monitoring.md has the figures).
        """
        direction = self.direction(spec.direction or "")
        early = direction.provenance.get("pool") == "prompt_last"
        return build(direction, MONITOR, spec.blocks, 0.0, position="all" if early else "response")

    def _watches(self, specs: list[Term]) -> tuple[Watch, ...]:
        """One per term of the edit: `build` puts a spec's layers in ascending order."""
        watches: list[Watch] = []
        for spec in specs:
            name = spec.direction or ""
            sign = -1 if spec.toward == "violating" and not self.monitor_only else 1
            for layer in sorted(spec.blocks):
                _, point = self.direction(name).at(layer)
                watches.append(Watch(len(watches), layer, name, point.boundary, point.separation, sign))
        return tuple(watches)


def inert(edit: Edit) -> bool:
    """Whether an edit changes no token."""
    return all(term.offset == 0 and term.gain == 0 for term in edit.terms)
