"""What terms meet token by token: of given answers, and of answers in the making, as the Hugging Face engine tells it.

Rows whose gate was within rounding of a tie at some token are left out, counted, and may be few only.
"""

from __future__ import annotations

import pytest
from numpy.testing import assert_allclose, assert_array_equal

from steerwell.core.errors import ArgumentError, EngineError
from steerwell.core.records import Edit, Sampling
from steerwell.engines.hf import HFEngine
from steerwell.engines.vllm.client import Job
from steerwell.engines.vllm.wire import Settings
from steerwell.steering.interventions import build
from tests.engines import test_contract as contract
from tests.engines.test_contract import GATE_MARGIN, PROMPTS, direction_of, mixed_edits
from tests.vllm.test_engine import KINDS, LONG, SMALL, assert_same_receipt, close, every_method, load

ROOM = 64  # tokens; the batches below have more, so that rows take turns
SETTINGS = Settings(captures=1, directions=6, traces=ROOM)


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, folder_of):
    """The same model under Hugging Face and under vLLM, with room for traces."""
    name, arguments = KINDS[request.param]
    engine = load(folder_of(name), **{"settings": SETTINGS} | arguments)
    yield HFEngine.load(str(folder_of(name)), dtype="float32"), engine
    close(engine)


def assert_same_traces(got, expected) -> None:
    assert [trace.layer for trace in got] == [trace.layer for trace in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert_array_equal(ours.edited, theirs.edited)
        assert_allclose(ours.projection, theirs.projection, atol=1e-3, rtol=1e-3)
        assert (ours.edited.dtype, ours.projection.dtype) == (theirs.edited.dtype, theirs.projection.dtype)


def assert_scored_alike(hf, engine, prompts, tokens, edits, most: int) -> None:
    """Traces and receipts are equal, ties aside."""
    excluded = 0
    for given, got, expected in zip(
        tokens, engine.score(prompts, tokens, edits), hf.score(prompts, tokens, edits), strict=True
    ):
        if expected.receipt and min(term.gate_margin for term in expected.receipt.terms) < GATE_MARGIN:
            excluded += 1
            continue
        assert all(trace.projection.shape == (len(given),) for trace in got.traces)
        assert_same_traces(got.traces, expected.traces)
        assert_same_receipt(got.receipt, expected.receipt)
    assert excluded <= most


def test_every_method_and_position_is_traced_as_hugging_face(pair) -> None:
    hf, engine = pair
    edits = [*every_method(direction_of(hf)), None]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(edits))]
    tokens = [[70 + index, 40, 7, 99, 12, 30][: 3 + index % 4] for index in range(len(edits))]
    assert sum(map(len, tokens)) > ROOM
    assert_scored_alike(hf, engine, prompts, tokens, edits, most=3)


def test_mixed_rows_are_traced_and_plain_ones_are_not(pair) -> None:
    hf, engine = pair
    edits, tokens = mixed_edits(direction_of(hf)), [[9, 8, 7]] * len(PROMPTS)
    assert_scored_alike(hf, engine, PROMPTS, tokens, edits, most=1)
    mixed = engine.score(PROMPTS, tokens, edits)
    assert [len(score.traces) for score in mixed] == [len(edit.terms) if edit else 0 for edit in edits]
    plain = engine.score(PROMPTS, tokens)
    assert_array_equal(mixed[1].logprobs, plain[1].logprobs)


def test_long_answers_are_traced_across_chunks_and_from_the_cache(pair) -> None:
    """Long prompts in chunks of 24 tokens, answers of several chunks; then once more, when the cache has them all."""
    hf, engine = pair
    direction, answer = direction_of(hf), [5 + index * 7 % 200 for index in range(ROOM)]
    edits = [build(direction, "swfc", [1, 3], 0.5, position=where) for where in ("all", "response")]
    edits += [build(direction, "sttp", 2, 1.0, position="response")]
    for _ in range(2):
        assert_scored_alike(hf, engine, [LONG] * 3, [answer, answer[:50], answer], edits, most=1)


