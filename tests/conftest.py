"""Shared fixtures: tiny random models of many architectures, the bundled model, data of others where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests.models import ARCHITECTURES, save_tiny

SHARED = Path(__file__).parents[1].parent / "shared" / "data"

torch.set_num_threads(1)  # tiny models: a second thread costs more than it gives


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory):
    """A function: architecture name -> folder of a random tiny model of it, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder):
    """A function: architecture name -> engine on a random tiny model of it, loaded once."""
    from steerwell.engines.hf import HFEngine

    loaded: dict[str, HFEngine] = {}

    def engine(name: str) -> HFEngine:
        if name not in loaded:
            loaded[name] = HFEngine.load(str(tiny_folder(name)), dtype="float32")
        return loaded[name]

    return engine


@pytest.fixture(params=sorted(ARCHITECTURES))
def any_hf_engine(request: pytest.FixtureRequest, tiny_engine):
    """The Hugging Face engine on every architecture in turn."""
    return tiny_engine(request.param)


@pytest.fixture(params=["fake", *sorted(ARCHITECTURES)])
def any_engine(request: pytest.FixtureRequest, tiny_engine):
    """Every engine in turn, the Hugging Face one on every architecture."""
    from steerwell.engines.fake import FakeEngine

    return FakeEngine() if request.param == "fake" else tiny_engine(request.param)


@pytest.fixture(scope="session")
def engine(tiny_engine):
    """One engine where the architecture does not matter."""
    return tiny_engine("llama")


@pytest.fixture(scope="session")
def pilot():
    """The bundled model."""
    from steerwell.engines.hf import HFEngine

    return HFEngine.load()


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of a small public model that we did not train."""
    folder = SHARED / "stories260K"
    if not folder.is_dir():
        pytest.skip("the public stories260K model is not at hand")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A function: command words -> (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["steerwell", *map(str, words)])
        from steerwell.apps.cli import main

        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call
