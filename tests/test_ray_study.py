"""Studies whose models run in Ray actors leave what local ones leave, even where an actor is killed under way."""

from __future__ import annotations

import os
import signal
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


def study(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of `steerwell study synthesis`."""
    monkeypatch.setattr("sys.argv", ["steerwell", "study", "synthesis", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def pid(engine: RayEngine) -> int:
    """The process of a free actor."""
    return engine.run(lambda _engine: os.getpid())


def test_two_actors_one_of_which_is_killed_leave_what_a_local_study_leaves(
    local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed (kill -9) after the third unit of eight, while it is at work or about to be."""
    engines: list[RayEngine] = []
    killed: list[int] = []
    record, engine = Ledger.record, Actors.engine

    def kept(self, key, load):
        engines.append(engine(self, key, load))
        return engines[-1]

    def kills(self, unit, rows):
        record(self, unit, rows)
        if unit.phase == "texts" and len(self.finished("texts")) == 3:
            killed.append(pid(engines[0]))
            os.kill(killed[0], signal.SIGKILL)
        elif unit.phase == "probe":
            killed.append(pid(engines[0]))

    monkeypatch.setattr(Ledger, "record", kills)
    monkeypatch.setattr(Actors, "engine", kept)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(PILOT.model_dump(mode="json")))
    words = tmp_path / "study.yaml", "-o", tmp_path / "out", "--executor", "ray", "--actors", 2
    assert study(monkeypatch, *words) == 0
    first, later = killed
    assert first != later
    assert test_synthesis_study.content(tmp_path / "out" / CELL) == local


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
    """What `steerwell study synthesis` says on stderr when it fails with exit code 1."""
    assert study(monkeypatch, *words) == 1
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--actors", 2), "--address, --actors, --cpus-per-actor, --gpus-per-actor: are about a Ray cluster; add"),
        (("--executor", "ray", "--workers", 2), "--workers: got 2 with --executor ray; its parallel work is set by"),
        (("--executor", "ray", "--gpus-per-actor", 1.5), "gpus: got 1.5; expected a share below 1, or a whole number"),
        (("--executor", "ray", "--gpus-per-actor", 1), "takes 1 CPUs and 1 GPUs, and the cluster has 2 CPUs, 0 GPUs"),
    ],
)
def test_options_that_do_not_go_together(
    words: tuple[object, ...], fault: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fault in told(monkeypatch, capsys, "--quick", "-o", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_command_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "steerwell[ray]" in told(monkeypatch, capsys, "--quick", "-o", tmp_path / "out", "--executor", "ray")