def test_traces_add_up_to_the_receipt(pair) -> None:
    contract.test_traces_add_up_to_the_receipt_and_pieces_to_the_text(pair[1])


def test_an_answer_that_is_too_long_to_trace_is_refused(pair) -> None:
    hf, engine = pair
    edit = build(direction_of(hf), "swfc", 1, 0.5)
    with pytest.raises(ArgumentError, match="a trace of 65 tokens; this server keeps 64"):
        engine.score([LONG, PROMPTS[0]], [[7] * (ROOM + 1), [7]], edit)
    with pytest.raises(ArgumentError, match="this server keeps 64"):
        engine._client.check(edit, trace=(3, 4 + ROOM))
    engine._client.check(edit, trace=(3, 3 + ROOM))
    assert not engine._client.core.has_unfinished_requests()
    assert len(engine.score([LONG], [[7] * (ROOM + 1)])[0].logprobs) == ROOM + 1  # unsteered


def followed(engine, jobs: list[Job]) -> list[list]:
    """Run jobs; per job the entries that it was told step by step, as soon as its tokens came."""
    client, told = engine._client, [[] for _ in jobs]
    client.register(jobs)
    waiting, flying = list(range(len(jobs))), {}
    while waiting or flying:
        while waiting and client.fits(jobs[waiting[0]]):
            at = waiting.pop(0)
            flying[client.send(jobs[at])] = at
        outputs = client.wait({name: jobs[at] for name, at in flying.items()})
        news = [(flying[item.request_id], len(item.outputs[0].token_ids)) for item in outputs]
        asked = [(at, count) for at, count in news if jobs[at].traced]
        traces = client.traces([jobs[at] for at, _ in asked], [(len(told[at]), count) for at, count in asked])
        for (at, count), terms in zip(asked, traces, strict=True):
            assert all(len(term.projection) == count - len(told[at]) > 0 for term in terms)
            told[at] += zip(*(zip(term.projection, term.edited, strict=True) for term in terms), strict=True)
        for item in outputs:
            if item.finished:
                job = jobs[flying.pop(item.request_id)]
                client.landed(job)
                job.output = item
    return told


def running(engine, prompts, edits, limit: int) -> list[Job]:
    _, _, jobs = engine._jobs(prompts, Sampling(max_new_tokens=limit), edits)
    for job in jobs:
        job.wants["output_kind"] = "CUMULATIVE"
        job.wants["max_tokens"], job.wants["ignore_eos"], job.wants["stop_token_ids"] = limit, True, []
        if job.edit is not None:
            job.steering["trace"] = (len(job.ids) - 1, len(job.ids) - 1 + limit)
    return jobs


def assert_told_as_scored(hf, engine, prompts, edits, jobs, told) -> None:
    """What was told as tokens came is what scoring says of them, and what is kept until the receipt is fetched."""
    compared = 0
    for prompt, edit, job, entries in zip(prompts, edits, jobs, told, strict=True):
        tokens = list(job.output.outputs[0].token_ids)
        if edit is None or not job.traced:
            assert not entries
            continue
        assert len(entries) == len(tokens)
        [whole] = engine._client.traces([job])
        for term, trace in enumerate(whole):
            assert_array_equal([entry[term][0] for entry in entries], trace.projection)
            assert_array_equal([entry[term][1] for entry in entries], trace.edited)
        engine._client.receipts([job])
        with pytest.raises(EngineError, match="no receipt under ticket"):
            engine._client.traces([job])
        score = hf.score([prompt], [tokens], edit)[0]
        if min(term.gate_margin for term in score.receipt.terms) >= GATE_MARGIN:
            compared += 1
            assert_same_traces(whole, score.traces)
            seen = [(term.tokens_seen, term.tokens_edited) for term in score.receipt.terms]
            assert [(term.tokens_seen, term.tokens_edited) for term in job.receipt.terms] == seen
    assert compared >= 2


