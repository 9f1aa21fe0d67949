"""vLLM as users start it: in processes of its own, which find the plugin by its entry point; also two for one model."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
from numpy.testing import assert_allclose

from steerwell.core.errors import EngineError
from steerwell.core.records import Sampling
from steerwell.engines.hf import HFEngine
from steerwell.engines.vllm import VLLMEngine
from steerwell.engines.vllm.wire import Settings
from steerwell.steering.interventions import build
from tests.engines.test_contract import GATE_MARGIN, PROMPTS, direction_of, mixed_edits
from tests.vllm.test_engine import SMALL, assert_same_answers
from tests.vllm.test_traces import assert_same_traces


@pytest.fixture
def own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


def test_two_processes_share_every_layer(own_processes, folder_of) -> None:
    hf = HFEngine.load(str(folder_of("llama")), dtype="float32")
    engine = VLLMEngine.load(str(folder_of("llama")), dtype="float32", tensor_parallel=2, options=SMALL)
    try:
        assert engine.info == hf.info
        edits = mixed_edits(direction_of(hf))
        assert_same_answers(hf, engine, PROMPTS, edits)
        tokens = [[9, 8, 7]] * len(PROMPTS)
        got, expected = (one.capture(PROMPTS, tokens, edits) for one in (engine, hf))
        assert_allclose(got, expected, atol=1e-3, rtol=1e-3)
        for ours, theirs in zip(engine.score(PROMPTS, tokens, edits), hf.score(PROMPTS, tokens, edits), strict=True):
            if not theirs.receipt or min(term.gate_margin for term in theirs.receipt.terms) >= GATE_MARGIN:
                assert_same_traces(ours.traces, theirs.traces)
    finally:
        engine.close()


def test_the_bundled_model_is_fitted_and_steered(own_processes, pilot) -> None:
    """`fit` on vLLM finds the directions that it finds on the Hugging Face engine."""
    from steerwell.concepts import load_concept
    from steerwell.studies.fitting import fit

    concept = load_concept("dishonesty", "testbed")
    concept = concept.model_copy(update={"train": concept.train[:8]})
    engine = VLLMEngine.load(options={"kv_cache_memory_bytes": 1 << 27})
    try:
        how = Sampling(max_new_tokens=12)
        ours, theirs = (fit(one, concept, "mean_difference", how) for one in (engine, pilot))
        cosines = (ours.vectors * theirs.vectors).sum(1)
        assert cosines.min() > 0.999
        pilot.info.require_same(ours.model, "a direction fitted on vLLM")
        edit = build(ours, "sttp", 3, 2.0)
        prompts = [prompt for pair in concept.contrastive("train") for prompt in pair][:6]
        assert_same_answers(pilot, engine, prompts, [edit, None] * 3)
    finally:
        engine.close()


def test_without_the_plugin_nothing_starts(own_processes, folder_of, monkeypatch) -> None:
    """A server whose plugins are shut out would answer unsteered: the engine does not come up."""
    import vllm.plugins

    monkeypatch.setenv("VLLM_PLUGINS", "none_of_them")
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", True)
    with pytest.raises(EngineError, match="steerwell_about"):
        VLLMEngine.load(str(folder_of("llama")), dtype="float32", compiled=False, settings=Settings(), options=SMALL)


ANSWERING = """
import sys
from steerwell.engines.vllm import VLLMEngine
if __name__ == "__main__":
    engine = VLLMEngine.load(sys.argv[1], dtype="float32", compiled=False, options={"kv_cache_memory_bytes": 1 << 26})
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_nothing_stays_behind_when_the_caller_is_killed(own_processes, folder_of, tmp_path) -> None:
    (tmp_path / "answering.py").write_text(ANSWERING)
    command = [sys.executable, str(tmp_path / "answering.py"), str(folder_of("llama"))]
    caller = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert caller.stdout is not None
        assert any(line == "ready\n" for line in caller.stdout)
        children = psutil.Process(caller.pid).children(recursive=True)
        assert children
    finally:
        caller.kill()
        caller.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    for process in left:
        process.kill()
    assert not left
