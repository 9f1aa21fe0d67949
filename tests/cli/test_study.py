"""`steerwell study` as a command; docs/alignment.md and docs/synthesis.md run it whole."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

from steerwell.apps.cli import main
from steerwell.core.errors import ArgumentError
from steerwell.engines.base import made_by
from steerwell.engines.fake import FakeEngine
from steerwell.studies.alignment import Cell
from steerwell.studies.config import AlignmentConfig, Model
from steerwell.studies.report.text import engines
from steerwell.studies.study import Worker, run_study
from steerwell.studies.synthesis.config import SynthesisConfig
from tests import study_run
from tests.sweep_run import LetterJudge

SETTINGS = "study: alignment\nmodels: [pilot]\nconcepts: [hostility]\n"
ROOM = "engine: vllm, engine_args: {gpu_memory_utilization: 0.4}"


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


@pytest.mark.parametrize(
    ("model", "more", "fault"),
    [
        ("tensor_parallel: 2", "", "tensor_parallel: got 2 with engine: hf; give device_map: auto, or engine: vllm"),
        ("engine_args: {a: 1}", "", "engine_args: got {'a': 1} with engine: hf; these are vLLM's"),
        ("engine: vllm, device_map: auto", "", "device_map: got 'auto' with engine: vllm; vLLM places models its own"),
        ("engine: vllm, gguf_file: a.gguf", "", "gguf_file: got 'a.gguf' with engine: vllm; vLLM reads no GGUF here"),
        ("engine: vlm", "", "Input should be 'hf' or 'vllm'"),
        ("engine: vllm", "", "engine_args: 'pilot' runs beside another model (a fine-tuned copy, or one that plays"),
        (ROOM, "conversations: {user: {name: small, engine: vllm}}", "engine_args: 'small' runs beside another model"),
        (ROOM, "capabilities: [testbed, mmlu]", "capabilities: mmlu are lm_eval's, which runs on engine: hf only, and"),
        (ROOM, "temperature: 2.5", "temperature: got 2.5, and 'pilot' has engine: vllm, which takes 0 (greedy), or"),
    ],
)
def test_what_an_engine_would_ignore_or_cannot_do(told, tmp_path: Path, model: str, more: str, fault: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"models: [{{name: pilot, {model}}}]\nconcepts: [hostility]\n{more}\n")
    assert fault in told(path, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_vllm_that_have_room_or_are_alone() -> None:
    alone = {"name": "pilot", "engine": "vllm"}
    roomy = alone | {"engine_args": {"kv_cache_memory_bytes": 1}}
    for model, more in ((alone, {"fine_tuned": False}), (roomy, {}), (alone | {"tuned": {}}, {})):
        made = AlignmentConfig.model_validate({"models": [model], "concepts": ["hostility"]} | more)
        assert made.models[0].engine == "vllm"
    with pytest.raises(ValidationError, match="broken: got 3, and 'pilot' has engine: vllm"):
        SynthesisConfig.model_validate({"models": [alone], "concepts": ["hostility"]})
    SynthesisConfig.model_validate({"models": [alone], "concepts": ["hostility"], "broken": 2.0})


def test_vllm_takes_every_device_so_there_is_one_worker(told, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"models: [{{name: pilot, {ROOM}}}]\nconcepts: [hostility]\n")
    told_ = told(path, "-o", tmp_path / "out", "--workers", 2)
    assert "workers: got 2, and 'pilot' has engine: vllm, which takes every device for itself; use 1" in told_
    assert not (tmp_path / "out").exists()


def study_of(**model: object) -> AlignmentConfig:
    return AlignmentConfig.model_validate(
        {"models": [{"name": "pilot", "tuned": {}} | model], "concepts": ["hostility"]}
    )


VLLM = {"engine": "vllm", "engine_args": {"gpu_memory_utilization": 0.4, "quantization": "fp8"}}


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({}, {"engine": "vllm"}, "engine of model 'pilot'"),
        (VLLM, {}, "engine of model 'pilot', engine_args of model 'pilot'"),
        (VLLM, {"engine": "vllm"}, "engine_args of model 'pilot'"),
        ({}, {"dtype": "bfloat16"}, "dtype of model 'pilot'"),
        ({}, {"chat_options": {"enable_thinking": False}}, "chat_options of model 'pilot'"),
        ({"name": "a/pilot"}, {"name": "b/pilot"}, "name of model 'pilot'"),
    ],
)
def test_a_folder_belongs_to_the_models_that_it_was_begun_with(
    tmp_path: Path, before: dict[str, object], after: dict[str, object], changed: str
) -> None:
    run_study(study_of(**before), tmp_path, nothing)
    with pytest.raises(ArgumentError, match=f"holds a study with another {changed}; resume with"):
        run_study(study_of(**after), tmp_path, nothing)
    run_study(study_of(**before), tmp_path, nothing)


def test_where_a_model_runs_and_what_it_may_take_can_change(tmp_path: Path) -> None:
    more = VLLM | {"engine_args": {"gpu_memory_utilization": 0.8, "quantization": "fp8"}, "tensor_parallel": 4}
    for model in (VLLM, more):
        run_study(study_of(**model), tmp_path / "vllm", nothing)
    for model in ({}, {"device_map": "auto"}):
        run_study(study_of(**model), tmp_path / "hf", nothing)
    (tmp_path / "hf" / "study.yaml").write_text("models: [{name: pilot, tuned: {}}]\nconcepts: [hostility]\n")
    run_study(study_of(), tmp_path / "hf", nothing)  # as before there was a choice of engines
    written = Model(name="pilot").model_dump()  # also in the ledger, where it plays users
    assert " ".join(written) == "name label dtype device_map gguf_file trust_remote_code chat_options tuned"
    assert Model.model_validate(Model(name="pilot", **VLLM).model_dump()) == Model(name="pilot", **VLLM)


def test_no_engine_goes_on_with_what_another_one_has_begun(tmp_path: Path) -> None:
    """Even where the folder does not tell: its ledgers do. Those of the Hugging Face engine say nothing, as ever."""

    class Other(FakeEngine):
        kind = "vllm"

    study_run.run(tmp_path)
    engine, cell = (
        Other(2, 8, language="testbed"),
        Cell(study_run.CONFIG, study_run.CONFIG.models[0], "hostility", tmp_path),
    )
    with pytest.raises(ArgumentError, match=r"ledger\.sqlite belongs to another run: engine differ"):
        cell.run(engine, lambda _model: engine, lambda _text, _count: lambda _done: None, judge=LetterJudge())
    Other.kind = "hf"
    assert made_by(engine) == {"model": asdict(engine.info)}


def test_every_model_is_closed_when_its_work_is_done(tmp_path: Path) -> None:
    told: list[str] = []

    class Told(FakeEngine):
        def __init__(self, model: Model, _size: int) -> None:
            super().__init__(2, 8, language="testbed")
            self.name = model.name
            told.append(f"{self.name} loaded")

        def close(self) -> None:
            told.append(f"{self.name} closed")

    worker = Worker(lambda _text, _count: lambda _done: None, load=Told)
    run_study(study_run.CONFIG, tmp_path / "whole", worker)
    assert told == ["fake loaded", "bad loaded", "bad closed", "fake closed"]
    told.clear()
    talks = study_run.CONFIG.conversations.model_copy(update={"user": Model(name="user")})
    cell = Cell(study_run.CONFIG.model_copy(update={"conversations": talks}), Model(name="fake"), "hostility", tmp_path)
    cell.run(FakeEngine(2, 8), lambda model: Told(model, 8), worker.say, judge=LetterJudge())
    assert told == ["user loaded", "user closed"]


def test_a_report_names_the_engines() -> None:
    plain, told = {"model": "a"}, {"model": "b", "engine": {"engine": "vllm", "tensor_parallel": 2, "dtype": "half"}}
    assert engines([plain, plain]) == "Hugging Face transformers"
    assert engines([told]) == "vLLM, tensor_parallel 2, dtype half"
    assert engines([plain, told]) == "a: Hugging Face transformers; b: vLLM, tensor_parallel 2, dtype half"
    assert Model.model_validate("a").runner == {"engine": "hf"}


def nothing(_cell: object) -> str:
    return ""


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
