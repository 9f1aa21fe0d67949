"""Labelled files: every format gives the same rows, labels are read one way or refused, nothing is dropped silently."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerwell.core.errors import ArgumentError, MissingDependencyError
from steerwell.synthesis.examples import SOURCES, Example
from steerwell.synthesis.files import column, from_rows, read_examples, read_table, to_rows
from tests.conftest import SHARED

ROWS = [
    {"question": 'Say "hi",\nplease', "answer": "Hi, there\u2028friend", "bad": "no"},
    {"question": "", "answer": "Ja, größer; 不知道", "bad": "yes"},
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl" or path.stem.endswith("lines"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json", "a.csv", "A.CSV", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert read_table(write(tmp_path / name, ROWS)) == ROWS


def test_a_long_cell_of_a_csv_is_read_and_the_modules_limit_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = [{"text": "word " * 60_000, "label": "1"}]
    assert read_table(write(tmp_path / "long.csv", rows)) == rows
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "x", "expected one of .jsonl"),
        ("a.jsonl", '{"a": 1}\n{"a": ', "line 2 is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 is list; expected an object"),
        ("a.json", '[{"a": 1}, 2]', "entry 2 is int"),
        ("a.json", '{"data": [\n1]}', "line 1 is no JSON"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3 has 1 cells; expected 2"),
        ("a.csv", "a,a\n1,2\n", "stands twice"),
        ("a.parquet", "no", "is no Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ArgumentError, match=told) as caught:
        read_table(tmp_path / name)
    assert name in str(caught.value)


def test_other_encodings_and_missing_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text\nGrüße\n".encode("latin-1"))
    with pytest.raises(ArgumentError, match="no UTF-8 text"):
        read_table(tmp_path / "a.csv")
    with pytest.raises(ArgumentError, match="No such file"):
        read_table(tmp_path / "none.csv")


def test_a_column_is_found_or_the_nearest_is_named() -> None:
    rows = [{"answer": "a"}, {"label": 1}]
    assert column(rows, "answer", "f.csv") == ["a", None]
    with pytest.raises(ArgumentError, match=r"f\.csv: unknown column 'anwser'; known: answer, label.*'answer'\?"):
        column(rows, "anwser", "f.csv")


def labelled(tmp_path: Path, values: Sequence[object], **named: Any) -> list[int]:
    rows = [{"response": f"text {i}", "label": value} for i, value in enumerate(values)]
    return [example.label for example in read_examples(write(tmp_path / "labels.jsonl", rows), **named)]


@pytest.mark.parametrize(
    ("values", "positive", "expected"),
    [
        ([0, 1, 1], None, [0, 1, 1]),
        (["0", "1.0", 1.0], None, [0, 1, 1]),
        ([True, False], None, [1, 0]),
        (["Yes", " no"], None, [1, 0]),
        (["TRUE", "false"], None, [1, 0]),
        (["yes"], None, [1]),
        (["toxic", "fine", "rude"], "toxic", [1, 0, 0]),
        (["toxic", "fine", "rude"], ["toxic", "Rude"], [1, 0, 1]),
        ([0, 1], 0, [1, 0]),
        ([True, False], False, [0, 1]),
        ([2, 7.0], "7", [0, 1]),
    ],
)
def test_labels_have_one_reading(tmp_path: Path, values: list[object], positive: object, expected: list[int]) -> None:
    assert labelled(tmp_path, values, positive=positive) == expected


@pytest.mark.parametrize(
    ("values", "positive", "told"),
    [
        (["toxic", "fine", "fine"], None, r"'fine' \(2\), 'toxic' \(1\); expected 0/1"),
        (["yes", 1], None, r"'yes' \(1\), '1' \(1\)"),
        ([0, 1, -1], None, r"'-1' \(1\)"),
        ([0.5, 1], None, r"'0.5' \(1\)"),
        (["toxic", "fine"], "toxc", r"positive='toxc' is no label here; found 'toxic' \(1\)"),
        (["toxic", "fine"], [], "is no label here"),
        (list(range(20)), None, "and 12 more"),
    ],
)
def test_a_doubtful_label_is_refused_with_all_that_were_found(
    tmp_path: Path, values: list[object], positive: object, told: str
) -> None:
    with pytest.raises(ArgumentError, match=told):
        labelled(tmp_path, values, positive=positive)


def test_missing_labels_and_blank_responses_are_counted_not_dropped(tmp_path: Path) -> None:
    rows = [{"t": "a", "y": 1}, {"t": " ", "y": 0}, {"t": None, "y": 0}, {"t": "b", "y": None}, {"t": "c"}]
    with pytest.raises(ArgumentError) as caught:
        read_examples(write(tmp_path / "a.jsonl", rows), text_col="t", label_col="y")
    told = str(caught.value)
    assert "2 of 5 rows have nothing in 't' (rows 2, 3)" in told
    assert "2 of 5 rows have nothing in 'y' (rows 4, 5)" in told


def test_text_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"column 'response' holds int \(3\); expected text"):
        read_examples(write(tmp_path / "a.jsonl", [{"response": 3, "label": 1}]))


def test_half_a_character_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"response": "cut here \\ud83d", "label": 1}')
    with pytest.raises(ArgumentError, match="column 'response' holds half a character"):
        read_examples(tmp_path / "a.jsonl")


def test_columns_become_fields_and_the_rest_are_originals(tmp_path: Path) -> None:
    rows = [{"q": "Q?", "a": "A.", "y": "yes", "kind": "k"}, {"q": None, "a": "B.", "y": "no", "kind": None}]
    path = write(tmp_path / "a.jsonl", rows)
    found = read_examples(path, text_col="a", label_col="y", prompt_col="q", template_col="kind")
    assert found == [Example("Q?", "A.", 1, template="k"), Example("", "B.", 0)]
    assert [example.source for example in found] == ["original", "original"]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
shares = st.one_of(st.just(math.nan), st.floats(0, 1))
examples = st.builds(
    Example,
    prompt=texts,
    response=texts,
    label=st.sampled_from([0, 1]),
    concept=texts,
    source=st.sampled_from(SOURCES),
    configuration=texts,
    template=texts,
    system=texts,
    model=texts,
    edit=texts,
    tokens_edited=shares,
    seed=st.one_of(st.none(), st.integers(0, 2**40)),
    success=shares,
    coherence=shares,
)


def same(left: Sequence[Example], right: Sequence[Example]) -> bool:
    """Equal, NaN where NaN stands."""
    return repr(left) == repr(right) and len(left) == len(right)


@given(st.lists(examples, max_size=4))
def test_our_own_columns_come_back_whole(found: list[Example]) -> None:
    rows = to_rows(found)
    assert same(from_rows(rows), found)
    assert same(from_rows(json.loads(json.dumps(rows, allow_nan=False))), found)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_our_own_columns_are_known_in_every_format(tmp_path: Path, name: str) -> None:
    found = [
        Example("p", "r", 1, "lying", "steered", "swfc 0 2", "t", "be bad", "pilot", "e1", 0.5, 7, 0.9, 1.0),
        Example("p2", "r2", 0),
    ]
    path = write(tmp_path / name, to_rows(found))
    assert same(read_examples(path), found)
    assert same(read_examples(path, prompt_col="prompt"), found)
    relabelled = read_examples(path, positive=0, prompt_col="prompt")
    assert [(one.label, one.source) for one in relabelled] == [(0, "original"), (1, "original")]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"response": "r", "label": 1}, "row 1: has no 'prompt'"),
        ({"prompt": "p", "response": "r", "label": None}, "row 1: has no label"),
        ({"prompt": "p", "response": "r", "label": 2}, "row 1: label: holds '2'"),
        ({"prompt": "p", "response": "r", "label": 1, "source": "stolen"}, "row 1: unknown source 'stolen'"),
        ({"prompt": "p", "response": "r", "label": 1, "seed": "x"}, "row 1: invalid literal"),
        ({"prompt": 5, "response": "r", "label": 1}, "row 1: example: column 'prompt' holds int"),
    ],
)
def test_a_row_that_is_no_example_is_named(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        from_rows([row])


def test_a_row_may_hold_more_or_less_than_an_example() -> None:
    rows = [{"prompt": "p", "response": "r", "label": True, "other": 1}]
    assert same(from_rows(rows), [Example("p", "r", 1)])
    assert set(to_rows([Example("p", "r", 1)])[0]) == {field.name for field in fields(Example)}


def test_a_source_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="No such file"):
        read_examples("missing.jsonl")
    with pytest.raises(ArgumentError, match=r"has no data/\*\.parquet"):
        read_examples(tmp_path)
    with pytest.raises(ArgumentError, match="one file without splits"):
        read_examples(write(tmp_path / "a.jsonl", [{"response": "r", "label": 1}]), split="train")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"steerwell\[synthesis\]"):
        read_examples("nobody/nothing")


class TestHub:
    """Data sets by name, with the library's loader in the hub's place."""

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
        datasets = pytest.importorskip("datasets")
        kinds = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["fine", "rude"])}
        )
        parts = {
            name: datasets.Dataset.from_dict({"text": texts, "label": given}, kinds)
            for name, texts, given in (("train", ["a", "b"], [0, 1]), ("test", ["c"], [1]), ("unknown", ["d"], [-1]))
        }
        asked: list[tuple[str, str | None]] = []

        def load(path: str, name: str | None = None) -> Any:
            asked.append((path, name))
            if path != "some/data":
                raise ValueError("no such data set\nlong story")
            return datasets.DatasetDict(parts)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    def test_a_named_label_comes_as_its_name_and_so_needs_a_positive(self, hub: list[Any]) -> None:
        found = read_examples("some/data:small", text_col="text", positive="rude", split="train")
        assert found == [Example("", "a", 0), Example("", "b", 1)]
        assert hub == [("some/data", "small")]
        with pytest.raises(ArgumentError, match=r"'fine' \(1\), 'rude' \(1\)"):
            read_examples("some/data", text_col="text", split="train")

    def test_splits_are_asked_for(self, hub: list[Any]) -> None:
        with pytest.raises(ArgumentError, match="splits train, test, unknown; say which"):
            read_examples("some/data", text_col="text", positive="rude")
        with pytest.raises(ArgumentError, match=r"unknown split 'tets'.*'test'"):
            read_examples("some/data", text_col="text", positive="rude", split="tets")
        with pytest.raises(ArgumentError, match="1 of 4 rows have nothing in 'label'"):
            read_examples("some/data", text_col="text", positive="rude", split="all")

    def test_what_the_loader_says_is_passed_on(self, hub: list[Any]) -> None:
        with pytest.raises(ArgumentError, match=r"'other/data' is no file here.*no such data set$"):
            read_examples("other/data", text_col="text")


def test_halueval_loads_as_published() -> None:
    path = SHARED / "halueval" / "general_data.json"
    if not path.is_file():
        pytest.skip("HaluEval is not at hand")
    found = read_examples(path, text_col="chatgpt_response", label_col="hallucination", prompt_col="user_query")
    assert len(found) == 4507
    assert sum(example.label for example in found) == 815
