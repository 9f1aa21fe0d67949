"""Every Python and shell block of the README and of docs/ runs, in order, as a reader would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SET_UP = ("git clone", "make ", "pip install")  # what a test run cannot repeat


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    script = []
    for language, code in BLOCK.findall(page.read_text()):
        if language == "bash":
            lines = [line for line in code.splitlines() if not line.startswith(SET_UP)]
            run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], tmp_path, environment)
        else:
            script.append(code)
    if script:
        run([sys.executable, "-c", "\n".join(script)], tmp_path, environment)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
