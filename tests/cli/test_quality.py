"""`steerwell quality` as a command."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from steerwell.apps.cli.quality import quality
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.scoring.quality import quality as measured

ROWS = [
    {
        "prompt": f"Question {row % 6}",
        "response": f"The answer to number {row} is {row * row}, which {'few' if row % 2 else 'many'} people know.",
        "success": row / 30,
        "coherence": 0.9,
        "configuration": ("weak", "strong")[row < 12],
    }
    for row in range(30)
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "answers.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "120")
    app = typer.Typer()
    app.command()(quality)

    def run(*words: object) -> Result:
        return CliRunner().invoke(app, [*map(str, words), "--embedder", "hashing", "--window", "5"])

    return run


def test_figures_are_the_librarys(table: Path, command) -> None:
    done = command(table, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = measured(
        [row["response"] for row in ROWS],
        success=[row["success"] for row in ROWS],
        coherence=[row["coherence"] for row in ROWS],
        prompts=[row["prompt"] for row in ROWS],
        embeddings="hashing",
        window=5,
    )
    assert (found["n"], found["embedder"], found["groups"]) == (30, "hashing", 6)
    for name, interval in expected.intervals().items():
        told = found["measures"][name]
        assert [told["estimate"], told["low"], told["high"]] == pytest.approx(
            [interval.estimate, interval.low, interval.high]
        )


def test_the_table_names_every_measure_and_its_direction(table: Path, command) -> None:
    lines = command(table).output.splitlines()
    for title, better in (("HM3 of S, C, D", "higher"), ("compression ratio", "lower"), ("1 - self-BLEU", "higher")):
        (line,) = (line for line in lines if title in line)
        assert better in line
        assert "to" in line


def test_one_row_per_configuration_at_the_same_number_of_texts(table: Path, command) -> None:
    found = json.loads(command(table, "--by", "configuration", "--json").stdout)
    assert [(item["configuration"], item["n"]) for item in found] == [("strong", 12), ("weak", 12)]
    assert found[0]["measures"]["success"]["estimate"] == pytest.approx(np.mean(np.arange(12)) / 30)
    shown = command(table, "--by", "configuration", "--n", "5").output
    assert "quality of 5 texts each" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("│ s") or "weak" in line] == [
        "strong",
        "weak",
    ]


def test_without_a_judge_its_figures_are_missing(tmp_path: Path, command) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": row["response"]}) + "\n" for row in ROWS))
    done = command(path, "--text-col", "text", "--json")
    found = json.loads(done.stdout)["measures"]
    assert [found[name]["estimate"] for name in ("hm3", "hm2", "success", "coherence")] == [None] * 4
    assert found["diversity"]["estimate"] > 0
    assert "HM3 is missing where there is no success S, no coherence C" in command(path, "--text-col", "text").stderr


def test_a_cell_that_nobody_judged(tmp_path: Path, command) -> None:
    path = tmp_path / "some.csv"
    path.write_text(
        "response,success\n" + "".join(f"Text number {row} is here now,{row % 2 or ''}\n" for row in range(8))
    )
    found = json.loads(command(path, "--json", "--limit", "7").stdout)["measures"]["success"]
    assert (found["estimate"], found["n"], found["missing"]) == (1, 3, 4)


@pytest.mark.parametrize(
    ("words", "kind", "fault"),
    [
        (["--text-col", "respons"], ArgumentError, "unknown column 'respons'"),
        (["--success-col", "sucess"], ArgumentError, "Did you mean 'success'"),
        (["--coherence-col", "prompt"], ArgumentError, "column 'prompt'.*give numbers from 0 to 1"),
        (["--by", "configuration", "--n", "13"], ArgumentError, "--n: got 13; configuration 'strong' has 12 texts"),
        (["--n", "31"], ArgumentError, "--n: got 31; the file has 30 texts"),
        (["--embedder", "hashin"], UnknownNameError, "Did you mean 'hashing'"),
    ],
)
def test_faults(table: Path, command, words: list[str], kind: type, fault: str) -> None:
    app = typer.Typer()
    app.command()(quality)
    done = CliRunner().invoke(app, [str(table), "--embedder", "hashing", *words])
    assert isinstance(done.exception, kind)
    with pytest.raises(kind, match=fault):
        raise done.exception
