"""A policy inside vLLM's own server: it steers every request, and no request gets out of it."""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

from steerwell.core.artifacts import save_direction
from steerwell.core.errors import ArgumentError, ArtifactError, EngineError, ModelMismatchError
from steerwell.core.policy import Policy, save_policy
from steerwell.core.records import Edit, EditTerm, Prompt, Sampling
from steerwell.engines.hf import HFEngine
from steerwell.engines.vllm import VLLMEngine, front
from steerwell.engines.vllm.wire import KEY, Settings, encode
from steerwell.steering.interventions import build
from tests.engines.test_contract import PROMPTS, close_to_a_tie, direction_of
from tests.vllm.conftest import save_model
from tests.vllm.test_engine import LONG, SMALL, TOLERANCE

TOKENS = 12
SHORT = Sampling(max_new_tokens=TOKENS)
POSITIONS = ("all", "response")


def policies(folder: Path, hf: HFEngine) -> dict[str, Path]:
    """A policy file per position; both change what the model says."""
    direction = direction_of(hf)
    save_direction(direction, folder / "direction")
    return {
        position: save_policy(
            Policy(direction="direction", method="stmp", layers=(1, 2), strength=3, position=position),
            folder / f"{position}.yaml",
        )
        for position in POSITIONS
    }


def edit_of(hf: HFEngine, position: str) -> Edit:
    return build(direction_of(hf), "stmp", (1, 2), 3, position=position)


def start(folder: Path, **steerwell):
    """vLLM as its users start it, without anything of ours but the setting."""
    from vllm import LLM

    options = SMALL | {"enforce_eager": True, "dtype": "float32", "max_num_seqs": 8, "enable_prompt_embeds": True}
    return LLM(str(folder), additional_config={KEY: steerwell}, generation_config="vllm", **options)


def end(llm) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def hf(folder_of) -> HFEngine:
    return HFEngine.load(str(folder_of("llama")), dtype="float32")


@pytest.fixture(scope="module")
def files(hf, tmp_path_factory) -> dict[str, Path]:
    return policies(tmp_path_factory.mktemp("policies"), hf)


@pytest.fixture(scope="module")
def locked(folder_of, files):
    """Under a policy of position `all` that no request may replace."""
    llm = start(folder_of("llama"), policy=str(files["all"]))
    yield llm
    end(llm)


def params(**fields):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": TOKENS, "stop_token_ids": [257]} | fields)


def ask(llm, hf, prompts, wants=None, **fields):
    """Tokens per prompt, without the end token."""
    asked = [{"prompt_token_ids": hf.loaded.encode(prompt)} for prompt in prompts]
    outputs = llm.generate(asked, wants or params(**fields), use_tqdm=False)
    return [tuple(token for token in output.outputs[0].token_ids if token != 257) for output in outputs]


def assert_under(hf, edit, prompts, got, most: float = 0.4) -> None:
    """Each answer is the Hugging Face engine's under the edit, ties aside; ties are counted."""
    excluded = 0
    for prompt, tokens, expected in zip(prompts, got, hf.generate(prompts, SHORT, edit), strict=True):
        if expected.token_ids and close_to_a_tie(hf, prompt, expected.token_ids, edit):
            excluded += 1
            continue
        assert tokens == expected.token_ids
    assert excluded <= most * len(prompts)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_policy_changes_what_the_model_says(hf, position) -> None:
    """Else the tests below could not fail."""
    plain, steered = hf.generate(PROMPTS, SHORT), hf.generate(PROMPTS, SHORT, edit_of(hf, position))
    assert sum(a.token_ids != b.token_ids for a, b in zip(plain, steered, strict=True)) >= 4


def test_requests_that_ask_for_nothing_are_steered(locked, hf) -> None:
    edit = edit_of(hf, "all")
    assert_under(hf, edit, PROMPTS, ask(locked, hf, PROMPTS))
    from_cache = [Prompt.chat(LONG.messages[0].content)] * 2  # the second takes keys and values of the first
    for _ in range(2):
        assert_under(hf, edit, from_cache, ask(locked, hf, from_cache), most=0)
    output = locked.generate([{"prompt_token_ids": hf.loaded.encode(LONG)}], params(), use_tqdm=False)[0]
    assert output.num_cached_tokens > 0


def test_log_probabilities_are_those_under_the_policy(locked, hf) -> None:
    prompt, edit = PROMPTS[1], edit_of(hf, "all")
    tokens = [70, 40, 7, 99]
    expected = hf.score([prompt], [tokens], edit)[0]
    assert min(term.gate_margin for term in expected.receipt.terms) > 1e-3
    asked = {"prompt_token_ids": [*hf.loaded.encode(prompt), *tokens]}
    output = locked.generate([asked], params(prompt_logprobs=1, max_tokens=1), use_tqdm=False)[0]
    got = [row[token].logprob for token, row in zip(tokens, output.prompt_logprobs[-4:], strict=True)]
    np.testing.assert_allclose(got, expected.logprobs, atol=TOLERANCE, rtol=0)
    plain = hf.score([prompt], [tokens])[0]
    assert np.abs(plain.logprobs - expected.logprobs).max() > 0.1


