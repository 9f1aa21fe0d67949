"""What a server steers with, and who may ask for what: directions and policies by name, from a request to its edit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict
from threading import Lock
from typing import Any, Literal, get_args

from steerwell.core.errors import ArgumentError, NotAllowedError, UnknownNameError
from steerwell.core.records import Calibration, Direction, ModelInfo
from steerwell.serving.snapshot import CUSTOM, UNSTEERED, Snapshot, inert
from steerwell.serving.steering import PolicySpec, Steering, SteeringField, Term, Watch, flagged
from steerwell.steering.interventions import METHODS
from steerwell.studies.config import STRENGTHS

__all__ = ["Catalog", "PolicySpec", "Requests", "Steering", "SteeringField", "Term", "Watch", "flagged"]

Requests = Literal["locked", "policies", "open"]
NAMES = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # no dot first: "." and ".." mean something in a URL


class Catalog:
    """Directions and policies by name, and what requests may do with them. Every method may be called from any thread.

    The state is one snapshot that is never changed, only replaced whole: a request sees the one before or after, and
    an edit that was handed out stays as it is.

    Args:
        info: the served model.
        served: its name for clients; `served:policy` is the same model under a policy.
        requests: what a request may ask for. `locked`: the default policy, at a strength within its bounds.
            `policies`: one registered policy. `open`: also steering of its own, and none.
        default: name of the policy of requests that name none; None: they are unsteered.
        monitor_only: observe where the steering would act, and change nothing.
        poles: what concepts call their classes, for `describe`: concept name to `{"aligned": ..., "violating": ...}`.

    Raises:
        ArgumentError: a name that cannot be one.
        UnknownNameError: no such mode of requests.
    """

    def __init__(
        self,
        info: ModelInfo,
        served: str,
        requests: Requests,
        default: str | None,
        monitor_only: bool,
        poles: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        if requests not in get_args(Requests):
            raise UnknownNameError("mode of requests", requests, get_args(Requests))
        if default is not None:
            _require_name("policy", default)
        self._info, self._served, self._requests, self._default = info, served, requests, default
        self._poles = poles or {}
        self._methods = [_method(name) for name in METHODS.names()]  # imports all of them, so that no request does
        self._writing = Lock()
        self._snapshot = Snapshot({}, {}, monitor_only)

    def put_direction(self, name: str, direction: Direction) -> None:
        """Register a direction, or replace it: policies along it steer along the new one from now on.

        Raises:
            ArgumentError: the name cannot be one; a policy cannot be built along the new direction.
            ModelMismatchError: it was made for another model.
        """
        _require_name("direction", name)
        direction.model.require_same(self._info, f"direction {name!r}")
        with self._writing:
            now = self._snapshot
            self._replace({**now.directions, name: direction}, now.policies)

    def remove_direction(self, name: str) -> None:
        """Forget a direction.

        Raises:
            UnknownNameError: there is none of this name.
            ArgumentError: policies steer along it; the message names them.
        """
        with self._writing:
            now = self._snapshot
            now.direction(name)
            users = [policy for policy, spec in now.policies.items() if name in (spec.direction, spec.gate)]
            if users:
                raise ArgumentError(
                    f"direction {name!r} is in use by policy {_quoted(users)}; remove or replace it first"
                )
            self._replace(_without(now.directions, name), now.policies)

    def put_policy(self, name: str, policy: PolicySpec) -> None:
        """Register a policy, or replace it.

        Raises:
            ArgumentError: the name cannot be one; the policy cannot be built, or requests could switch the default
                policy off by it where they may not.
            UnknownNameError: its direction, gate, method or layer does not exist.
        """
        _require_name("policy", name)
        with self._writing:
            now = self._snapshot
            self._replace(now.directions, {**now.policies, name: policy})

    def remove_policy(self, name: str) -> None:
        """Forget a policy.

        Raises:
            UnknownNameError: there is none of this name.
            ArgumentError: it is the default.
        """
        with self._writing:
            now = self._snapshot
            now.policy(name)
            if name == self._default:
                raise ArgumentError(
                    f"policy {name!r} is the server's default and cannot be removed; replace it instead"
                )
            self._replace(now.directions, _without(now.policies, name))

    def models(self) -> list[str]:
        """The model names that a request may give: the model's own, and `name:policy` for the policies open to it."""
        policies = sorted(self._snapshot.policies)
        if self._requests == "locked":
            policies = [name for name in policies if name == self._default]
        more = [UNSTEERED] if self._requests == "open" else []
        return [self._served, *(f"{self._served}:{name}" for name in [*policies, *more])]

    def resolve(self, model: str, steering: SteeringField | None) -> Steering:
        """The steering of a request; an equal request gets the same `Edit` object until something is registered anew.

        Args:
            model: the model's name, alone or with a policy's.
            steering: the request's own field; None: it has none.

        Raises:
            UnknownNameError: no such model (its `kind` is "model"), policy, direction, method or layer.
            NotAllowedError: the server does not let requests choose this.
            ArgumentError: a strength outside its policy's bounds; model name and field disagree; what `build` refuses.
        """
        now = self._snapshot
        terms = self._asked(now, model, steering)
        self._permit(now, terms)
        return now.steering(terms)

    def describe(self) -> dict[str, Any]:
        """Everything that a client may know of the steering, as JSON values."""
        now = self._snapshot
        return {
            "model": self._info.name,
            "served": self._served,
            "d_model": self._info.d_model,
            "n_layers": self._info.n_layers,
            "requests": self._requests,
            "default": self._default,
            "monitor_only": now.monitor_only,
            "methods": self._methods,
            "directions": [self._told(name, direction) for name, direction in sorted(now.directions.items())],
            "policies": [_told_policy(now, name) for name in sorted(now.policies)],
        }

    def _asked(self, now: Snapshot, model: str, steering: SteeringField | None) -> SteeringField:
        """What the model name and the field ask for together."""
        named = self._named(now, model)
        if steering is None:
            chosen = self._default if named is None else None if named == UNSTEERED else named
            return () if chosen is None else (Term(policy=chosen),)
        if named is not None:
            same = not steering if named == UNSTEERED else [term.policy for term in steering] == [named]
            if not same:
                raise ArgumentError(
                    f"steering: the model name asks for {named!r} and 'steering' for something else; "
                    f"give 'steering' with the model name {self._served!r}, or leave it out"
                )
        return steering

    def _named(self, now: Snapshot, model: str) -> str | None:
        """The policy in a model name, or "unsteered"; None: the model's own name."""
        if model == self._served:
            return None
        named = model.removeprefix(f"{self._served}:")
        if named == model or (named != UNSTEERED and named not in now.policies):
            raise UnknownNameError("model", model[:160], self.models())
        return named

    def _permit(self, now: Snapshot, terms: SteeringField) -> None:
        """Raise unless requests may choose these terms."""
        if self._requests == "open" or (not terms and self._default is None):
            return
        policy = terms[0].policy if len(terms) == 1 else None
        if self._requests == "locked" and (policy is None or policy != self._default):
            only = f"policy {self._default!r}" if self._default else "no steering"
            raise NotAllowedError(f"steering: this server answers every request with {only}; leave the choice out")
        if policy is None:
            raise NotAllowedError("steering: requests to this server choose one of its policies; name one, or none")
        spec, strength = now.policy(policy), terms[0].strength
        if spec.bounds is None and strength not in (None, spec.strength):
            raise NotAllowedError(f"strength: policy {policy!r} has a fixed one; leave the strength out")

    def _replace(self, directions: Mapping[str, Direction], policies: Mapping[str, PolicySpec]) -> None:
        """Put a new state in place if every policy can be built in it, and none switches the default off."""
        new = Snapshot(directions, policies, self._snapshot.monitor_only)
        for name in policies:
            for strength in new.choices(name):
                new.steering((Term(policy=name, strength=strength),))
            self._require_defence(new, name)
        self._snapshot = new

    def _require_defence(self, new: Snapshot, name: str) -> None:
        """Raise if a request could choose a policy that does nothing in place of a default that does something."""
        default = new.policies.get(self._default or "")
        reachable = self._requests == "policies" or (self._requests == "locked" and name == self._default)
        if not reachable or new.monitor_only or default is None or inert(new.edit(default)):
            return
        for strength in new.choices(name):
            if inert(new.edit(new.policy_at(name, strength))):
                raise ArgumentError(
                    f"policy {name!r} changes nothing at strength {strength or 0:g}, so requests could switch the "
                    f"default policy {self._default!r} off by it; leave that strength out of its bounds, or "
                    "let requests be 'open'"
                )

    def _told(self, name: str, direction: Direction) -> dict[str, Any]:
        return {
            "name": name,
            "concept": direction.concept,
            "method": direction.method,
            "pool": direction.provenance.get("pool"),
            "poles": dict(self._poles[direction.concept]) if direction.concept in self._poles else None,
            "layers": [_told_layer(index, layer) for index, layer in enumerate(direction.calibration)],
        }


