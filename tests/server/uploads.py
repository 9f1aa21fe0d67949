"""Directions as an admin uploads them, sound ones and others."""

from __future__ import annotations

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

from steerwell.core import artifacts
from steerwell.core.artifacts import save_direction
from steerwell.core.records import Direction
from tests.made import calibration, direction, model_info


def other(pilot: Any) -> Direction:
    layers = tuple(calibration(boundary=0.1 * layer) for layer in range(pilot.info.n_layers))
    return direction(1, model=pilot.info, calibration=layers)


def files(made: Direction, folder: Path) -> dict[str, bytes]:
    """A direction's two files, as they are uploaded."""
    save_direction(made, folder)
    tensors = next(folder.glob("*.safetensors"))
    return {"manifest": (folder / "artifact.json").read_bytes(), "tensors": tensors.read_bytes()}


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header and no data."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def huge(shape: str, end: int) -> bytes:
    return header(f'{{"vectors":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}'.encode())


def resealed(manifest: bytes, tensors: bytes, **content: Any) -> dict[str, bytes]:
    """An upload whose checksums are right and whose content is not."""
    told = json.loads(manifest)
    told["tensors"]["sha256"] = sha256(tensors).hexdigest()
    told["content"] |= content
    told["sha256"] = artifacts._checksum(told)
    return {"manifest": json.dumps(told).encode(), "tensors": tensors}


def faulty_uploads(pilot: Any, folder: Path) -> dict[str, dict[str, bytes]]:
    """Uploads by what is wrong with them."""
    good = files(other(pilot), folder / "good")
    manifest, tensors = good["manifest"], good["tensors"]
    strange = model_info(name="another", d_model=pilot.info.d_model, n_layers=pilot.info.n_layers)
    layers = tuple(calibration() for _ in range(pilot.info.n_layers))
    return {
        "truncated": good | {"tensors": tensors[: len(tensors) // 2]},
        "resealed truncation": resealed(manifest, tensors[: len(tensors) // 2]),
        "another model's": files(direction(model=strange, calibration=layers), folder / "strange"),
        "another shape": files(direction(), folder / "small"),
        "header of 2**63 bytes": resealed(manifest, header(b"{}", 2**63)),
        "header of 99 GB": resealed(manifest, header(b"{}", 99 * 10**9)),
        "tensor of a terabyte": resealed(manifest, huge("[500000,500000]", 10**12)),
        "overflowing shape": resealed(manifest, huge("[4294967296,4294967296]", 0)),
        "unknown dtype": resealed(manifest, header(b'{"v":{"dtype":"F9","shape":[0],"data_offsets":[0,0]}}')),
        "no tensors": resealed(manifest, header(b"{}")),
        "deep manifest": good | {"manifest": b"[" * 200_000},
        "huge number": good | {"manifest": b"9" * 100_000},
        "half a character": good | {"manifest": manifest + b"\xff"},
        "a pickle": good | {"tensors": b"\x80\x04cos\nsystem\n(S'true'\ntR."},
        "calibration of text": resealed(manifest, tensors, calibration=["x"] * pilot.info.n_layers),
        "nothing": {"manifest": b"", "tensors": b""},
    }  # fmt: skip
