"""What Ray actors leave, for a study or another command, is what is left here, even where one is killed under way."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from steerwell.apps.cli import main
from steerwell.engines.fake import FakeEngine
from steerwell.engines.ray import Actors, Cluster, RayEngine
from steerwell.runs.ledger import Ledger
from steerwell.studies.alignment import Cell
from steerwell.studies.study import Worker, run_study
from steerwell.studies.synthesis.cell import SynthesisCell
from steerwell.studies.synthesis.config import SynthesisConfig
from tests import study_run, synthesis_run, test_alignment, test_synthesis_study
from tests.ray_run import cluster
from tests.sweep_run import LetterJudge

PILOT = SynthesisConfig.model_validate(
    {
        "models": ["pilot"],
        "concepts": ["hostility"],
        "steering": {"layers": [1], "ways": [{"method": "swfc", "estimator": "mean_difference", "strengths": [1, 2]}]},
        "prompting": {"systems": 1, "shots": [0], "temperatures": [1.0]},
        "texts": 12,
        "originals": 20,
        "few": [4],
        "benign": 20,
        "validation": 12,
        "test": 12,
        "max_new_tokens": 24,
        "fitting_tokens": 8,
        "batch_size": 8,
        "embedder": "hashing",
        "detector": {"embedder": "hashing"},
    }
)
CELL = Path("pilot") / "hostility"


def silent(_text: str, _count: int) -> Callable[[int], None]:
    return lambda _done: None


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """Also: as many threads here as in an actor, since sums in another order differ in the last digit."""
    threads = torch.get_num_threads()
    with cluster():
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("local")
    run_study(PILOT, folder, Worker(silent))
    return test_synthesis_study.content(folder / CELL)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of `steerwell`."""
    monkeypatch.setattr("sys.argv", ["steerwell", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def pid(engine: RayEngine) -> int:
    """The process of a free actor."""
    return engine.run(lambda _engine: os.getpid())


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], list[int]]:
    """A function: (phase, n) -> the process of the actor that is killed (kill -9) after the phase's n-th unit."""
    engines: list[RayEngine] = []
    record, engine = Ledger.record, Actors.engine

    def kept(self, key, load):
        engines.append(engine(self, key, load))
        return engines[-1]

    def watch(phase: str, count: int) -> list[int]:
        gone: list[int] = []

        def kills(self, unit, rows):
            record(self, unit, rows)
            if unit.phase == phase and len(self.finished(phase)) == count:
                gone.append(pid(engines[0]))
                os.kill(gone[0], signal.SIGKILL)

        monkeypatch.setattr(Ledger, "record", kills)
        return gone

    monkeypatch.setattr(Actors, "engine", kept)
    return watch


def test_two_actors_one_of_which_is_killed_leave_what_a_local_study_leaves(
    local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed
) -> None:
    """Killed after the third unit of eight, while it is at work or about to be."""
    gone = killed("texts", 3)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(PILOT.model_dump(mode="json")))
    words = "study", "synthesis", tmp_path / "study.yaml", "-o", tmp_path / "out", "--executor", "ray", "--actors", 2
    assert command(monkeypatch, *words) == 0
    assert len(gone) == 1
    assert test_synthesis_study.content(tmp_path / "out" / CELL) == local


DATA = ["synthesize", "-c", "hostility", "--prompted", "-n", 24, "--max-new-tokens", 24, "--batch-size", 8]
DATA += ["--embedder", "hashing", "--shares", 1, 0, 0, "--min-success", 0]
TRIED = ["sweep", "-c", "hostility", "-l", 1, "-s", "swfc=1", "-s", "stmp=1,2", "--estimator", "mean_difference"]
TRIED += ["--pool", "prompt_last", "--validation", 6, "--test", 6, "--max-new-tokens", 16, "--batch-size", 8]


def left(folder: Path) -> dict[str, object]:
    """Everything that a command leaves: files by their bytes, and the ledger's units but for their times."""
    found: dict[str, object] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".sqlite", ".png")
    }
    base = sqlite3.connect(folder / "ledger.sqlite")
    found["units"] = base.execute("SELECT phase, number, key, rows FROM units ORDER BY phase, number").fetchall()
    base.close()
    return found


