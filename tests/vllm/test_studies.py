"""Studies whose models run in vLLM: they find what those on the Hugging Face engine find, resume, and run in actors.

Directions are fitted once, on sampled answers, which each engine draws in its own way; all answers after that are
greedy. Rows that are within rounding of a tie are left out, counted, and may be few only.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from steerwell.core.artifacts import load_direction
from steerwell.core.records import Prompt
from steerwell.engines.base import kind_of
from steerwell.engines.hf import HFEngine
from steerwell.engines.ray import Cluster
from steerwell.studies.config import AlignmentConfig, Model
from steerwell.studies.defence import edits_of
from steerwell.studies.results import CellResult
from steerwell.studies.study import Worker, load_model, on_ray, run_study
from steerwell.studies.sweep import DIRECTIONS
from steerwell.studies.trials import MEASURES
from tests.engines.test_contract import close_to_a_tie

CELL = Path("pilot") / "hostility"
SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 27, "block_size": 32}
CONFIG = {
    "concepts": ["hostility"],
    "max_new_tokens": 16,
    "fitting_tokens": 8,
    "batch_size": 16,
    "sweep": {
        "layers": [1],
        "strengths": {"swfc": [1], "sttp": [0, 12], "stmp": [1]},
        "positions": ["all"],
        "pools": ["prompt_last"],
        "validation": 4,
    },
    "test": 6,
    "conversations": {"count": 2, "turns": 2, "max_new_tokens": 8},
    "examples": 1,
    "capabilities": [],
}
TUNED = {"bad": "pilot"}  # it is no copy, but it is a second model that is loaded


def settings(**model: object) -> AlignmentConfig:
    return AlignmentConfig.model_validate(CONFIG | {"models": [{"name": "pilot", "tuned": TUNED} | model]})


def silent(_text: str, _count: int) -> Callable[[int], None]:
    return lambda _done: None


def finished(folder: Path) -> dict[tuple[str, int], str]:
    """When the units of a cell's trials were finished."""
    base = sqlite3.connect(folder / CELL / "trials.sqlite")
    found = {(phase, at): when for phase, at, when in base.execute("SELECT phase, number, finished FROM units")}
    base.close()
    return found


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same study on both engines; the one on vLLM is interrupted and resumed."""
    ours, theirs = (tmp_path_factory.mktemp(name) for name in ("vllm", "hf"))
    run_study(settings(), theirs, Worker(silent))
    shutil.copytree(theirs / CELL / DIRECTIONS, ours / CELL / DIRECTIONS)
    config, open_engines = settings(engine="vllm", engine_args=SMALL), []

    def interrupted(text: str, _count: int) -> Callable[[int], None]:
        if "prefill" in text:
            raise KeyboardInterrupt
        return lambda _done: None

    def load(model: Model, size: int):
        engine = load_model(model, size)
        open_engines.append(engine)
        close = engine.close
        engine.close = lambda: (open_engines.remove(engine), close())
        return engine

    with pytest.raises(KeyboardInterrupt):
        run_study(config, ours, Worker(interrupted, load=load))
    assert not open_engines
    before = finished(ours)
    assert {phase for phase, _ in before} >= {"attacked", "unattacked"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # two engines at a time take processes of their own
        run_study(config, ours, Worker(silent, load=load))
    assert not open_engines
    after = finished(ours)
    assert before.items() < after.items()  # no unit was done twice
    return ours, theirs


def test_a_study_on_vllm_finds_what_one_on_hugging_face_finds(studies: tuple[Path, Path], pilot: HFEngine) -> None:
    ours, theirs = (CellResult.load(folder / CELL) for folder in studies)
    assert ours.about["engine"] == {"engine": "vllm", "tensor_parallel": 1} | SMALL
    assert theirs.about["engine"] == {"engine": "hf"}
    directions = {way.reading: load_direction(theirs.folder / DIRECTIONS / way.reading_name) for way in theirs.ways}
    edits = edits_of(directions, theirs.ways)
    assert ours.trials.keys() == theirs.trials.keys()
    excluded = count = 0
    for key, rows in theirs.trials.items():
        edit = None if key[1] is None else edits[key[1]]
        for mine, row in zip(ours.trials[key], rows, strict=True):
            count += 1
            prompt = Prompt.chat(row["prompt"], row["system"], row["prefill"])
            if close_to_a_tie(pilot, prompt, pilot.tokenise(row["answer"]), edit):
                excluded += 1
                continue
            words = ("answer", "finish_reason", "trait", "coherence", "edit", "prefill", "scenario")
            assert {name: mine[name] for name in words} == {name: row[name] for name in words}
            for name in MEASURES:
                assert_allclose(mine[name], row[name], rtol=0, atol=1e-3, err_msg=f"{key}, {name}")
    assert excluded <= 0.05 * count
    assert ours.about["roles"] == theirs.about["roles"]
    assert [turn["answer"] for turn in ours.turns] == [turn["answer"] for turn in theirs.turns]
    for name, curve in theirs.about["curves"]["projection"].items():
        assert_allclose(ours.about["curves"]["projection"][name], curve, rtol=0, atol=1e-3)
    assert ours.about["curves"]["edited"] == theirs.about["curves"]["edited"]


def test_an_actor_runs_vllm(pilot: HFEngine) -> None:
    """Its answers are those of the engine here."""
    ray = pytest.importorskip("ray")
    model = Model(name="pilot", engine="vllm", engine_args=SMALL)
    prompts = [Prompt.chat("What is the capital of France?", "You always lie."), Prompt.chat("Who are you?")]
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR")
    try:
        with on_ray(Cluster(actors=1), [model]) as load, closing(load(model, 8)) as engine:
            assert kind_of(engine) == "vllm"
            engine.info.require_same(pilot.info, "what the actor has loaded")
            assert [item.text for item in engine.generate(prompts)] == [item.text for item in pilot.generate(prompts)]
    finally:
        ray.shutdown()
