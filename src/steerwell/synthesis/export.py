"""A data set on disk: Parquet files that `datasets.load_dataset(folder)` loads, and a card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from steerwell.core.artifacts import write_atomic
from steerwell.core.errors import ArgumentError, ArtifactError, MissingDependencyError
from steerwell.synthesis.card import card
from steerwell.synthesis.examples import Example
from steerwell.synthesis.files import to_rows
from steerwell.synthesis.leaks import leaks_between
from steerwell.synthesis.near import NEAR, Near

CARD, DATA = "README.md", "data"
_OURS = "- steerwell\n"  # a tag in the card of every folder written here
_WRITTEN = re.compile(rf"{CARD}|\.{CARD}\..*|{DATA}/(\w+\.parquet|\.\w+\.parquet\.unfinished)")  # also by a stopped one
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_KINDS = {"label": "int64", "seed": "int64", "tokens_edited": "double", "success": "double", "coherence": "double"}


def export(
    splits: Mapping[str, Sequence[Example]],
    folder: str | Path,
    *,
    title: str,
    about: Mapping[str, Any],
    near: Near | None = NEAR,
) -> Path:
    """Write `folder`/data/<split>.parquet and its card; an earlier export there is replaced, anything else is not.

    Empty splits are left out. The card is written last: a folder without one is unfinished.

    Args:
        title: the data set's name.
        about: what the card cannot count: `licence`, `language`, `made` (sampling ...), `quality`, `dropped`.
        near: near-duplicates to look for between splits; None: none, and the card says so.

    Raises:
        ArgumentError: no examples, or the splits leak; the message says what they share.
        ArtifactError: the place holds something else, or cannot be written.
        MissingDependencyError: pyarrow is not installed.
    """
    place, full = Path(folder), {name: part for name, part in splits.items() if len(part)}
    if wrong := [name for name in splits if not _NAME.fullmatch(name)]:
        raise ArgumentError(f"splits: got the name {wrong[0]!r}; expected small letters, such as 'train'")
    if not full:
        raise ArgumentError("splits: got no examples; expected at least one")
    if found := leaks_between(full, near=near):
        raise ArgumentError(f"splits: {'; '.join(found)}; make them with split(...), which keeps these together")
    files = {name: f"{DATA}/{name}.parquet" for name in full}
    text = card(full, files, title, about, near)
    _require_ours(place)
    try:
        (place / DATA).mkdir(parents=True, exist_ok=True)
        (place / CARD).unlink(missing_ok=True)
        for stale in (place / DATA).iterdir():
            stale.unlink()
        for name, part in full.items():
            write_examples(place / files[name], part)
        write_atomic(place / CARD, text)
    except OSError as error:
        raise ArtifactError(f"cannot write {place}: {error.strerror or error}") from error
    return place


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """One Parquet file in our own columns, whole or not at all; NaN is null, and types do not depend on the values."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "synthesis") from error
    schema = pa.schema([(field.name, _KINDS.get(field.name, "string")) for field in fields(Example)])
    table = pa.Table.from_pylist(to_rows(examples), schema=schema)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        pq.write_table(table, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _require_ours(place: Path) -> None:
    """Raise unless the place is free, or holds an earlier export, or what a stopped one left."""
    if not place.exists():
        return
    files = [file.relative_to(place).as_posix() for file in place.rglob("*") if not file.is_dir()]
    try:
        named = CARD not in files or _OURS in (place / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        named = False
    ours = place.is_dir() and all(_WRITTEN.fullmatch(file) for file in files)
    if not (ours and named):
        raise ArtifactError(f"{place} exists and is no data set of Steerwell's; choose another place or remove it")
