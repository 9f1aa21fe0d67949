"""Things found by name: one module per thing, its file name is its registered name; third parties use entry points."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from steerwell.core.errors import UnknownNameError


class Registry:
    """Implementations of one kind, imported on first use.

    A bundled one is a module of `package` whose name does not begin with '_'; it offers the attribute `attribute`.
    A third party's is an entry point of the group `steerwell.<kind>s` that names such a module.
    """

    def __init__(self, kind: str, package: str, attribute: str) -> None:
        self.kind, self.package, self.attribute = kind, package, attribute

    def names(self) -> tuple[str, ...]:
        """Every registered name, sorted; nothing is imported."""
        package: ModuleType = import_module(self.package)
        bundled = {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")}
        return tuple(sorted(bundled | set(self._entry_points())))

    def get(self, name: str) -> Any:
        """The implementation registered under `name`; bundled names cannot be overridden.

        Raises:
            UnknownNameError: nothing has this name, or what has it does not offer the attribute.
        """
        require_name(self, name)
        found = self._entry_points().get(name)
        bundled = not name.startswith("_") and _has_module(self.package, name)
        module = import_module(f"{self.package}.{name}") if bundled or found is None else found.load()
        if not hasattr(module, self.attribute):
            fix = f"Its module must define {self.attribute!r}."
            raise UnknownNameError(f"{self.kind} implementation", name, self.names(), fix)
        return getattr(module, self.attribute)

    def _entry_points(self) -> dict[str, Any]:
        return {point.name: point for point in entry_points(group=f"steerwell.{self.kind}s")}


def _has_module(package: str, name: str) -> bool:
    return any(module.name == name for module in pkgutil.iter_modules(import_module(package).__path__))


def require_name(registry: Registry, name: str) -> None:
    """Raise `UnknownNameError` unless the registry has this name; nothing is imported."""
    if name not in registry.names():
        raise UnknownNameError(registry.kind, name, registry.names())
