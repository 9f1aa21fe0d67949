"""`steerwell study` as a command; docs/alignment.md and docs/synthesis.md run it whole."""

from __future__ import annotations

import subprocess
import sys
import time
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


WORKER = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from steerwell.studies.study import _end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as pool:
        print(pool.submit(__import__("os").getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the process in /proc")
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Else a study that is killed and run again would meet its old workers at its cells."""
    (tmp_path / "run.py").write_text(WORKER)
    parent = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as pipe:
        worker = Path(f"/proc/{int(pipe.readline())}")
        assert worker.exists()
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 60
        while worker.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not worker.exists()
