"""OpenAI's Node client, installed once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INSTALL = ["install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]


def install(folder: Path) -> None:
    """Put the program and its package into a folder; skips where Node, npm or the registry is not to be had."""
    npm = shutil.which("npm")
    if shutil.which("node") is None or npm is None:
        pytest.skip("node and npm are not installed")
    shutil.copy(HERE / "client.js", folder)
    wanted = (HERE / "package.json").read_text()
    done = folder / "installed.json"
    if not done.exists() or done.read_text() != wanted:
        (folder / "package.json").write_text(wanted)
        try:
            subprocess.run([npm, *INSTALL], cwd=folder, capture_output=True, timeout=120, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm could not install the openai package: {error}")
        done.write_text(wanted)
