"""`steerwell synthesize` as a command: what it refuses, and one small data set; docs/synthesis.md runs the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steerwell.apps.cli import main
from steerwell.core.artifacts import save_direction
from steerwell.core.policy import Policy, save_policy
from steerwell.studies.fitting import fit


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy toward each class of one direction."""
    from steerwell import HFEngine, Sampling, load_concept

    folder = tmp_path_factory.mktemp("policies")
    engine = HFEngine.load("pilot")
    direction = fit(engine, load_concept("hostility", "testbed"), sampling=Sampling(0.6, 0.9, 64), pool="prompt_last")
    save_direction(direction, folder / "direction")
    return {
        toward: save_policy(
            Policy(name=toward, direction="direction", method="stmp", layers=(1,), strength=1, toward=toward),
            folder / f"{toward}.yaml",
        )
        for toward in ("aligned", "violating")
    }


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A function: words -> (exit code, stdout, stderr) of `steerwell synthesize`."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["steerwell", "synthesize", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capsys.readouterr()
        return int(stopped.value.code or 0), told.out, " ".join(told.err.split())

    return run


def test_a_data_set_of_the_bundled_model(call, policies, tmp_path: Path) -> None:
    words = [
        "-c",
        "hostility",
        "--policy",
        policies["violating"],
        "-n",
        60,
        "--max-new-tokens",
        64,
        "--batch-size",
        120,
    ]
    more = ["--embedder", "hashing", "--shares", 0.6, 0.2, 0.2, "-o", tmp_path / "out", "--json"]
    code, text, _ = call(*words, *more)
    found = json.loads(text)
    assert code == 0
    assert found["written"] == 120
    assert sum(found["splits"].values()) + sum(found["dropped"].values()) == 120
    assert found["quality"]["steered"]["success"] > 0.5  # the filter asks for this much of every one
    assert (tmp_path / "out" / "dataset" / "README.md").is_file()


def test_what_it_refuses(call, policies, tmp_path: Path) -> None:
    out = ["-c", "hostility", "-o", tmp_path]
    assert "got neither; give a policy file" in call(*out)[2]
    assert "steers toward 'aligned'; expected 'toward: violating'" in call(*out, "--policy", policies["aligned"])[2]
    empty = tmp_path / "prompts.jsonl"
    empty.write_text('{"prompt": " "}\n')
    assert "column 'prompt'" in call(*out, "--prompted", "--prompts", empty)[2]
    assert "--shots, --examples: go together" in call(*out, "--prompted", "--shots", 1)[2]
    told = call(*out, "--prompted", "--judge", "none", "--min-success", 0.5)[2]
    assert "success: asked for, but nobody judges" in told


def test_shots_are_shown_to_the_prompted_model(call, tmp_path: Path) -> None:
    real = tmp_path / "real.jsonl"
    rows = [{"prompt": f"Is it {at}?", "response": "Go away.", "label": 1} for at in range(3)]
    real.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "Hi", "response": "Hello.", "label": 0}])
    )
    words = ["-c", "hostility", "--prompted", "--shots", 2, "--examples", real, "-n", 30, "--max-new-tokens", 48]
    more = [
        "--judge",
        "none",
        "--embedder",
        "hashing",
        "--shares",
        1,
        0,
        0,
        "--near",
        1,
        "-o",
        tmp_path / "out",
        "--json",
    ]
    code, text, _ = call(*words, *more)
    assert (code, json.loads(text)["written"]) == (0, 60)
    card = (tmp_path / "out" / "dataset" / "README.md").read_text()
    assert "all system prompts, 2 shots, temperature 1 " in card
