"""The vLLM engine keeps the promises of every engine: what the Hugging Face engine gives, vLLM gives.

Equality is asserted in float32 where no gate and no greedy choice was within rounding of a tie (the margins of
`tests/engines/test_contract.py`); rows that come closer are left out, counted, and may be few only.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from steerwell.core.errors import ArgumentError, EngineError
from steerwell.core.records import POOLS, Edit, EditTerm, Prompt, Sampling
from steerwell.engines.hf import HFEngine
from steerwell.engines.vllm import VLLMEngine
from steerwell.engines.vllm.plugin import code_hash
from steerwell.engines.vllm.wire import KEY, Settings, encode, packed
from steerwell.steering.interventions import METHODS, build
from tests.engines.test_contract import PROMPTS, close_to_a_tie, direction_of, mixed_edits

TOLERANCE = 2e-4  # nats, between two implementations of one model in float32
SHORT = Sampling(max_new_tokens=12)
SMALL = {"kv_cache_memory_bytes": 1 << 26, "block_size": 32}
SETTINGS = Settings(
    captures=3, directions=6
)  # tables that are too small for the batches below, so that rows take turns
CHUNKS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 24}
LONG = Prompt.chat("Tell me everything that you know about cats and dogs and birds, and then about fish. " * 2)

KINDS = {
    "eager, chunks of 24 tokens, prefix cache": (
        "llama",
        {"compiled": False, "batch_size": 4, "options": SMALL | CHUNKS},
    ),
    "compiled, no prefix cache": ("llama", {"compiled": True, "prefix_caching": False, "options": SMALL}),
    "eager, blocks that return one tensor": ("gpt2", {"compiled": False, "options": SMALL}),
}


def load(folder, **arguments) -> VLLMEngine:
    return VLLMEngine.load(str(folder), dtype="float32", **{"settings": SETTINGS} | arguments)


def close(engine: VLLMEngine) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.close()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, folder_of):
    """The same model under Hugging Face and under vLLM."""
    name, arguments = KINDS[request.param]
    engine = load(folder_of(name), **arguments)
    yield HFEngine.load(str(folder_of(name)), dtype="float32"), engine
    close(engine)


def assert_same_receipt(got, expected) -> None:
    assert (got is None) == (expected is None)
    if got is None:
        return
    assert got.edit_id == expected.edit_id
    for ours, theirs in zip(got.terms, expected.terms, strict=True):
        assert (ours.label, ours.layer, ours.position) == (theirs.label, theirs.layer, theirs.position)
        assert (ours.tokens_seen, ours.tokens_edited) == (theirs.tokens_seen, theirs.tokens_edited)
        numbers = ("projection_before", "projection_after", "perturbation", "gate_margin")
        for number in numbers:
            assert getattr(ours, number) == pytest.approx(getattr(theirs, number), rel=1e-3, abs=1e-3), number


def assert_same_answers(hf, engine, prompts, edits, sampling=SHORT, most=0.3) -> None:
    """Greedy tokens, texts and receipts are equal, ties aside."""
    excluded = 0
    for prompt, edit, got, expected in zip(
        prompts, edits, engine.generate(prompts, sampling, edits), hf.generate(prompts, sampling, edits), strict=True
    ):
        if expected.token_ids and close_to_a_tie(hf, prompt, expected.token_ids, edit):
            excluded += 1
            continue
        assert (got.token_ids, got.text, got.finish_reason) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        )
        assert got.sampling == expected.sampling
        assert_same_receipt(got.receipt, expected.receipt)
    assert excluded <= most * len(prompts)


def every_method(direction) -> list[Edit]:
    return [
        build(direction, method, [0, 2, 3], 0.8, position=position, gate=direction if method == "conditional" else None)
        for method, position in product(METHODS.names(), ("all", "response"))
    ]


def test_it_is_the_same_model(pair) -> None:
    hf, engine = pair
    assert engine.info == hf.info
    assert engine.tokenise("What now?") == hf.tokenise("What now?")
    assert engine.pieces([72, 105, 33]) == hf.pieces([72, 105, 33])


def test_compiled_graphs_are_cached_under_a_key_of_our_code(pair) -> None:
    """vLLM's hash of its configuration, which is in that key, covers what the worker has put there."""
    config = pair[1]._client.core.vllm_config
    assert config.additional_config[KEY]["code"] == code_hash()
    salted = config.compute_hash()
    config.additional_config[KEY]["code"] = "other"
    assert config.compute_hash() != salted
    config.additional_config[KEY]["code"] = code_hash()


