"""Every Python and shell block of the README and of docs/ runs, in order, as a reader would run it.

To load torch once and not once per command, Python and plain `steerwell` commands run in this process; whatever else a
block does, it does in a shell.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FIT = re.compile(r"(steerwell fit .*-o (\w+)) *(?:#.*)?$")
SET_UP = ("git clone", "make ", "pip install")  # what a test run cannot repeat


@pytest.fixture(scope="module")
def fitted() -> dict[str, Path]:
    """Directions by the command that fitted them: a page that repeats a command of an earlier one gets a copy."""
    return {}


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, fitted: dict[str, Path], run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "100")
    try:
        run_blocks(page, tmp_path, fitted, run)
    finally:  # a page that fails midway leaves its server running
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((tmp_path / "serve.pid").read_text()), signal.SIGKILL)


def run_blocks(page: Path, folder: Path, fitted: dict[str, Path], run) -> None:
    script = []
    for language, code in BLOCK.findall(page.read_text()):
        commands = [line for line in code.replace("\\\n", " ").splitlines() if not line.startswith(SET_UP)]
        if language == "python":
            script.append(code)
        elif all(command.startswith("steerwell ") for command in commands):
            for command in commands:
                if not copied(command, folder, fitted):
                    status, out, err = run(*shlex.split(command, comments=True)[1:])
                    assert status == 0, f"{command}\n{out}\n{err}"
        else:
            shell("\n".join(commands))
    if script:
        (folder / "page.py").write_text("\n".join(script))
        runpy.run_path("page.py", run_name="__main__")


def copied(command: str, folder: Path, fitted: dict[str, Path]) -> bool:
    """Whether this fits a direction that is there already, and is now in this folder too."""
    if (fit := FIT.match(command)) is None:
        return False
    command, name = fit.groups()
    if command in fitted and not (folder / name).exists():
        shutil.copytree(fitted[command], folder / name)
        return True
    fitted[command] = folder / name
    return False


def shell(script: str) -> None:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