def _require_name(kind: str, name: str) -> None:
    if not NAMES.fullmatch(name):
        raise ArgumentError(
            f"{kind} name: got {name[:80]!r}; expected 1 to 64 letters (a-z), digits, '.', '_' or '-', no '.' first"
        )
    if name in (UNSTEERED, CUSTOM):
        raise ArgumentError(f"{kind} name: {name!r} has a meaning of its own; choose another")


def _without(items: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: item for key, item in items.items() if key != name}


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _method(name: str) -> dict[str, Any]:
    text = inspect.getdoc(inspect.getmodule(METHODS.get(name))) or ""
    return {"name": name, "doc": text.partition("\n")[0], "strengths": list(STRENGTHS.get(name, ()))}


def _told_layer(index: int, layer: Calibration) -> dict[str, Any]:
    told = ("boundary", "mu_aligned", "mu_violating", "sigma_aligned", "sigma_violating", "cohens_d")
    return {"layer": index} | {name: getattr(layer, name) for name in told}


def _told_policy(now: Snapshot, name: str) -> dict[str, Any]:
    spec = now.policy(name)
    return {
        "name": name,
        **spec.model_dump(
            include={"direction", "method", "strength", "position", "toward", "gate", "threshold", "above"}
        ),
        "layers": sorted(spec.blocks),
        "bounds": list(spec.bounds.strength) if spec.bounds else None,
        "watches": [asdict(watch) for watch in now.steering((Term(policy=name),)).watches],
    }