def test_every_method_and_position_answers_as_hugging_face(pair) -> None:
    hf, engine = pair
    edits = every_method(direction_of(hf))
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(edits))]
    assert_same_answers(hf, engine, prompts, edits)


def test_mixed_rows_answer_as_hugging_face(pair) -> None:
    hf, engine = pair
    edits = mixed_edits(direction_of(hf))
    assert_same_answers(hf, engine, PROMPTS, edits)
    seen = []
    engine.generate(PROMPTS, SHORT, edits, progress=seen.append)
    assert sum(seen) == len(PROMPTS)


def test_many_strengths_and_directions_take_turns_in_small_tables(pair) -> None:
    """More distinct configurations than requests run at one time, and more vectors than the table has rows."""
    hf, engine = pair
    directions = [direction_of(hf, seed) for seed in range(4)]
    edits = [build(directions[row % 4], "swfc", [row % 3, 3], 0.1 * row) for row in range(24)]
    assert_same_answers(hf, engine, [PROMPTS[row % 5] for row in range(24)], edits, Sampling(max_new_tokens=6))


def test_log_probabilities_equal_hugging_face(pair) -> None:
    hf, engine = pair
    direction = direction_of(hf)
    edits = [*every_method(direction), None]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(edits))]
    tokens = [[70 + index, 40, 7, 99] for index in range(len(edits))]
    excluded = 0
    for got, expected in zip(engine.score(prompts, tokens, edits), hf.score(prompts, tokens, edits), strict=True):
        if expected.receipt and min(term.gate_margin for term in expected.receipt.terms) < 1e-3:
            excluded += 1
            continue
        assert_allclose(got.logprobs, expected.logprobs, atol=TOLERANCE, rtol=0)
        assert_allclose(got.margins, expected.margins, atol=TOLERANCE, rtol=0)
        if expected.margins.min() > 1e-3:
            assert_array_equal(got.greedy, expected.greedy)
        assert_same_receipt(got.receipt, expected.receipt)
    assert excluded <= 3


@pytest.mark.parametrize("pool", POOLS)
def test_captured_states_equal_hugging_face(pair, pool) -> None:
    hf, engine = pair
    edits = mixed_edits(direction_of(hf))
    tokens = [[9, 8, 7][: 1 + row % 3] for row in range(len(PROMPTS))]
    for given in (None, edits):
        got, expected = (one.capture(PROMPTS, tokens, given, pool=pool) for one in (engine, hf))
        assert_allclose(got, expected, atol=1e-3, rtol=1e-3)
    assert_allclose(engine.capture([LONG], [[9, 8]], pool=pool), hf.capture([LONG], [[9, 8]], pool=pool), atol=1e-3)


@pytest.mark.parametrize("method", ["swfc", "stmp"])
def test_strength_zero_is_unsteered(pair, method) -> None:
    hf, engine = pair
    edit, tokens = build(direction_of(hf), method, [0, 3], 0.0), [[9, 8, 7]] * len(PROMPTS)
    for plain, steered in zip(engine.score(PROMPTS, tokens), engine.score(PROMPTS, tokens, edit), strict=True):
        assert_array_equal(steered.logprobs, plain.logprobs)


