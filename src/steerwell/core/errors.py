"""The one error tree. Every error a user can cause is a `SteerwellError`.

A message names the argument, what came, what was expected and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class SteerwellError(Exception):
    """Root of everything this package raises on purpose. Pickled and back it is the same, whatever made it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, vars(self))


class ArgumentError(SteerwellError, ValueError):
    """An argument has a wrong value, type or shape."""


class UnknownNameError(SteerwellError, LookupError):
    """A name (method, concept, layer ...) that nothing is registered under."""

    def __init__(self, kind: str, name: object, known: Iterable[object], fix: str = "") -> None:
        names = [str(item) for item in known]
        near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        tail = f" {fix}" if fix else ""
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(names) or 'none'}.{hint}{tail}")
        self.kind, self.name, self.known = kind, name, tuple(names)


class ConceptError(SteerwellError, ValueError):
    """A concept file is not usable. The message lists line, field and fix of every fault."""


class ArtifactError(SteerwellError):
    """A saved artifact is missing, truncated, altered or of an unknown schema."""


class ModelMismatchError(SteerwellError, ValueError):
    """A direction or an edit meets a model that it was not made for."""


class EngineError(SteerwellError, RuntimeError):
    """A model cannot be loaded, or the engine cannot do what was asked (never: silently unsteered)."""


class NotFiniteError(EngineError):
    """Activations overflow, under too much steering or in too small a dtype; what they give means nothing."""


class EngineGoneError(EngineError):
    """The processes that run the model have ended; nothing more can be asked of this engine."""


class NotAllowedError(SteerwellError):
    """The server's policy forbids what a request asks for."""


class TimedOutError(SteerwellError, TimeoutError):
    """A request was not answered in its time."""


class OverloadedError(SteerwellError):
    """A server takes no more requests for now.

    Args:
        message: what is full, and what to do.
        retry_after: seconds after which to try again.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class MissingDependencyError(SteerwellError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package!r} is not installed; run: pip install 'steerwell[{extra}]'")


def _again(kind: type[SteerwellError], args: tuple[Any, ...], fields: Mapping[str, Any]) -> SteerwellError:
    """An error as it was, without the arguments of its making."""
    error = kind.__new__(kind, *args)
    vars(error).update(fields)
    return error
