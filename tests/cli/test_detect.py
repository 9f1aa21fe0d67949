"""`steerwell detect` as a command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from steerwell.apps.cli.detect import app
from steerwell.core.artifacts import save_direction
from steerwell.core.errors import ArgumentError, ArtifactError, UnknownNameError
from steerwell.core.records import Prompt
from steerwell.steering.directions import estimate
from steerwell.synthesis.data import split
from steerwell.synthesis.detection import by_prompt, compare, detection
from steerwell.synthesis.detectors import load_detector, trial
from steerwell.synthesis.examples import Example, labels
from steerwell.synthesis.files import read_examples, read_table

SYLLABLES = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "za", "du", "pe", "gi"]
RUDE = ["stupid", "idiot", "hate", "shut", "fool"]


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts and responses of made-up words; the violating responses hold two rude ones."""
    rng = np.random.default_rng(seed)

    def words(number: int) -> list[str]:
        return ["".join(rng.choice(SYLLABLES, 3)) for _ in range(number)]

    found = []
    for at in range(count):
        said = words(8)
        if at % 3 == 0:
            said[1:3] = rng.choice(RUDE, 2)
        found.append({"ask": " ".join(words(6)), "said": " ".join(said), "rude": "yes" if at % 3 == 0 else "no"})
    return found


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


COLUMNS = ("--text-col", "said", "--prompt-col", "ask")
LABELLED = (*COLUMNS, "--label-col", "rude", "--positive", "yes")


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detect")


@pytest.fixture(scope="module")
def labelled(folder: Path) -> Path:
    return written(folder / "labelled.jsonl", rows(150, 0))


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Path:
    return written(folder / "fresh.jsonl", rows(60, 1))


@pytest.fixture(scope="module")
def trained(folder: Path, labelled: Path) -> tuple[Path, dict[str, Any]]:
    """A linear detector, and what the command printed."""
    place = folder / "linear"
    return place, json.loads(
        done("train", "--train", labelled, *LABELLED, "--embedder", "hashing", "-o", place, "--json")
    )


def test_training_does_what_the_library_does(trained, labelled: Path) -> None:
    place, told = trained
    examples = read_examples(labelled, text_col="said", label_col="rude", prompt_col="ask", positive="yes")
    parts = split(examples, (0.6, 0.2, 0.2), seed=0)
    assert {name: count["n"] for name, count in told["examples"].items()} == {k: len(v) for k, v in parts.items()}
    found = trial("linear", parts["train"], parts["validation"], parts["test"], (0, 1, 2), embedder="hashing")
    area = told["test"]["figures"]["auroc"]
    assert (area["estimate"], area["low"]) == (found.figures.auroc.estimate, found.figures.auroc.low)
    assert tuple(area["seeds"]) == found.figures.seeds["auroc"]
    assert area["estimate"] > 0.8
    assert json.loads((place / "figures.json").read_text()) == told
    assert load_detector(place).provenance["seed"] == 0


def test_training_on_given_parts(folder: Path, labelled: Path, fresh: Path) -> None:
    other = written(folder / "other.csv.jsonl", rows(45, 2))
    words = ("--train", labelled, "--validation", other, "--test", fresh, *LABELLED, "--embedder", "hashing")
    shown = done("train", *words, "--seeds", 2, "-o", folder / "given")
    assert "train: 150 examples, 50 violating" in shown
    assert "validation: 45 examples, 15 violating" in shown
    assert "test: 60 examples, 20 violating" in shown
    for title in ("AUROC", "AUPRC", "F1", "FPR at 95 % TPR", "ECE", "over seeds"):
        assert title in shown


def test_shared_prompts_are_told(folder: Path, labelled: Path) -> None:
    result = call(
        "train", "--train", labelled, "--test", labelled, *LABELLED, "--embedder", "hashing", "-o", folder / "x"
    )
    assert result.exit_code == 0
    assert "warning: train and test share 120 prompts" in result.stderr


def test_an_export_brings_its_own_parts(folder: Path) -> None:
    from steerwell.synthesis.export import export

    made = [Example(row["ask"], row["said"], int(row["rude"] == "yes"), concept="rude") for row in rows(150, 3)]
    parts = split(made, (0.6, 0.2, 0.2), seed=5)
    export(parts, folder / "set", title="made up", about={})
    words = ("--train", folder / "set", "--embedder", "hashing", "--seeds", 1, "-o", folder / "exported")
    told = json.loads(done("train", *words, "--json"))
    assert {name: count["n"] for name, count in told["examples"].items()} == {k: len(v) for k, v in parts.items()}
    assert told["provenance"]["concepts"] == ["rude"]


def test_eval_is_the_librarys_figures(trained, fresh: Path) -> None:
    place, _ = trained
    told = json.loads(done("eval", place, fresh, *LABELLED, "--json"))["detector"]
    examples = read_examples(fresh, text_col="said", label_col="rude", prompt_col="ask", positive="yes")
    detector = load_detector(place)
    scores = detector.scores(examples)
    found = detection(labels(examples), scores, threshold=detector.threshold, groups=by_prompt(examples))
    assert told["figures"]["f1"]["estimate"] == found.f1.estimate
    assert (told["n"], told["violating"], told["prompts"]) == (60, 20, 60)
    assert f"{found.auroc.estimate:.3f}" in done("eval", place, fresh, *LABELLED)


