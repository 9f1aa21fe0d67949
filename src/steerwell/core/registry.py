"""Things found by name: one module per thing, its file name is its registered name; third parties use entry points."""

from __future__ import annotations

import pkgutil
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from steerwell.core.errors import UnknownNameError


class Registry:
    """Implementations of one kind, imported on first use.

    A bundled one is a module of `package` whose name does not begin with '_'; it offers the attribute `attribute`.
    A third party's is an entry point of the group `steerwell.<kind>s` that names such a module. What is installed is
    looked up once: the lookup reads every distribution's files, and names are checked for every configuration.
    """

    def __init__(self, kind: str, package: str, attribute: str) -> None:
        self.kind, self.package, self.attribute = kind, package, attribute

    def names(self) -> tuple[str, ...]:
        """Every registered name, sorted; nothing is imported."""
        return self._names

    def get(self, name: str) -> Any:
        """The implementation registered under `name`; bundled names cannot be overridden.

        Raises:
            UnknownNameError: nothing has this name, or what has it does not offer the attribute.
        """
        require_name(self, name)
        module = import_module(f"{self.package}.{name}") if name in self._bundled else self._entry_points[name].load()
        if not hasattr(module, self.attribute):
            fix = f"Its module must define {self.attribute!r}."
            raise UnknownNameError(f"{self.kind} implementation", name, self.names(), fix)
        return getattr(module, self.attribute)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(sorted(self._bundled | set(self._entry_points)))

    @cached_property
    def _bundled(self) -> frozenset[str]:
        package: ModuleType = import_module(self.package)
        modules = pkgutil.iter_modules(package.__path__)
        return frozenset(module.name for module in modules if not module.name.startswith("_"))

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"steerwell.{self.kind}s")}


def require_name(registry: Registry, name: str) -> None:
    """Raise `UnknownNameError` unless the registry has this name; nothing is imported."""
    if name not in registry.names():
        raise UnknownNameError(registry.kind, name, registry.names())