def test_rows_without_edit_are_unsteered_in_a_mixed_batch(pair) -> None:
    hf, engine = pair
    direction = direction_of(hf)
    edits = [None, build(direction, "swfc", 1, 3.0), None, build(direction, "clamp", 2, 1.0), None]
    tokens = [[9, 8, 7]] * len(PROMPTS)
    plain, mixed = engine.score(PROMPTS, tokens), engine.score(PROMPTS, tokens, edits)
    for row, edit in enumerate(edits):
        assert (mixed[row].receipt is None) == (edit is None)
        if edit is None:
            assert_array_equal(mixed[row].logprobs, plain[row].logprobs)
        else:
            assert np.abs(mixed[row].logprobs - plain[row].logprobs).max() > 1e-3


def test_the_prefix_cache_never_mixes_steerings(pair) -> None:
    """One long prompt after another under other edits, steered tokens from the cache too: each as if alone."""
    hf, engine = pair
    direction = direction_of(hf)
    edits = [
        None,
        build(direction, "swfc", 1, 1.0),
        build(direction, "swfc", 1, 1.5),
        build(direction, "sttp", 1, 1.0, position="response"),
        None,
        build(direction, "swfc", 1, 1.0),
    ]
    engine._client.reuse = True
    try:
        cached = []
        for edit in edits:
            expected = hf.generate([LONG], SHORT, edit)[0]
            rows, drawn, jobs = engine._jobs([LONG], SHORT, edit)
            engine._client.run(jobs)
            cached.append(jobs[0].output.num_cached_tokens or 0)
            got = engine._response(rows[0], drawn[0], jobs[0])
            if not close_to_a_tie(hf, LONG, expected.token_ids, edit):
                assert got.token_ids == expected.token_ids
            if edit is not None:
                left_out = cached[-1] if edit.terms[0].position == "all" else 0
                assert got.receipt.terms[0].tokens_seen + left_out == expected.receipt.terms[0].tokens_seen
    finally:
        engine._client.reuse = False
    if engine._client.core.vllm_config.cache_config.enable_prefix_caching:
        assert cached[1] == cached[2] == 0  # other steerings' keys and values are not taken
        assert cached[3] > 0  # `response` shares the unsteered prompt
        assert cached[4] > 0
        assert cached[5] > 0
    else:
        assert not any(cached)


def test_a_steered_answer_is_no_unsteered_prompt(pair) -> None:
    """A second turn whose prompt holds the first answer must not take its keys and values, which were steered."""
    hf, engine = pair
    edit = build(direction_of(hf), "swfc", 1, 1.5, position="response")
    asked, steps = Prompt.chat("Tell me about cats and dogs."), 12
    first = list(engine.generate([asked], Sampling(max_new_tokens=70), edit)[0].token_ids)
    assert len(first) > 64  # two whole blocks of the cache
    _, _, [job] = engine._jobs([asked], Sampling(max_new_tokens=steps), None)
    job.ids += first
    engine._client.run([job])
    second = list(job.output.outputs[0].token_ids)
    score = hf.score([asked], [first + second])[0]
    sure = score.margins[-len(second) :] > 1e-3
    assert sure.sum() > steps / 2
    assert score.greedy[-len(second) :][sure].all()


def test_streams_join_to_the_answer(pair) -> None:
    hf, engine = pair
    edit = build(direction_of(hf), "swfc", 1, 0.5)
    chunks = list(engine.stream(PROMPTS[1], SHORT, edit))
    whole = engine.generate([PROMPTS[1]], SHORT, edit)[0]
    assert chunks[-1].response == whole
    assert "".join(chunk.text for chunk in chunks) == whole.text
    abandoned = engine.stream(PROMPTS[2], Sampling(max_new_tokens=100), edit)
    next(abandoned)
    abandoned.close()
    assert engine.generate([PROMPTS[1]], SHORT, edit)[0] == whole


def test_a_stop_string_ends_the_answer(pair) -> None:
    hf, engine = pair
    whole = hf.generate([PROMPTS[0]], Sampling(max_new_tokens=20))[0]
    stop = next(letter for letter in whole.text[3:] if letter.isascii() and letter not in whole.text[:3])
    how = Sampling(max_new_tokens=20, stop=(stop,))
    got, expected = (one.generate([PROMPTS[0]], how)[0] for one in (engine, hf))
    assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
    assert got.finish_reason == "stop"