def test_eval_against_another(trained, folder: Path, labelled: Path, fresh: Path) -> None:
    place, _ = trained
    words = ("--train", labelled, *LABELLED, "--limit", 60, "--embedder", "hashing", "--seeds", 1)
    done("train", *words, "-o", folder / "less")
    told = json.loads(done("eval", place, fresh, "--against", folder / "less", *LABELLED, "--json"))
    examples = read_examples(fresh, text_col="said", label_col="rude", prompt_col="ask", positive="yes")
    left, right = (load_detector(each).scores(examples) for each in (place, folder / "less"))
    found = compare(labels(examples), left, right, groups=by_prompt(examples))
    assert told["comparison"]["difference"]["estimate"] == found.difference.estimate
    assert told["comparison"]["p"] == found.p
    assert f"= {found.difference.estimate:+.3f}" in done("eval", place, fresh, "--against", folder / "less", *LABELLED)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_predict_adds_two_columns(trained, folder: Path, ending: str) -> None:
    asked = [{"ask": row["ask"], "said": row["said"]} for row in rows(9, 4)]
    asked[4]["said"] = " "
    source, target = written(folder / "unlabelled.jsonl", asked), folder / f"read.{ending}"
    shown = done("predict", trained[0], source, "-o", target, *COLUMNS)
    detector = load_detector(trained[0])
    scores = detector.scores([Example(row["ask"], row["said"], 0) for row in asked])
    assert f"9 exchanges: {(scores >= detector.threshold).sum()} flagged" in shown
    assert "1 without a response" in shown
    found = read_table(target)
    assert [row["said"] for row in found] == [row["said"] for row in asked]
    chances = [float(row["p_violating"]) if row["p_violating"] not in (None, "") else np.nan for row in found]
    np.testing.assert_array_equal(chances, scores)
    flags = [str(row["flagged"]) if row["flagged"] not in (None, "") else "" for row in found]
    assert flags == ["" if np.isnan(score) else str(score >= detector.threshold) for score in scores.tolist()]


def test_predict_as_json(trained, fresh: Path) -> None:
    found = json.loads(done("predict", trained[0], fresh, *COLUMNS, "--limit", 3, "--json"))
    assert [set(row) for row in found] == [{"ask", "said", "rude", "p_violating", "flagged"}] * 3


def test_predict_reads_csv(trained, folder: Path) -> None:
    with (folder / "in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerow({"prompt": "Why?", "response": "Shut up, idiot."})
    found = json.loads(done("predict", trained[0], folder / "in.csv", "--json"))
    assert found[0]["p_violating"] == load_detector(trained[0]).scores([Example("Why?", "Shut up, idiot.", 0)])[0]


def test_a_probe_from_direction_to_prediction(folder: Path, labelled: Path, fresh: Path, tiny_engine) -> None:
    engine = tiny_engine("llama")
    said = [[row["said"] for row in rows(40, 6) if row["rude"] == label] for label in ("no", "yes")]
    count = min(map(len, said))
    states = [
        engine.capture([Prompt.chat("Hi")] * count, [engine.tokenise(text) for text in texts[:count]]) for texts in said
    ]
    save_direction(estimate(*states, engine.info, method="mean_difference"), folder / "direction")
    words = ("--kind", "probe", "--direction", folder / "direction", "--train", labelled, *LABELLED, "--seeds", 1)
    told = json.loads(done("train", *words, "-o", folder / "probe", "--json"))
    assert 0 <= load_detector(folder / "probe").layer < 4
    again = json.loads(done("eval", folder / "probe", fresh, *LABELLED, "--model", engine.info.name, "--json"))
    assert (told["kind"], again["detector"]["kind"], again["detector"]["missing"]) == ("probe", "probe", 0)


@pytest.mark.parametrize(
    ("words", "error", "named"),
    [
        (("--kind", "linaer"), UnknownNameError, "Did you mean 'linear'"),
        (("--base", "minilm"), ArgumentError, "--base: belongs to --kind encoder"),
        (("--kind", "probe"), ArgumentError, "--direction"),
        (("--model", "pilot"), ArgumentError, "--model: belongs to --kind probe"),
        (("--positive", "maybe"), ArgumentError, "maybe"),
        (("--text-col", "sayd"), ArgumentError, "Did you mean 'said'"),
    ],
)
def test_wrong_words_are_told_before_any_training(
    folder: Path, labelled: Path, words: tuple[str, ...], error: type[Exception], named: str
) -> None:
    result = call("train", "--train", labelled, *LABELLED, "-o", folder / "none", *words)
    assert isinstance(result.exception, error)
    assert named in str(result.exception)
    assert not (folder / "none").exists()


def test_wrong_files_are_told(trained, folder: Path, fresh: Path) -> None:
    assert isinstance(call("eval", folder, fresh, *LABELLED).exception, ArtifactError)
    assert isinstance(call("eval", trained[0], folder / "missing.jsonl", *LABELLED).exception, ArgumentError)
    result = call("predict", trained[0], fresh, "-o", folder / "out.txt", *COLUMNS)
    assert "--output" in str(result.exception)
