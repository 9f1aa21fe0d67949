"""Labelled files and what is in them: any JSONL, JSON, CSV or Parquet table, a Hugging Face data set, our own export.

A table is a list of rows; a row maps column names to values. Our own columns are the fields of `Example`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from steerwell.core.artifacts import finite
from steerwell.core.errors import ArgumentError, MissingDependencyError, UnknownNameError
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example

Row = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PAIRS = (("0", "1"), ("false", "true"), ("no", "yes"))  # (benign, violating): labels that say which is which
_FIELDS = fields(Example)
_OWN = frozenset(field.name for field in _FIELDS)
_NUMBERS = ("tokens_edited", "success", "coherence")
_CELL = 1 << 30  # longest text in a CSV file; the csv module's own limit is 128 KiB
_SHOWN, _CUT = 8, 60  # values, and characters of one, that an error shows


def read_table(path: Path) -> list[Row]:
    """Rows of a file. The ending says what it is: .jsonl, .json (a list, or one object per line), .csv, .tsv, .parquet.

    A row lacks the columns that its line lacks; CSV values are text, "" where a cell is empty.

    Raises:
        ArgumentError: no such file, an unknown ending, no rows, or a line that cannot be read (the message names it).
        MissingDependencyError: Parquet without pyarrow.
    """
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"file {path}: ends in {path.suffix!r}; expected one of {', '.join(FORMATS)}")
    try:
        rows = _parquet(path) if path.suffix.lower() == ".parquet" else _text(path)
    except OSError as error:
        raise ArgumentError(f"file {path}: cannot be read: {error.strerror or error}") from error
    if not rows:
        raise ArgumentError(f"file {path}: holds no rows; expected at least one")
    return rows


def column(rows: Sequence[Row], name: str, where: str) -> list[Any]:
    """One column's values, None where a row lacks it; `where` names the file in the error.

    Raises:
        ArgumentError: no row has this column; the message lists those there are.
    """
    known = _columns(rows)
    if name not in known:
        raise ArgumentError(f"{where}: {UnknownNameError('column', name, known)}")
    return [row.get(name) for row in rows]


def read_examples(
    source: str | Path,
    *,
    text_col: str = "response",
    label_col: str = "label",
    prompt_col: str | None = None,
    positive: Any = None,
    template_col: str | None = None,
    split: str | None = None,
) -> list[Example]:
    """Labelled examples from a file, a folder that `export` wrote, or a Hugging Face data set.

    Rows in our own columns come back whole (source, configuration, scores ...) when neither the columns nor `positive`
    are given. All others become `original` examples.

    Args:
        source: a path, or a data set's name on the hub ("owner/name", "owner/name:configuration").
        text_col: column of the response.
        label_col: column of the label.
        prompt_col: column of the prompt; None: there is none.
        positive: the label, or a list of the labels, that means "violating"; every other value is benign. None: the
            labels are 0/1, false/true or no/yes, and the second of them is violating.
        template_col: column that names the prompt's template; None: not known.
        split: "train", "test" ... of a folder or a data set; None: the only one there is; "all": all of them.

    Raises:
        ArgumentError: nothing there, an unknown column or split, a label that leaves doubt (the message lists all that
            were found), or rows without label or response: they are counted, never dropped.
        MissingDependencyError: a data set's name without the `datasets` library.
    """
    where = str(source)
    rows = _rows(source, split)
    plain = (text_col, label_col, positive, template_col) == ("response", "label", None, None)
    if plain and prompt_col in (None, "prompt") and set(_columns(rows)) >= _OWN:
        return from_rows(rows, where)
    texts = [_words(value, "response", where) for value in column(rows, text_col, where)]
    values = column(rows, label_col, where)
    _require_full(where, {text_col: [not text.strip() for text in texts], label_col: list(map(_missing, values))})
    found = _labels(values, positive, f"{where}: column {label_col!r}")
    blank = [""] * len(rows)
    prompts, templates = (
        blank if name is None else [_words(value, name, where) for value in column(rows, name, where)]
        for name in (prompt_col, template_col)
    )
    return [
        Example(prompt, text, label, template=template)
        for prompt, text, label, template in zip(prompts, texts, found, templates, strict=True)
    ]


def to_rows(examples: Iterable[Example]) -> list[Row]:
    """Examples as rows of JSON values, one column per field; None for NaN. `from_rows` reads them back."""
    return [finite({field.name: getattr(example, field.name) for field in _FIELDS}) for example in examples]


def from_rows(rows: Sequence[Row], where: str = "rows") -> list[Example]:
    """Rows in our own columns as examples. Other columns are left out; a field that a row lacks has its default.

    Raises:
        ArgumentError: a row without prompt, response or label, or with a value that its field cannot hold.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(Example(**{field.name: _value(row, field.name, field.default) for field in _FIELDS}))
        except (TypeError, ValueError, LookupError) as error:
            raise ArgumentError(f"{where}: row {number}: {error}") from error
    return examples