def test_sampled_rows_depend_on_their_seeds_only(pair) -> None:
    hf, engine = pair
    edits, how = mixed_edits(direction_of(hf)), Sampling(0.8, 0.9, 8, seed=3)
    if engine._client.core.vllm_config.scheduler_config.enable_chunked_prefill:
        with pytest.raises(ArgumentError, match="seeds under chunked prefill"):
            engine.generate(PROMPTS, how, edits)
        return
    together = engine.generate(PROMPTS, how, edits)
    again = engine.generate(PROMPTS, how, edits)
    assert [row.token_ids for row in together] == [row.token_ids for row in again]
    assert len({row.token_ids for row in engine.generate([PROMPTS[0]] * 6, how)}) > 1


def test_what_cannot_be_steered_is_refused(pair) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.inputs.engine import tokens_input

    from vllm import SamplingParams

    _, engine = pair
    vector = np.eye(64, dtype=np.float32)[0]
    edit = Edit((EditTerm(1, vector, math.inf, 1.0, 0.0),))
    fine = encode(edit)

    def send(value, **wants) -> None:
        engine._client.core.add_request("x", tokens_input([1, 2, 3]), SamplingParams(extra_args={KEY: value}, **wants))

    five = Edit(tuple(EditTerm(1, vector, math.inf, 1.0, 0.0) for _ in range(5)))
    for value, words in [
        (fine | {"terms": []}, "no terms"),
        (fine | {"vectors": {}}, "neither registered nor sent along"),
        (fine | {"terms": [[9, *fine["terms"][0][1:]]]}, "layers 0 to 3"),
        (fine | {"vectors": {next(iter(fine["vectors"])): "AAAAAA=="}}, "expected one unit vector"),
        (fine | {"vectors": {next(iter(fine["vectors"])): packed(vector[::-1])}}, "other content than its name says"),
        (fine | {"vectors": {next(iter(fine["vectors"])): "?"}}, "no base64"),
        (fine | {"strength": 3}, "unknown \\['strength'\\]"),
        ("{", "cannot be read"),
        (encode(five), "5 terms at one layer"),
    ]:
        with pytest.raises(ArgumentError, match=words) as refused:
            send(value)
        assert isinstance(refused.value, VLLMValidationError)  # a status of 400 from vLLM's server
    with pytest.raises(ArgumentError, match="one answer's"):
        send(fine | {"ticket": "t"}, n=2, temperature=1.0)
    with pytest.raises(ArgumentError, match="do not fit"):
        engine.generate([Prompt(text="x" * 300)])
    assert not engine._client.core.has_unfinished_requests()


def test_preempted_requests_answer_the_same(folder_of, monkeypatch) -> None:
    """With room for few keys and values, requests are thrown out and run again; receipts count each token once."""
    from vllm.v1.core.sched.scheduler import Scheduler

    thrown = []
    preempt = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *args, **kw: thrown.append(1) or preempt(*args, **kw))
    options = SMALL | {"num_gpu_blocks_override": 10}
    engine = load(folder_of("llama"), compiled=False, max_length=192, settings=Settings(), options=options)
    try:
        hf = HFEngine.load(str(folder_of("llama")), dtype="float32")
        edits = mixed_edits(direction_of(hf))
        assert_same_answers(hf, engine, PROMPTS, edits, Sampling(max_new_tokens=60), most=0.6)
        assert thrown
    finally:
        close(engine)


def test_a_dead_op_stops_the_server(folder_of, monkeypatch) -> None:
    """If the graph does not run the op, the start-up test says so."""
    from steerwell.engines.vllm.blocks import Point

    forward = Point.forward
    monkeypatch.setattr(Point, "forward", lambda self, *pair: None if int(self.layer) == 2 else forward(self, *pair))
    with pytest.raises(EngineError, match="start-up test: the op behind layer 2 saw 0 of 4 tokens"):
        load(folder_of("llama"), compiled=False, options=SMALL)
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