WAYS = [
    {"extra_args": {}},
    {"extra_args": {"steer": "off"}},
    {"skip_reading_prefix_cache": True},
    {"skip_reading_prefix_cache": False},
    {"skip_clone": True},
    {"detokenize": False},
    {"logprobs": 5},
    {"seed": 3},
    {"top_p": 0.5},
    {"ignore_eos": False, "min_tokens": 1},
    {"stop": ["\x00never"]},
]


@pytest.mark.parametrize("fields", WAYS, ids=str)
def test_no_field_gets_a_request_out(locked, hf, fields) -> None:
    wants = params(**fields)
    for _ in range(2):  # the same object again
        assert_under(hf, edit_of(hf, "all"), PROMPTS, ask(locked, hf, PROMPTS, wants))


def test_a_request_may_not_bring_its_own(locked, hf) -> None:
    nothing = Edit((EditTerm(1, np.eye(64, dtype=np.float32)[0], math.inf, 0.0, 0.0),))
    for value in (encode(nothing), {"terms": []}, {}, "{}", None, encode(edit_of(hf, "all"))):
        with pytest.raises(ArgumentError, match="none may replace it"):
            ask(locked, hf, PROMPTS, extra_args={KEY: value})
    assert not locked.llm_engine.has_unfinished_requests()
    assert_under(hf, edit_of(hf, "all"), PROMPTS, ask(locked, hf, PROMPTS))


def test_several_answers_to_one_request_are_all_steered(locked, hf) -> None:
    """Tokens that were drawn have the log-probabilities that they have under the policy."""
    edit, excluded = edit_of(hf, "all"), 0
    for prompt in PROMPTS:
        asked = [{"prompt_token_ids": hf.loaded.encode(prompt)}]
        [output] = locked.generate(asked, params(n=3, temperature=1.0, logprobs=0), use_tqdm=False)
        tokens = [tuple(item.token_ids) for item in output.outputs]
        assert len(set(tokens)) > 1
        for item, expected in zip(output.outputs, hf.score([prompt] * 3, tokens, edit), strict=True):
            if min(term.gate_margin for term in expected.receipt.terms) < 1e-3:
                excluded += 1
                continue
            got = [row[token].logprob for token, row in zip(item.token_ids, item.logprobs, strict=True)]
            np.testing.assert_allclose(got, expected.logprobs, atol=TOLERANCE, rtol=0)
    assert excluded <= 5


def test_beam_search_is_steered(locked, hf) -> None:
    """One beam is greedy."""
    from vllm.sampling_params import BeamSearchParams

    asked = [{"prompt_token_ids": hf.loaded.encode(prompt)} for prompt in PROMPTS]
    found = locked.beam_search(asked, BeamSearchParams(beam_width=1, max_tokens=TOKENS))
    got = []
    for item, output in zip(asked, found, strict=True):
        tokens = output.sequences[0].tokens[len(item["prompt_token_ids"]) :]
        got.append(tuple(tokens[: tokens.index(257)] if 257 in tokens else tokens))
    assert_under(hf, edit_of(hf, "all"), PROMPTS, got)


def test_prompts_given_as_embeddings_are_steered(locked, hf) -> None:
    rows = hf.loaded.network.get_input_embeddings().weight.detach()
    asked = [{"prompt_embeds": rows[torch.tensor(hf.loaded.encode(prompt))]} for prompt in PROMPTS]
    outputs = locked.generate(asked, params(), use_tqdm=False)
    got = [tuple(token for token in output.outputs[0].token_ids if token != 257) for output in outputs]
    assert_under(hf, edit_of(hf, "all"), PROMPTS, got)


def test_what_cannot_be_steered_is_refused(locked) -> None:
    from vllm import PoolingParams

    config = locked.llm_engine.vllm_config
    with pytest.raises(ArgumentError, match="pooling"):
        front.check_request(config, PoolingParams())
    with pytest.raises(ArgumentError, match="piece by piece"):
        front.check_request(config, params(), resumable=True)
    front.check_request(config, params())


def test_the_engine_core_steers_whatever_reaches_it(locked, hf) -> None:
    """Also what no front end has checked: there the policy is imposed."""
    from steerwell.engines.vllm import policy

    settings = Settings.of(locked.llm_engine.vllm_config.additional_config)
    wants = params(extra_args={KEY: {"terms": []}, "other": 1})
    request = SimpleNamespace(sampling_params=wants, resumable=False)
    policy.impose(settings, request)
    assert request.sampling_params.extra_args["other"] == 1
    assert [term[0] for term in request.sampling_params.extra_args[KEY]["terms"]] == [1, 2]
    assert wants.extra_args[KEY] == {"terms": []}  # the caller's own stays as it is


