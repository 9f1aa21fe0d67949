"""What is saved comes back, or `ArtifactError` says why not: never another direction, never another exception."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from safetensors.numpy import save as save_tensors

from steerwell.core import artifacts
from steerwell.core.artifacts import load_artifact, load_direction, read_direction, save_artifact, save_direction
from steerwell.core.errors import ArgumentError, ArtifactError, ModelMismatchError
from steerwell.core.records import Direction
from tests import made

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FIELDS = ("concept", "concept_hash", "method", "model", "calibration", "provenance")


def assert_same(got: Direction, expected: Direction) -> None:
    for name in FIELDS:
        assert getattr(got, name) == getattr(expected, name), name
    assert_array_equal(got.vectors, expected.vectors)
    assert_array_equal(got.mean_difference, expected.mean_difference)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artifact.json").read_text())


def tensors_of(folder: Path) -> Path:
    return folder / manifest_of(folder)["tensors"]["file"]


def resign(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a checksum that fits, so that what comes after the checksum is put to the test."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "artifact.json").write_text(json.dumps(manifest))


def replace_tensors(folder: Path, raw: bytes) -> None:
    """Put other tensor bytes in place, with checksums that fit."""
    manifest = manifest_of(folder)
    (folder / manifest["tensors"]["file"]).write_bytes(raw)
    manifest["tensors"]["sha256"] = hashlib.sha256(raw).hexdigest()
    resign(folder, manifest)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_direction(made.direction(), tmp_path / "d")


def test_round_trip(saved: Path) -> None:
    assert_same(load_direction(saved), made.direction())
    assert load_direction(str(saved)).vectors.dtype == np.float32


def test_an_unknown_stability_comes_back_as_nan(tmp_path: Path) -> None:
    layers = (made.calibration(split_half=math.nan),) * made.N_LAYERS
    folder = save_direction(made.direction(calibration=layers), tmp_path / "d")
    assert "NaN" not in (folder / "artifact.json").read_text()
    assert all(math.isnan(layer.split_half) for layer in load_direction(folder).calibration)


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    folder = save_direction(made.direction(provenance={"n": np.int64(3), "x": np.float32(0.5)}), tmp_path / "d")
    assert load_direction(folder).provenance == {"n": 3, "x": 0.5}


@pytest.mark.parametrize("value", [math.nan, object(), b"x", {1: 1, "a": object()}, "\ud800"])
def test_provenance_holds_json_values_only(tmp_path: Path, value: object) -> None:
    with pytest.raises(ArgumentError, match="JSON values only"):
        save_direction(made.direction(provenance={"x": value}), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_an_artifact_is_two_files_that_others_may_read(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"artifact.json", tensors_of(saved).name}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in saved.iterdir())


def test_replacing_leaves_nothing_of_the_old_one(saved: Path) -> None:
    before = tensors_of(saved)
    save_direction(made.direction(1), saved)
    assert_same(load_direction(saved), made.direction(1))
    assert not before.exists()
    assert len(list(saved.iterdir())) == 2


@pytest.mark.parametrize("survivor", ["the tensor file", "nothing"])
def test_a_crash_while_replacing_leaves_the_old_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch, survivor: str
) -> None:
    whole = artifacts._replace

    def crash(path: Path, data: bytes) -> None:
        if path.name == "artifact.json" or survivor == "nothing":
            raise KeyboardInterrupt
        whole(path, data)

    monkeypatch.setattr(artifacts, "_replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_direction(made.direction(1), saved)
    assert_same(load_direction(saved), made.direction())
    monkeypatch.undo()
    save_direction(made.direction(1), saved)
    assert_same(load_direction(saved), made.direction(1))
    assert len(list(saved.iterdir())) == 2


def test_a_crash_in_the_first_save_does_not_block_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = artifacts._replace

    def crash(path: Path, data: bytes) -> None:
        if path.name == "artifact.json":
            raise KeyboardInterrupt
        whole(path, data)

    monkeypatch.setattr(artifacts, "_replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_direction(made.direction(), tmp_path / "d")
    with pytest.raises(ArtifactError, match=r"artifact\.json is missing"):
        load_direction(tmp_path / "d")
    monkeypatch.undo()
    save_direction(made.direction(), tmp_path / "d")
    assert_same(load_direction(tmp_path / "d"), made.direction())


def test_a_full_disk_leaves_the_old_one_and_no_scraps(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*: No space left on device"):
        save_direction(made.direction(1), saved)
    monkeypatch.undo()
    assert_same(load_direction(saved), made.direction())
    assert len(list(saved.iterdir())) == 2


def other_things(folder: Path, what: str) -> None:
    if what == "a file":
        folder.write_text("precious")
        return
    folder.mkdir()
    if what == "somebody's folder":
        (folder / "notes.txt").write_text("precious")
    elif what == "somebody's artifact.json":
        (folder / "artifact.json").write_text('{"name": "precious"}')
    elif what == "another tool's artifact.json of that kind":
        (folder / "artifact.json").write_text('{"kind": "direction"}')
    elif what == "an unreadable artifact.json":
        (folder / "artifact.json").write_bytes(b"\xff precious")
    elif what == "an artifact of another kind":
        save_artifact(folder, "dataset", {"x": np.zeros(2, np.float32)}, {})


@pytest.mark.parametrize(
    "what",
    [
        "a file",
        "somebody's folder",
        "somebody's artifact.json",
        "another tool's artifact.json of that kind",
        "an unreadable artifact.json",
        "an artifact of another kind",
    ],
)
def test_what_is_not_ours_is_never_overwritten(tmp_path: Path, what: str) -> None:
    place = tmp_path / "d"
    other_things(place, what)
    before = {path: path.read_bytes() for path in [place, *place.glob("*")] if path.is_file()}
    with pytest.raises(ArtifactError, match="is no Steerwell direction; choose another place or remove it"):
        save_direction(made.direction(), place)
    assert {path: path.read_bytes() for path in [place, *place.glob("*")] if path.is_file()} == before


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert_same(load_direction(save_direction(made.direction(), tmp_path / "d")), made.direction())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        save_direction(made.direction(), tmp_path / "file" / "d")


def test_the_wrong_kind(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="kind 'direction', expected 'dataset'; give the folder of a dataset"):
        load_artifact(saved, "dataset")


@pytest.mark.parametrize(("schema", "fix"), [(2, "update steerwell"), (0, "fit it anew"), ("1", "fit it anew")])
def test_another_schema(saved: Path, schema: object, fix: str) -> None:
    resign(saved, manifest_of(saved) | {"schema": schema})
    with pytest.raises(ArtifactError, match=f"schema {schema!r}, expected 1; {fix}"):
        load_direction(saved)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"artifact\.json is missing; make one with 'steerwell fit -o'"):
        load_direction(tmp_path / "nowhere")


def test_no_tensor_file(saved: Path) -> None:
    tensors_of(saved).unlink()
    with pytest.raises(ArtifactError, match=r"tensors-\w+\.safetensors is missing"):
        load_direction(saved)


def test_a_truncated_tensor_file(saved: Path) -> None:
    file = tensors_of(saved)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match="is truncated or altered; fit it anew"):
        load_direction(saved)


def test_an_edited_manifest(saved: Path) -> None:
    """A statistic that somebody changed by hand would steer with another strength than was measured."""
    manifest = manifest_of(saved)
    manifest["content"]["calibration"][1]["mu_aligned"] = 2.4
    (saved / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"artifact\.json is altered"):
        load_direction(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tensors_that_are_not_finite(saved: Path, value: float) -> None:
    vectors = made.direction().vectors.copy()
    vectors[1, 2] = value
    replace_tensors(saved, save_tensors({"vectors": vectors, "mean_difference": vectors}))
    with pytest.raises(ArtifactError, match="holds NaN or infinity"):
        load_direction(saved)


def test_the_wrong_width(saved: Path) -> None:
    narrow = made.direction(model=made.model_info(d_model=5)).vectors
    replace_tensors(saved, save_tensors({"vectors": narrow, "mean_difference": narrow}))
    with pytest.raises(ArtifactError, match=r"vectors: got shape \(3, 5\); the model needs .*\(3, 6\)"):
        load_direction(saved)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_the_wrong_dtype(saved: Path, dtype: type) -> None:
    vectors = made.direction().vectors.astype(dtype)
    replace_tensors(saved, save_tensors({"vectors": vectors, "mean_difference": vectors}))
    with pytest.raises(ArtifactError, match="expected float32"):
        load_direction(saved)


def test_a_dtype_that_numpy_does_not_know(saved: Path) -> None:
    header = json.dumps({"vectors": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    replace_tensors(saved, struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ArtifactError, match=r"is damaged: .*BF16"):
        load_direction(saved)


@pytest.mark.parametrize("raw", [b"", b"\x00" * 8, b"not tensors at all", struct.pack("<Q", 2**60)])
def test_tensors_that_are_none(saved: Path, raw: bytes) -> None:
    replace_tensors(saved, raw)
    with pytest.raises(ArtifactError, match="is damaged"):
        load_direction(saved)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", ".", "..", "a\0b", 7, None])
def test_a_manifest_names_files_of_its_own_folder_only(saved: Path, name: object) -> None:
    (saved.parent / "secret").write_bytes(tensors_of(saved).read_bytes())
    manifest = manifest_of(saved)
    manifest["tensors"]["file"] = name
    resign(saved, manifest)
    with pytest.raises(ArtifactError):
        load_direction(saved)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"d_model": 8}, "d_model"), ({"signature": (1.0, 1.0, 1.0, 1.0)}, "same shape but other weights")],
)
def test_a_loaded_direction_knows_its_model(saved: Path, changes: dict, told: str) -> None:
    with pytest.raises(ModelMismatchError, match=told):
        load_direction(saved).model.require_same(made.model_info(**changes), "direction 'made'")


@FUZZ
@given(data=st.data())
def test_any_damaged_byte_gives_the_saved_direction_or_an_error(saved: Path, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from([saved / "artifact.json", tensors_of(saved)]))
    whole = target.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.binary(min_size=1, max_size=1))
    damaged = {
        "flip": whole[:at] + byte + whole[at + 1 :],
        "cut": whole[:at] + whole[at + 1 :],
        "truncate": whole[:at],
        "insert": whole[:at] + byte + whole[at:],
    }[data.draw(st.sampled_from(["flip", "cut", "truncate", "insert"]))]
    try:
        target.write_bytes(damaged)
        got = load_direction(saved)
    except ArtifactError:
        pass
    else:
        assert_same(got, made.direction())
    finally:
        target.write_bytes(whole)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Every place of a JSON value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in below for place in places(item, (*at, key)))]


def put(value: Any, place: tuple, new: Any) -> Any:
    """The value with `new` at a place; `DROP` removes what stands there."""
    if not place:
        return new
    copy, (key, *rest) = value.copy(), place
    copy[key] = put(copy[key], tuple(rest), new)
    if copy[key] is DROP:
        del copy[key]
    return copy


DROP = object()
EXAMPLE = {
    "schema": 1,
    "kind": "direction",
    "tensors": {"file": "", "sha256": ""},
    "content": dict.fromkeys(FIELDS, "")
    | {
        "model": dict.fromkeys(("name", "architecture", "config_hash", "d_model", "n_layers"), ""),
        "calibration": [dict.fromkeys(made.calibration().__dataclass_fields__, 0.0)],
    },
}
FREE_TEXT = {"concept", "concept_hash", "method", "name", "architecture", "config_hash"}
WRONG = [
    (place, value)
    for place in places(EXAMPLE)
    if place and not isinstance(place[-1], int)
    for value in (DROP, None, True, [["x"]], {"x": 1}, "x")
    if not (value == "x" and place[-1] in FREE_TEXT)
    and not (value == {"x": 1} and place[-1] == "provenance")
    and not (value is None and place[-1] == "split_half")  # null says: not known
]


@pytest.mark.parametrize(("place", "value"), WRONG)
def test_every_field_must_stand_and_be_of_its_type(saved: Path, place: tuple, value: Any) -> None:
    """The checksums fit here, so that each field's own check is put to the test."""
    resign(saved, put(manifest_of(saved), place, value))
    with pytest.raises(ArtifactError) as told:
        load_direction(saved)
    assert "\n" not in str(told.value)


