"""Settings as YAML: frozen records that refuse unknown keys, and errors that name key, value and fix."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from steerwell.core.errors import ArgumentError
from steerwell.core.yamltext import parse_yaml


class Settings(BaseModel):
    """A frozen record; a misspelt key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


def load_settings(kind: type[S], path: Path) -> S:
    """Read a YAML file.

    Raises:
        ArgumentError: it cannot be read, is no YAML mapping, or has faults; the message lists them all.
    """
    return read_settings(kind, read_mapping(path), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file's keys and values, whatever they are.

    Raises:
        ArgumentError: it cannot be read, or is no YAML mapping.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))[1]
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} is no YAML: {error}") from error
    if not isinstance(data, dict):
        raise ArgumentError(f"{path} holds {type(data).__name__}; expected 'key: value' lines")
    return data


def read_settings(kind: type[S], data: dict[str, Any], where: str) -> S:
    """Settings from plain data; `where` is what the error calls them.

    Raises:
        ArgumentError: unknown keys or wrong values; the message lists them all.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        listed = "\n  ".join(_faults(kind, error))
        raise ArgumentError(f"{where} has {error.error_count()} fault(s):\n  {listed}") from error


def _faults(kind: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        *parents, last = item["loc"] or ("",)
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] != "extra_forbidden":
            yield f"{where}: got {reprlib.repr(item['input'])}; {item['msg'].removeprefix('Value error, ')}"
            continue
        known = list(_record_at(kind, parents).model_fields)
        near = difflib.get_close_matches(str(last), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        yield f"{where}: no such key; known: {', '.join(known)}.{hint}"


def _record_at(kind: type[BaseModel], location: list[Any]) -> type[BaseModel]:
    """The record that stands at a location."""
    for part in location:
        form = kind.model_fields[part].annotation if part in kind.model_fields else None
        kind = next(_records(form), kind)
    return kind


def _records(form: Any) -> Iterator[type[BaseModel]]:
    if isinstance(form, type) and issubclass(form, BaseModel):
        yield form
    for part in get_args(form):
        yield from _records(part)
