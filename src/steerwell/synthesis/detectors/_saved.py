"""What saved detectors share: an artifact folder whose manifest says of which kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from steerwell.core.artifacts import MANIFEST, load_artifact, save_artifact
from steerwell.core.errors import ArgumentError, ArtifactError

KIND = "detector"
C = TypeVar("C")


def write(
    folder: str | Path,
    name: str,
    arrays: Mapping[str, np.ndarray],
    content: Mapping[str, Any],
    threshold: float,
    provenance: Mapping[str, Any],
) -> Path:
    """Write the artifact of a detector of the kind `name`; `content` is the kind's own."""
    shared = {"detector": name, "threshold": threshold, "provenance": dict(provenance)}
    return save_artifact(folder, KIND, arrays, shared | dict(content))


def read_kind(folder: str | Path) -> str:
    """The kind of a saved detector.

    Raises:
        ArtifactError: nothing there, damaged, or another kind of artifact.
    """
    return str(_checked(folder)[1]["detector"])


def read(folder: str | Path, name: str, layout: type[C]) -> tuple[dict[str, np.ndarray], C]:
    """Arrays and content of a saved detector of the kind `name`, the content checked against a dataclass.

    Raises:
        ArtifactError: as in `read_kind`, or content that does not fit.
    """
    arrays, content = _checked(folder)
    if content["detector"] != name:
        raise ArtifactError(f"{folder} holds a {content['detector']!r} detector, expected {name!r}; use load_detector")
    try:
        return arrays, TypeAdapter(layout).validate_python({k: v for k, v in content.items() if k != "detector"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"detector {folder} is not usable: {where}: {first['msg']}; train it anew") from error
    except ArgumentError as error:
        raise ArtifactError(f"detector {folder} is not usable: {error}; train it anew") from error


def _checked(folder: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not (Path(folder) / MANIFEST).is_file():
        raise ArtifactError(f"{folder} holds no saved detector ({MANIFEST} is missing); make one with 'detect train'")
    arrays, content = load_artifact(folder, KIND)
    if not isinstance(content.get("detector"), str):
        raise ArtifactError(f"detector {folder} is not usable: it does not say of which kind it is; train it anew")
    return arrays, content