FOREIGN = [DROP, None, True, 0, -1, 1.5, 1e400, math.nan, 10**400, "", "1", "x", "\ud800", [], [[]], {}, {"a": 1}]


@FUZZ
@given(data=st.data())
def test_altered_json_gives_a_direction_or_an_error(saved: Path, data: st.DataObject) -> None:
    text = (saved / "artifact.json").read_bytes()
    manifest = json.loads(text)
    for _ in range(data.draw(st.integers(1, 3))):
        manifest = put(manifest, data.draw(st.sampled_from(places(manifest)[1:])), data.draw(st.sampled_from(FOREIGN)))
    try:
        resign(saved, manifest)
        assert isinstance(load_direction(saved), Direction)
    except ArtifactError as error:
        assert "\n" not in str(error)  # noqa: PT017 - one line, for people
    finally:
        (saved / "artifact.json").write_bytes(text)


@pytest.mark.parametrize("text", ["", "null", "[]", "7", '"x"', "{", "[" * 100_000, '{"schema": 1e400}', "NaN"])
def test_a_manifest_that_is_none(saved: Path, text: str) -> None:
    (saved / "artifact.json").write_text(text)
    with pytest.raises(ArtifactError, match="damaged"):
        load_direction(saved)


def files_of(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "artifact.json").read_bytes(), tensors_of(folder).read_bytes()


