"""A policy: one steering decision as a small YAML file, found by a sweep and read by everything that generates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steerwell.core.artifacts import write_atomic
from steerwell.core.errors import ArgumentError, ArtifactError
from steerwell.core.records import Position, Toward
from steerwell.core.yamltext import parse_yaml

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Bounds(BaseModel):
    """What a request may set the strength to, both ends included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strength: tuple[Finite, Finite]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.strength[0] > self.strength[1]:
            raise ValueError(f"strength: the lower bound {self.strength[0]} exceeds the upper one {self.strength[1]}")
        return self


class Policy(BaseModel):
    """Direction, method, layers, strength, position and side of one steering decision, with its bounds.

    `direction` and `gate` are artifact folders; a relative path is relative to the policy file. `found` is what the
    search that wrote the policy knows of it (figures, split sizes); nothing reads it back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    name: str = ""
    direction: str
    method: str
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    strength: Finite
    position: Position = "all"
    toward: Toward = "aligned"
    bounds: Bounds | None = None
    gate: str | None = None
    threshold: Finite | None = None
    above: bool = False
    found: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.bounds is not None:
            low, high = self.bounds.strength
            if not low <= self.strength <= high:
                raise ValueError(f"strength {self.strength:g} is outside the bounds {low:g} to {high:g}")
        return self

    def with_strength(self, strength: float) -> Policy:
        """The same policy at another strength.

        Raises:
            ArgumentError: the strength is outside the policy's bounds.
        """
        try:
            return Policy.model_validate(self.model_dump() | {"strength": strength})
        except ValidationError as error:
            raise ArgumentError(f"strength: {_first(error)}; stay within the policy's bounds") from error


def load_policy(path: str | Path) -> Policy:
    """Read a policy file; its artifact paths come back resolved.

    Raises:
        ArtifactError: the file is missing, is no YAML mapping, or has a wrong field; the message names it.
    """
    file = Path(path)
    try:
        policy = Policy.model_validate(parse_yaml(file.read_text(encoding="utf-8"))[1])
    except OSError as error:
        raise ArtifactError(f"policy {file} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise ArtifactError(f"policy {file} is not usable: {_first(error)}; mend that field") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ArtifactError(f"policy {file} is no YAML: {error}") from error
    resolved = {
        name: str(file.parent / getattr(policy, name)) for name in ("direction", "gate") if getattr(policy, name)
    }
    return policy.model_copy(update=resolved)


def save_policy(policy: Policy, path: str | Path) -> Path:
    """Write a policy file, atomically."""
    data = policy.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"schema_"})
    write_atomic(path, yaml.safe_dump({"schema": 1} | data, sort_keys=False, allow_unicode=True))
    return Path(path)


def _first(error: ValidationError) -> str:
    item = error.errors()[0]
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