def test_running_answers_tell_their_projections_as_their_tokens_come(pair) -> None:
    hf, engine = pair
    edits = mixed_edits(direction_of(hf))
    jobs = running(engine, PROMPTS, edits, 20)  # four of them: not all at one time
    jobs[4].steering.clear()  # steered, and not traced
    told = followed(engine, jobs)
    assert_told_as_scored(hf, engine, PROMPTS, edits, jobs, told)


def test_more_than_has_run_cannot_be_asked_for(pair) -> None:
    hf, engine = pair
    edit = build(direction_of(hf), "swfc", 1, 0.5)
    [job] = running(engine, [PROMPTS[0]], [edit], 5)
    followed(engine, [job])
    with pytest.raises(EngineError, match="traced tokens 2 to 5 were asked for, and 5 of them have run"):
        engine._client.traces([job], [(2, 6)])
    [untraced] = running(engine, [PROMPTS[0]], [edit], 5)
    untraced.steering.clear()
    followed(engine, [untraced])
    with pytest.raises(EngineError, match="no trace: none was asked for"):
        engine._client.traces([untraced], [(0, 1)])


def test_an_abandoned_request_gives_its_places_back(pair) -> None:
    hf, engine = pair
    client, edit = engine._client, build(direction_of(hf), "swfc", 1, 0.5)
    for _ in range(3):
        [job] = running(engine, [PROMPTS[0]], [edit], ROOM)
        client.register([job])
        assert client.fits(job)
        name = client.send(job)
        assert not client.fits(job)  # another one of this size
        client.wait({name: job})
        client.abort({name: job})
        assert client.fits(job)
    assert len(engine.score([PROMPTS[0]], [[7] * ROOM], edit)[0].traces[0].projection) == ROOM


def test_preempted_requests_are_traced_right(folder_of, monkeypatch) -> None:
    """With room for few keys and values, requests are thrown out and run again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    thrown, preempt = [], Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *args, **kw: thrown.append(1) or preempt(*args, **kw))
    options = SMALL | {"num_gpu_blocks_override": 10}
    engine = load(folder_of("llama"), compiled=False, max_length=192, settings=Settings(traces=300), options=options)
    try:
        hf = HFEngine.load(str(folder_of("llama")), dtype="float32")
        edits = mixed_edits(direction_of(hf))
        jobs = running(engine, PROMPTS, edits, 60)
        told = followed(engine, jobs)
        assert thrown
        assert_told_as_scored(hf, engine, PROMPTS, edits, jobs, told)
    finally:
        close(engine)


def test_without_room_scores_carry_no_traces_and_a_silent_op_stops_the_server(folder_of, monkeypatch) -> None:
    """Without the setting the op gets no buffer; with it, one that tells nothing is found at start-up."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from steerwell.engines.vllm.blocks import Point

    init = Point.__init__
    given = []

    def without(self, buffers, index, reads, traces) -> None:
        given.append(traces)
        init(self, buffers, index, reads, False)

    monkeypatch.setattr(Point, "__init__", without)
    engine = load(folder_of("llama"), compiled=False, settings=Settings(), options=SMALL)
    try:
        edit = Edit((build(direction_of(HFEngine.load(str(folder_of("llama")))), "swfc", 1, 0.5)).terms)
        score = engine.score([PROMPTS[0]], [[9, 8]], edit)[0]
        assert score.traces == ()
        assert score.receipt.terms[0].tokens_seen > 2
        assert given == [False] * 4
    finally:
        close(engine)
    with pytest.raises(EngineError, match="start-up test: the op told no trace"):
        load(folder_of("llama"), compiled=False, settings=SETTINGS, options=SMALL)
    cleanup_dist_env_and_memory()
