"""Artifacts on disk: a folder with one JSON file and one safetensors file. Never pickle.

The JSON file is the commit point: it names the tensor file by content and holds its checksum, and it is put in place
by one atomic rename. A reader sees the old artifact or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from steerwell.core.errors import ArgumentError, ArtifactError
from steerwell.core.records import Calibration, Direction, ModelInfo

SCHEMA_VERSION = 1
MANIFEST = "artifact.json"
LIBRARIES = ("steerwell", "numpy", "torch", "transformers", "scikit-learn", "safetensors")


def save_artifact(path: str | Path, kind: str, arrays: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> Path:
    """Write an artifact folder; an artifact of the same kind that stands there is replaced, anything else is not.

    Raises:
        ArtifactError: the place holds something else, or cannot be written; what stood there is untouched.
    """
    folder = Path(path)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists and is no Steerwell artifact; choose another place or remove it")
    tensors = save_tensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    checksum = hashlib.sha256(tensors).hexdigest()
    manifest = {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "tensors": {"file": f"tensors-{checksum[:16]}.safetensors", "sha256": checksum},
        "content": content,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / manifest["tensors"]["file"], tensors)  # type: ignore[index]
        _replace(folder / MANIFEST, text.encode())
        for stale in folder.glob("tensors-*.safetensors"):
            if stale.name != manifest["tensors"]["file"]:  # type: ignore[index]
                stale.unlink()
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def load_artifact(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read an artifact folder and check it whole: (arrays by name, content).

    Raises:
        ArtifactError: missing, truncated, altered, of another kind or of a schema this version does not know.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes().decode("utf-8"))
        _require(isinstance(manifest, dict), folder, f"{MANIFEST} holds no mapping")
        got = manifest.get("schema")
        fix = "update steerwell" if isinstance(got, int) and got > SCHEMA_VERSION else "fit it anew"
        _require(got == SCHEMA_VERSION, folder, f"schema {got!r}, expected {SCHEMA_VERSION}", fix)
        _require(
            manifest.get("kind") == kind,
            folder,
            f"kind {manifest.get('kind')!r}, expected {kind!r}",
            f"give the folder of a {kind}",
        )
        entry = manifest.get("tensors")
        name = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise ArtifactError(f"{folder} is damaged: it names no tensor file; fit it anew")
        raw = (folder / name).read_bytes()
        _require(hashlib.sha256(raw).hexdigest() == entry.get("sha256"), folder, f"{name} is truncated or altered")
        arrays = load_tensors(raw)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ArtifactError(f"{folder} is no {kind}: {missing} is missing; make one with 'steerwell fit -o'") from error
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror or error}") from error
    except (ValueError, SafetensorError, RecursionError) as error:
        raise ArtifactError(f"{folder} is damaged: {error}; fit it anew") from error
    for name, array in arrays.items():
        _require(bool(np.isfinite(array).all()), folder, f"tensor {name!r} holds NaN or infinity")
    _require(isinstance(manifest.get("content"), dict), folder, "no content")
    return arrays, manifest["content"]


def save_direction(direction: Direction, path: str | Path) -> Path:
    """Save a direction as an artifact folder, atomically."""
    content = {
        "concept": direction.concept,
        "concept_hash": direction.concept_hash,
        "method": direction.method,
        "model": asdict(direction.model),
        "calibration": [_nan_as_none(asdict(layer)) for layer in direction.calibration],
        "provenance": dict(direction.provenance),
    }
    arrays = {"vectors": direction.vectors, "mean_difference": direction.mean_difference}
    return save_artifact(path, "direction", arrays, content)


def load_direction(path: str | Path) -> Direction:
    """Load a direction; everything is checked before it is used.

    Raises:
        ArtifactError: the artifact is missing, damaged or inconsistent.
    """
    arrays, content = load_artifact(path, "direction")
    try:
        layers = content["calibration"]
        return Direction(
            concept=_text(content["concept"]),
            concept_hash=_text(content["concept_hash"]),
            method=_text(content["method"]),
            model=_MODEL.validate_python(content["model"]),
            vectors=_float32(arrays["vectors"]),
            mean_difference=_float32(arrays["mean_difference"]),
            calibration=tuple(_CALIBRATION.validate_python(_none_as_nan(layer)) for layer in layers),
            provenance=_PROVENANCE.validate_python(content["provenance"]),
        )
    except (KeyError, TypeError, ValidationError, ArgumentError) as error:
        detail = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"direction {path} is not usable: {detail}; fit it anew") from error


def library_versions() -> dict[str, str]:
    """Versions of what can change a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_atomic(path: str | Path, text: str) -> None:
    """Put a text file in place at once: readers see the old file or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, text.encode())


_MODEL = TypeAdapter(ModelInfo)
_CALIBRATION = TypeAdapter(Calibration)
_PROVENANCE = TypeAdapter(dict[str, Any])


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _require(holds: bool, folder: Path, problem: str, fix: str = "fit it anew") -> None:
    if not holds:
        raise ArtifactError(f"{folder} is damaged or not what was asked for: {problem}; {fix}")


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32:
        raise ArgumentError(f"vectors have dtype {array.dtype}; expected float32")
    return array


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ArgumentError(f"got {value!r} where text is expected")
    return value


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _nan_as_none(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: 'not known' (split_half of too few pairs) is written as null."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in fields.items()}


def _none_as_nan(fields: Any) -> Any:
    if isinstance(fields, dict) and fields.get("split_half", 0.0) is None:
        return {**fields, "split_half": float("nan")}
    return fields
