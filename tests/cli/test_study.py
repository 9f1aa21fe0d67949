"""`steerwell study alignment` as a command; docs/alignment.md runs it whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerwell.apps.cli import main

SETTINGS = "study: alignment\nmodels: [pilot]\nconcepts: [hostility]\n"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A function: command words -> what the command says on stderr when it fails with exit code 1."""

    def call(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["steerwell", "study", "alignment", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        return " ".join(capsys.readouterr().err.split())

    return call


def test_a_preset_and_a_file_do_not_go_together(told, tmp_path: Path) -> None:
    assert "--quick: is a preset, and so is 'pilot'; give one of them" in told("pilot", "--quick", "-o", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_unknown_preset(told, tmp_path: Path) -> None:
    assert "Did you mean 'qwen3-32b'? A file of your own ends in .yaml." in told("qwen3-32", "-o", tmp_path)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("sweep: {layers: [6]}", "unknown layer 6; known: 0, 1, 2, 3, 4, 5"),
        ("sweep: {strengths: {swfk: [1]}}", "unknown intervention 'swfk'"),
        ("language: english", "judge: got 'exact', which knows the bundled model's world only"),
    ],
)
def test_settings_that_do_not_fit_the_model(told, tmp_path: Path, more: str, fault: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(SETTINGS + more)
    assert fault in told(path, "-o", tmp_path / "out")
