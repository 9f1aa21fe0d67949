"""An exported folder loads with the real `datasets` library and with ours, and its card says what it must."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt

from steerwell.core.errors import ArgumentError, ArtifactError, UnknownNameError
from steerwell.synthesis.card import plain
from steerwell.synthesis.data import SPLITS, split
from steerwell.synthesis.examples import Example
from steerwell.synthesis.export import export, write_examples
from steerwell.synthesis.files import read_examples, read_table
from steerwell.synthesis.near import Near

NASTY = "evil | name\n# heading <script>alert(1)</script> [click](http://e.example) ![i](x) `code` **b** ---"


def examples(count: int = 60) -> list[Example]:
    """Originals and steered ones that share nothing; the steered ones violate."""
    found = []
    for number in range(count):
        prompt = f"question about {' '.join(f'p{number}x{word}' for word in range(8))}"
        response = " ".join(f"r{number}x{word}" for word in range(12))
        if number % 2:
            found.append(
                Example(prompt, response, 1, "lying", "steered", "swfc layer 0 strength 2", "", "Be bad.", "pilot")
            )
        else:
            found.append(Example(prompt, response, 0, "lying", success=math.nan, coherence=0.5, seed=number))
    return found


ABOUT = {
    "licence": "Apache-2.0",
    "language": "en",
    "made": {"sampling": "temperature 0.8, 60 tokens"},
    "quality": {"success": 0.91234567, "diversity": math.nan, "HM3": None},
    "dropped": {"near-duplicate": 3, "coherence too low": 2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(split(examples()), tmp_path / "set", title="Planted lies", about=ABOUT)


def test_the_datasets_library_loads_the_folder(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    parts = split(examples())
    assert {name: len(part) for name, part in loaded.items()} == {name: len(part) for name, part in parts.items()}
    for name, part in parts.items():
        assert loaded[name]["response"][:] == [one.response for one in part]
        assert loaded[name]["label"][:] == [one.label for one in part]
    assert loaded["test"].features == loaded["train"].features
    assert loaded["test"].features["success"] == datasets.Value("float64")  # though every value there is missing
    assert datasets.load_dataset(str(folder), split="all", cache_dir=str(tmp_path / "cache")).num_rows == 60


def test_ours_reads_back_what_was_written(folder: Path) -> None:
    for name, part in split(examples()).items():
        assert repr(read_examples(folder, split=name)) == repr(part)
    assert len(read_examples(folder, split="all")) == 60
    with pytest.raises(ArgumentError, match="has the splits test, train, validation; say which"):
        read_examples(folder)
    with pytest.raises(ArgumentError, match=r"unknown split 'dev'"):
        read_examples(folder, split="dev")


def test_the_cards_head_is_what_the_hub_expects(folder: Path) -> None:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["pretty_name"] == "Planted lies"
    assert front["license"] == "apache-2.0"
    assert front["language"] == "en"
    assert front["task_categories"] == ["text-classification"]
    assert front["size_categories"] == ["n<1K"]
    assert {"steerwell", "synthetic", "activation-steering"} <= set(front["tags"])
    files = front["configs"][0]["data_files"]
    assert files == [{"split": name, "path": f"data/{name}.parquet"} for name in SPLITS]
    assert body.startswith("# Planted lies\n")


def test_the_cards_tables_count(folder: Path) -> None:
    lines = (folder / "README.md").read_text().splitlines()
    for line in (
        "| train | original | 0 | 24 |",
        "| train | steered | 24 | 0 |",
        "| test | original | 0 | 3 |",
        "| all | all | 30 | 30 |",
        "| steered | swfc layer 0 strength 2 | pilot | 30 | 0 |",
        "Concepts: lying (60).",
        "- models: pilot (30)",
        "- seeds: 30 from 0 to 58",
        "- sampling: temperature 0.8, 60 tokens",
        "- success: 0.9123",
        "- diversity: not measured",
        "- HM3: not measured",
        "Dropped on the way: near-duplicate 3, coherence too low 2.",
        "Apache-2.0",
    ):
        assert line in lines, line


def test_the_card_warns_and_names_what_was_checked(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    for said in ("**Misuse warning.**", "**Intended use.**", "3-word shingles below 0.8", "60 rows have one"):
        assert said in text
    assert "r1x1" not in text  # no text of the data


def test_what_nobody_said_is_said_to_be_missing(tmp_path: Path) -> None:
    found = [Example("", "plain text", 1), Example("", "another text", 0)]
    text = (export({"train": found}, tmp_path / "set", title="Bare", about={}) / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other"
    assert front["tags"] == ["steerwell", "safety", "detection"]
    for line in (
        "Concepts: not stated.",
        "- models: not stated",
        "- seeds: not stated",
        "- sampling: not stated",
        "Configurations: not stated.",
        "Dropped on the way: not stated.",
        "Not measured.",
        "There is one split, so nothing can leak.",
        "not stated: ask whoever gave you this data before you use it",
    ):
        assert line in text.splitlines(), line


def test_nothing_dropped_is_said_as_such(tmp_path: Path) -> None:
    place = export({"train": examples(2)}, tmp_path / "set", title="x", about={"dropped": {}})
    assert "Dropped on the way: nothing." in (place / "README.md").read_text()


def test_no_name_breaks_the_card(tmp_path: Path) -> None:
    fields = {"concept": NASTY, "source": "prompted", "configuration": NASTY, "model": NASTY}
    found = [Example(f"p{i}", f"r{i}", i, **fields) for i in (0, 1)]
    about = {"licence": NASTY, "made": {NASTY: NASTY}, "quality": {NASTY: NASTY}, "dropped": {NASTY: 1}}
    text = (export({"train": found}, tmp_path / "set", title=NASTY, about=about) / "README.md").read_text()
    front = yaml.safe_load(text.split("\n---\n")[0])
    assert front["pretty_name"] == " ".join(NASTY.split())
    body = text.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or []]
    assert not [one for one in (*tokens, *inline) if one.type in ("html_block", "html_inline", "link_open", "image")]
    headings = [tokens[i + 1].content for i, one in enumerate(tokens) if one.type == "heading_open"]
    assert headings[1:] == ["Counts", "How it was made", "Quality", "Leaks", "Licence"]
    kinds = [one.type for one in tokens]
    rows = [kinds[i : kinds.index("tr_close", i)] for i, kind in enumerate(kinds) if kind == "tr_open"]
    assert [row.count("td_open") + row.count("th_open") for row in rows] == [4, 4, 4, 5, 5]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, "0.5"),
        (3, "3"),
        (None, "not measured"),
        ("a_b*c", r"a\_b\*c"),
        ("- x", r"\- x"),
        ("a\x00\nb", "a b"),
        ("http://x www.x", r"http\://x www\.x"),
        ("x" * 200, "x" * 159 + "…"),
    ],
)
def test_plain_names(value: object, expected: str) -> None:
    assert plain(value) == expected


def test_a_leak_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    one, *rest = examples()
    with pytest.raises(ArgumentError, match=r"train and test share 1 prompts.*make them with split"):
        export({"train": [one, *rest], "test": [one]}, tmp_path / "set", title="x", about={})
    assert not (tmp_path / "set").exists()


def test_near_duplicates_that_nobody_looked_for_are_not_denied(tmp_path: Path) -> None:
    found = examples(4)
    almost = Example("other", found[0].response + " more", 0)
    with pytest.raises(ArgumentError, match="near-duplicate responses"):
        export({"train": found, "test": [almost]}, tmp_path / "set", title="x", about={}, near=Near(0.7))
    export({"train": found, "test": [almost]}, tmp_path / "set", title="x", about={}, near=None)
    assert "Near-duplicates were **not** looked for." in (tmp_path / "set" / "README.md").read_text()


def test_an_earlier_export_is_replaced_whole(folder: Path) -> None:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    (folder / "README.md").unlink()  # as a stopped export leaves it
    (folder / "data" / ".train.parquet.unfinished").write_text("half")
    export(split(examples()), folder, title="Planted lies", about=ABOUT)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    export({"train": examples()}, folder, title="One", about={})
    assert [file.name for file in (folder / "data").iterdir()] == ["train.parquet"]


@pytest.mark.parametrize("file", ["notes.txt", "README.md", "data/other.csv"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, file: str) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / file).write_text("mine")
    with pytest.raises(ArtifactError, match="is no data set of Steerwell's"):
        export({"train": examples(4)}, tmp_path / "set", title="x", about={})
    assert (tmp_path / "set" / file).read_text() == "mine"
    with pytest.raises(ArtifactError, match="is no data set of Steerwell's"):
        export({"train": examples(4)}, tmp_path / "set" / file, title="x", about={})


def test_wrong_names_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no examples"):
        export({"train": []}, tmp_path / "set", title="x", about={})
    with pytest.raises(ArgumentError, match=r"the name '\.\./x'"):
        export({"../x": examples(2)}, tmp_path / "set", title="x", about={})
    with pytest.raises(UnknownNameError, match=r"'license'.*'licence'"):
        export({"train": examples(2)}, tmp_path / "set", title="x", about={"license": "MIT"})
    assert not (tmp_path / "set").exists()


def test_one_file_of_examples(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.parquet", examples(3))
    assert [row["success"] for row in read_table(tmp_path / "a.parquet")] == [None] * 3
    assert str(pq.read_schema(tmp_path / "a.parquet").field("seed").type) == "int64"
    assert repr(read_examples(tmp_path / "a.parquet")) == repr(examples(3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]