def test_where_requests_are_open_they_bring_their_own_or_none(hf, folder_of, files) -> None:
    """In any order, from the prefix cache too; the policy's position is `response`."""
    from vllm.sampling_params import BeamSearchParams

    own = build(direction_of(hf, 1), "swfc", 1, 1.5)
    llm = start(folder_of("llama"), policy=str(files["response"]), requests="open")
    try:
        ways = [(None, edit_of(hf, "response")), (encode(own), own), ({"terms": []}, None)]
        for value, edit in [*ways, *ways[::-1], ways[1]]:
            extra = None if value is None else {KEY: value}
            assert_under(hf, edit, PROMPTS, ask(llm, hf, PROMPTS, extra_args=extra), most=0.6)
            assert_under(hf, edit, [LONG], ask(llm, hf, [LONG], extra_args=extra), most=1)
        with pytest.raises(ArgumentError, match="use_beam_search"):
            llm.beam_search([{"prompt_token_ids": [1, 2, 3]}], BeamSearchParams(beam_width=2, max_tokens=3))
        with pytest.raises(ArgumentError, match="cannot be read"):
            ask(llm, hf, PROMPTS, extra_args={KEY: {"vectors": {}}})
    finally:
        end(llm)


def test_without_its_policy_or_on_another_model_nothing_starts(hf, folder_of, files, tmp_path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        start(folder_of("llama"), policy=str(tmp_path / "none.yaml"))
    with pytest.raises(ModelMismatchError, match="config_hash"):
        start(folder_of("gpt2"), policy=str(files["all"]))
    other = save_model("llama", tmp_path / "other", seed=7)  # the same shape, other weights
    with pytest.raises(ModelMismatchError, match="other weights"):
        start(other, policy=str(files["all"]))
    end(None)
    with pytest.raises(ArgumentError, match="'locked' or 'open', beside a policy"):
        Settings(requests="locked")
    with pytest.raises(ArgumentError, match="policy: got 3"):
        Settings(policy=3)
    with pytest.raises(ArgumentError, match="own server"):
        VLLMEngine.load(str(folder_of("llama")), settings=Settings(policy=str(files["all"])))


def test_workers_without_the_plugin_stop_the_start(folder_of, files, monkeypatch) -> None:
    """They would ignore the policy."""
    from vllm.v1.worker.worker_base import WorkerBase

    monkeypatch.setattr(WorkerBase, "__init__", WorkerBase.__init__.__wrapped__)
    with pytest.raises(EngineError, match="a worker does not steer"):
        start(folder_of("llama"), policy=str(files["all"]))
    end(None)


# --- vLLM's OpenAI server ----------------------------------------------------------------------------------------


@pytest.fixture
def server(folder_of, files, tmp_path):
    """What `vllm serve` starts, in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = json.dumps({"steerwell": {"policy": str(files["all"])}})
    words = ["--model", folder_of("llama"), "--host", "127.0.0.1", "--port", port, "--served-model-name", "tiny"]
    words += ["--enforce-eager", "--dtype", "float32", "--block-size", 32, "--kv-cache-memory-bytes", 1 << 26]
    words += ["--max-num-seqs", 8, "--generation-config", "vllm", "--additional-config", settings]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    log = tmp_path / "log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    base = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            try:
                if httpx.get(f"{base}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield base, log
    finally:
        process.terminate()
        process.wait(60)


def test_vllms_own_server_steers_every_request(server, hf) -> None:
    base, log = server
    edit, greedy = edit_of(hf, "all"), {"model": "tiny", "temperature": 0, "max_tokens": TOKENS}

    def post(path, **fields):
        return httpx.post(f"{base}/v1/{path}", json=greedy | fields, timeout=60)

    def texts(reply):
        """What was said, without half a character at the end, which vLLM leaves out."""
        assert reply.status_code == 200, reply.text
        told = [choice.get("text") or choice["message"]["content"] for choice in reply.json()["choices"]]
        return [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in told]

    assert f"(edit {edit.id}); none may replace it" in log.read_text()
    compared = 0
    for prompt in PROMPTS:
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        plain = Prompt(text=prompt.messages[-1].content)
        ways = [(prompt, post("chat/completions", messages=messages)), (plain, post("completions", prompt=plain.text))]
        ways.append((plain, post("completions", prompt=plain.text, use_beam_search=True)))
        for asked, reply in ways:
            expected = hf.generate([asked], SHORT, edit)[0]
            if not close_to_a_tie(hf, asked, expected.token_ids, edit):
                assert texts(reply) == [expected.text.rstrip("\N{REPLACEMENT CHARACTER}")]
                compared += 1
    assert compared >= 6
    several = texts(post("completions", prompt="Why?", n=3, temperature=0.01, seed=1))
    assert len(several) == 3
    own = {"vllm_xargs": {KEY: '{"terms": []}'}}
    for reply in (
        post("completions", prompt="Why?", **own),
        post("chat/completions", messages=[{"role": "user", "content": "Why?"}], **own),
        post("responses", input="Why?", **own),
    ):
        assert reply.status_code == 400, reply.text
        assert "none may replace it" in reply.text
    lost = post("completions", prompt="Why?", use_beam_search=True, **own)
    assert lost.status_code == 400, lost.text
    assert "use_beam_search" in lost.text