@pytest.mark.parametrize(("words", "phase", "count"), [(DATA, "texts", 2), (TRIED, "1-validation", 1)])
def test_a_command_whose_actor_is_killed_leaves_what_it_leaves_here(
    words: list[object], phase: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed
) -> None:
    assert command(monkeypatch, *words, "-o", tmp_path / "local") == 0
    gone = killed(phase, count)
    assert command(monkeypatch, *words, "-o", tmp_path / "ray", "--executor", "ray", "--actors", 2) == 0
    assert len(gone) == 1
    here, there = left(tmp_path / "local"), left(tmp_path / "ray")
    assert len(here["units"]) > count
    assert there == here


def test_studies_on_the_fake_engine_leave_the_same(tmp_path: Path) -> None:
    """All phases of both kinds: sweep, trials, fine-tuned copies, conversations; texts, judge, detectors, probe."""
    study_run.run(tmp_path / "local" / "alignment")
    synthesis_run.run(tmp_path / "local" / "synthesis")
    folder = tmp_path / "ray"
    with Actors(Cluster(actors=2)) as actors:
        model = study_run.CONFIG.models[0]
        speaks = actors.engine("testbed", lambda: FakeEngine(n_layers=2, d_model=8, language="testbed"))
        cell = Cell(study_run.CONFIG, model, "hostility", folder / "alignment")
        cell.run(speaks, lambda _place: speaks, silent, judge=LetterJudge())
        config = synthesis_run.settings(tmp_path / "local")
        engine = actors.engine("english", lambda: FakeEngine(n_layers=2, d_model=8))
        SynthesisCell(config, model, config.concepts[0], folder / "synthesis").run(engine, silent, LetterJudge())
    for kind, suite in (("alignment", test_alignment), ("synthesis", test_synthesis_study)):
        assert suite.content(folder / kind) == suite.content(tmp_path / "local" / kind)


# What the command refuses ---------------------------------------------------------------------------------------------


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What `steerwell` says on stderr when it fails with exit code 1."""
    assert command(monkeypatch, *words) == 1
    return " ".join(capsys.readouterr().err.split())


ALONE = "--address, --actors, --cpus-per-actor, --gpus-per-actor: are about a Ray cluster; add --executor ray"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--actors", 2), ALONE),
        (("--executor", "ray", "--workers", 2), "--workers: got 2 with --executor ray; its parallel work is set by"),
        (("--executor", "ray", "--gpus-per-actor", 1.5), "gpus: got 1.5; expected a share below 1, or a whole number"),
        (("--executor", "ray", "--gpus-per-actor", 1), "takes 1 CPUs and 1 GPUs, and the cluster has 2 CPUs, 0 GPUs"),
    ],
)
def test_options_that_do_not_go_together(
    words: tuple[object, ...], fault: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fault in told(monkeypatch, capsys, "study", "synthesis", "--quick", "-o", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [DATA, TRIED])
def test_what_other_commands_refuse(
    words: list[object], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "-o", tmp_path / "out"]
    assert ALONE in told(monkeypatch, capsys, *words, "--gpus-per-actor", 1)
    shared = "--engine", "vllm", "--tensor-parallel", 2, "--executor", "ray", "--gpus-per-actor", 1
    assert "an actor has 1, and the model is shared by 2" in told(monkeypatch, capsys, *words, *shared)
    assert not (tmp_path / "out").exists()


def test_a_model_that_more_gpus_share_than_an_actor_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("models: [{name: a/b, engine: vllm, tensor_parallel: 2}]\nconcepts: [hostility]\n")
    words = "study", "alignment", path, "-o", tmp_path / "out", "--executor", "ray", "--gpus-per-actor", 1
    assert "gpus: an actor has 1, and 'b' is shared by 2 (tensor parallel)" in told(monkeypatch, capsys, *words)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_command_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for words in (("study", "synthesis", "--quick"), DATA):
        assert "steerwell[ray]" in told(monkeypatch, capsys, *words, "-o", tmp_path / "out", "--executor", "ray")