def _text(path: Path) -> list[Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # every line ending as it stands
    except UnicodeDecodeError as error:
        raise ArgumentError(f"file {path}: is no UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if path.suffix.lower() in (".csv", ".tsv"):
        return _separated(path, text)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return [_mapping(row, path, f"entry {number}") for number, row in enumerate(_parse(text, path), start=1)]
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: U+2028 may stand inside a JSON text
    return [_mapping(_parse(line, path, number), path, f"line {number}") for number, line in lines if line.strip()]


def _parse(text: str, path: Path, line: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentError(
            f"file {path}: line {line or error.lineno} is no JSON ({error.msg}); expected one object per line"
            " (.jsonl, .json) or a list of objects (.json)"
        ) from error


def _mapping(row: Any, path: Path, where: str) -> Row:
    if not isinstance(row, dict):
        raise ArgumentError(f"file {path}: {where} is {type(row).__name__}; expected an object of columns")
    return row


def _separated(path: Path, text: str) -> list[Row]:
    before = csv.field_size_limit(_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), "excel-tab" if path.suffix.lower() == ".tsv" else "excel")
        head = next(reader, [])
        if len(set(head)) < len(head):
            raise ArgumentError(f"file {path}: a column's name stands twice in its first line: {', '.join(head)}")
        rows = []
        for cells in reader:
            if len(cells) != len(head) and cells:
                raise ArgumentError(
                    f"file {path}: the row that ends in line {reader.line_num} has {len(cells)} cells; expected"
                    f" {len(head)} ({', '.join(head)}); put text that holds commas or quotes in quotes"
                )
            if cells:
                rows.append(dict(zip(head, cells, strict=True)))
    except csv.Error as error:
        raise ArgumentError(f"file {path}: line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "synthesis") from error
    try:
        rows: list[Row] = pq.ParquetFile(path).read().to_pylist()
    except pa.ArrowException as error:
        raise ArgumentError(f"file {path}: is no Parquet file that can be read: {error}") from error
    return rows


def _rows(source: str | Path, split: str | None) -> list[Row]:
    path = Path(source)
    if path.is_dir():
        found = {file.stem: file for file in sorted((path / "data").glob("*.parquet"))}
        if not found:
            raise ArgumentError(f"folder {path}: has no data/*.parquet; give a file, or a folder written by an export")
        return [row for name in _chosen(list(found), split, str(path)) for row in read_table(found[name])]
    if path.exists() or path.suffix.lower() in FORMATS or path.is_absolute() or str(source).startswith("."):
        if split is not None:
            raise ArgumentError(f"split: got {split!r}, but {path} is one file without splits; leave it out")
        return read_table(path)
    return _hub(str(source), split)


def _chosen(found: list[str], split: str | None, where: str) -> list[str]:
    if split == "all" or (split is None and len(found) == 1):
        return found
    if split is None:
        raise ArgumentError(f"{where}: has the splits {', '.join(found)}; say which one with split, or split='all'")
    if split not in found:
        raise ArgumentError(f"{where}: {UnknownNameError('split', split, found)}")
    return [split]


def _hub(name: str, split: str | None) -> list[Row]:
    """Rows of a data set by name; a label that has names there comes as its name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "synthesis") from error
    path, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, gated, no such configuration
        reason = str(error).partition("\n")[0]
        raise ArgumentError(f"source: {name!r} is no file here, and as a data set's name: {reason}") from error
    rows = []
    for part in _chosen(list(loaded), split, name):
        named = {key: kind for key, kind in loaded[part].features.items() if isinstance(kind, datasets.ClassLabel)}
        for row in loaded[part]:
            given = {key: kind.int2str(row[key]) for key, kind in named.items() if row[key] not in (None, -1)}
            rows.append({**row, **dict.fromkeys(named), **given})
    return rows


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _words(value: object, name: str, where: str) -> str:
    if value is None or value != value:  # NaN: what pandas writes for an empty cell
        return ""
    if not isinstance(value, str):
        raise ArgumentError(f"{where}: column {name!r} holds {type(value).__name__} ({value!r}); expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{where}: column {name!r} holds half a character ({value[:_CUT]!r}); mend it") from error
    return value


def _require_full(where: str, faults: Mapping[str, Sequence[bool]]) -> None:
    told = []
    for name, bad in faults.items():
        if lines := [str(number) for number, is_bad in enumerate(bad, start=1) if is_bad]:
            more = ", ..." if len(lines) > _SHOWN else ""
            told.append(
                f"{len(lines)} of {len(bad)} rows have nothing in {name!r} (rows {', '.join(lines[:_SHOWN])}{more})"
            )
    if told:
        raise ArgumentError(f"{where}: {'; '.join(told)}; fill them in or remove those rows")


def _spelled(value: object) -> str:
    """A label as text: 1, 1.0, True and " Yes" as "1", "1", "true" and "yes"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().casefold()
    return text[0] if text in ("0.0", "1.0") else text


def _labels(values: Sequence[object], positive: Any, where: str) -> list[int]:
    spelled = [_spelled(value) for value in values]
    counts = Counter(spelled)
    listed = ", ".join(f"{value!r} ({count})" for value, count in counts.most_common(_SHOWN))
    listed += f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    if positive is not None:
        several = isinstance(positive, Iterable) and not isinstance(positive, str)
        wanted = {_spelled(value) for value in (positive if several else [positive])}
        if not wanted or wanted - set(counts):
            raise ArgumentError(f"{where}: positive={positive!r} is no label here; found {listed}")
        return [VIOLATING if value in wanted else BENIGN for value in spelled]
    known = next((pair for pair in PAIRS if set(counts) <= set(pair)), None)
    if known is None:
        raise ArgumentError(
            f"{where}: holds {listed}; expected 0/1, false/true or no/yes (the second is violating), or say with"
            " positive which of them is violating"
        )
    return [known.index(value) for value in spelled]


def _value(row: Row, name: str, default: Any) -> Any:
    value: Any = row.get(name)
    if _missing(value):
        if default is MISSING and name not in row:
            raise ArgumentError(f"has no {name!r}; expected the columns of Example: prompt, response, label, ...")
        if name == "label":
            raise ArgumentError("has no label; expected 0 or 1")
        return "" if default is MISSING else default
    if name == "label":
        return _labels([value], None, "label")[0]
    if name in _NUMBERS:
        return float(value)
    if name == "seed":
        return int(value)
    return _words(value, name, "example")