def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, opening any file is an error."""

    def touched(*arguments: object, **options: object) -> None:
        raise AssertionError(f"touched the file system: {arguments}")

    for name in ("open", "read_bytes", "read_text", "stat"):
        monkeypatch.setattr(Path, name, touched)
    monkeypatch.setattr("builtins.open", touched)


def test_a_direction_is_read_from_bytes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, tensors = files_of(saved)
    no_files(monkeypatch)
    assert_same(read_direction(manifest, tensors), made.direction())


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", "a\0b", "tensors.safetensors", "\ud800\n"])
def test_the_file_name_in_given_bytes_is_not_used(saved: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tensors = tensors_of(saved).read_bytes()
    manifest = manifest_of(saved)
    manifest["tensors"]["file"] = name
    resign(saved, manifest)
    text = (saved / "artifact.json").read_bytes()
    no_files(monkeypatch)
    assert_same(read_direction(text, tensors), made.direction())
    with pytest.raises(ArtifactError, match="is truncated or altered") as told:
        read_direction(text, tensors[:-7])
    str(told.value).encode()  # a message that can be sent
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("place", "value"), WRONG)
def test_every_field_of_given_bytes_must_stand_and_be_of_its_type(saved: Path, place: tuple, value: Any) -> None:
    tensors = tensors_of(saved).read_bytes()
    resign(saved, put(manifest_of(saved), place, value))
    if place == ("tensors", "file") and value == "x":
        return  # not used
    with pytest.raises(ArtifactError, match="the given direction"):
        read_direction((saved / "artifact.json").read_bytes(), tensors)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"schema": 1e400}', b"9" * 5000]
)
def test_given_bytes_that_are_no_manifest(text: bytes) -> None:
    with pytest.raises(ArtifactError, match="the given direction is damaged"):
        read_direction(text, b"")


@FUZZ
@given(data=st.data())
def test_any_damaged_given_byte_gives_the_direction_or_an_error(saved: Path, data: st.DataObject) -> None:
    files = list(files_of(saved))
    which, byte = data.draw(st.integers(0, 1)), data.draw(st.binary(max_size=1))
    whole = files[which]
    at = data.draw(st.integers(0, len(whole) - 1))
    files[which] = whole[:at] + byte + whole[at + 1 :]
    try:
        got = read_direction(*files)
    except ArtifactError:
        return
    assert_same(got, made.direction())


@pytest.mark.parametrize("text", ["\ud800", "two\nlines", "a\0b", "\x1b[2J"])
def test_names_can_be_printed(saved: Path, text: str) -> None:
    """They stand in messages, pages and labels."""
    resign(saved, put(manifest_of(saved), ("content", "concept"), text))
    with pytest.raises(ArtifactError, match="expected text of one line that can be printed") as told:
        load_direction(saved)
    str(told.value).encode()
