"""Steerwell: steer language models by their activations, and measure honestly what that does.

The public names below are loaded on first use, so that `import steerwell` brings in neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerwell.concepts import Concept, check_concept, concept_names, load_concept
    from steerwell.core.artifacts import load_direction, save_direction
    from steerwell.core.errors import SteerwellError
    from steerwell.core.policy import Policy, load_policy, save_policy
    from steerwell.core.records import (
        Calibration,
        Direction,
        Edit,
        EditTerm,
        Message,
        Prompt,
        Receipt,
        Response,
        Sampling,
        Score,
        Verdict,
    )
    from steerwell.engines.hf import HFEngine
    from steerwell.steering.interventions import build
    from steerwell.steering.policies import policy_edit
    from steerwell.studies.fitting import contrast, fit

_HOMES = {
    "steerwell.concepts": ("Concept", "check_concept", "concept_names", "load_concept"),
    "steerwell.core.artifacts": ("load_direction", "save_direction"),
    "steerwell.core.errors": ("SteerwellError",),
    "steerwell.core.policy": ("Policy", "load_policy", "save_policy"),
    "steerwell.core.records": (
        "Calibration",
        "Direction",
        "Edit",
        "EditTerm",
        "Message",
        "Prompt",
        "Receipt",
        "Response",
        "Sampling",
        "Score",
        "Verdict",
    ),
    "steerwell.engines.hf": ("HFEngine",),
    "steerwell.steering.interventions": ("build",),
    "steerwell.steering.policies": ("policy_edit",),
    "steerwell.studies.fitting": ("contrast", "fit"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = version("steerwell")
__all__ = [
    "Calibration",
    "Concept",
    "Direction",
    "Edit",
    "EditTerm",
    "HFEngine",
    "Message",
    "Policy",
    "Prompt",
    "Receipt",
    "Response",
    "Sampling",
    "Score",
    "SteerwellError",
    "Verdict",
    "build",
    "check_concept",
    "concept_names",
    "contrast",
    "fit",
    "load_concept",
    "load_direction",
    "load_policy",
    "policy_edit",
    "save_direction",
    "save_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'steerwell' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME_OF[name]), name)
    except ModuleNotFoundError as error:
        from steerwell.core.errors import MissingDependencyError

        if error.name is None or error.name.startswith("steerwell"):
            raise
        raise MissingDependencyError(error.name, "hf") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
