"""The server on vLLM: a running batch whose rows are the Hugging Face engine's, the same API over HTTP, and its end."""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pytest

from steerwell.apps.server.service import Service
from steerwell.core.errors import ArgumentError, EngineError, NotFiniteError
from steerwell.core.records import Edit, EditTerm, Prompt, Sampling
from steerwell.engines.base import Asked
from steerwell.engines.hf import HFEngine
from steerwell.engines.vllm import VLLMEngine
from steerwell.engines.vllm.wire import Settings
from steerwell.serving.catalog import Catalog, PolicySpec, Requests
from steerwell.serving.limits import Limits
from steerwell.serving.logs import RequestLog
from steerwell.serving.monitoring import Monitor
from steerwell.serving.scheduler import Scheduler
from steerwell.steering.interventions import build
from tests.engines.test_contract import PROMPTS, close_to_a_tie, direction_of, mixed_edits
from tests.server.live import LOCAL, MODEL, chat, complete, events, live
from tests.vllm.test_engine import SMALL, TOLERANCE, assert_same_receipt, close, load

SHORT = Sampling(max_new_tokens=12)
HONEST = PolicySpec(direction="made", method="stmp", layers=(1,), strength=4)
ROWS = 8


@pytest.fixture
def own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


def service(engine, made, requests: Requests = "open") -> Service:
    """An engine's server, with a default policy that changes what the model says."""
    catalog = Catalog(engine.info, MODEL, requests, "honest", False)
    catalog.put_direction("made", made)
    catalog.put_policy("honest", HONEST)
    limits, monitor = Limits(batch=ROWS), Monitor()
    scheduler = Scheduler(engine, limits, monitor)
    return Service(MODEL, engine.info, scheduler, catalog, monitor, RequestLog(), engine.decode, limits, hosts=LOCAL)


def test_requests_fail_at_once_when_the_engine_core_dies(own_processes, folder_of) -> None:
    """Killed while it answers; and nothing is asked of it afterwards, so that whoever watches starts it again."""
    hf = HFEngine.load(str(folder_of("llama")), dtype="float32")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    engine = load(folder_of("llama"), compiled=False, batch_size=ROWS, settings=Settings(), options=SMALL)
    started = {child.name(): child for child in psutil.Process().children(recursive=True) if child.pid not in before}
    try:
        with live(service(engine, direction_of(hf))) as base:
            assert httpx.get(f"{base}/livez").status_code == httpx.get(f"{base}/readyz").status_code == 200
            assert chat(base, max_tokens=2).status_code == 200
            found = []
            asking = threading.Thread(target=lambda: found.append(chat(base, max_tokens=200, temperature=1)))
            asking.start()
            started["VLLM::EngineCore"].kill()
            asking.join(30)
            assert found, "the request under way hangs"
            for answer in (*found, chat(base)):
                assert answer.status_code == 503, answer.text
                assert "have ended" in answer.json()["error"]["message"]
            assert httpx.get(f"{base}/livez").status_code == httpx.get(f"{base}/readyz").status_code == 503
    finally:
        engine.close()
    _, left = psutil.wait_procs([child for name, child in started.items() if name.startswith("VLLM")], timeout=30)
    assert not left


@pytest.fixture(scope="module")
def pair(folder_of):
    """The same model under Hugging Face and under vLLM, whose table of directions is small."""
    settings = Settings(max_terms=2, captures=0, directions=6, traces=60)
    engine = load(folder_of("llama"), compiled=False, batch_size=ROWS, settings=settings, options=SMALL)
    yield HFEngine.load(str(folder_of("llama")), dtype="float32"), engine
    close(engine)


@pytest.fixture(scope="module")
def made(pair):
    """A direction of the model."""
    return direction_of(pair[0])


def answered(engine, asked, at_once: int = 1):
    """Rows of a running batch that join one after the other: per row its answer, its tokens, and the row itself."""
    batch, waiting = engine.batch(), deque(engine.row(item) for item in asked)
    rows = list(waiting)
    pieces = {row: [] for row in rows}
    while waiting or any(row.finish is None for row in rows):
        if waiting:
            batch.admit([waiting.popleft() for _ in range(min(at_once, len(waiting)))])
        batch.step()
        batch.settle()
        for row in rows:
            done = bool(pieces[row]) and pieces[row][-1].answer is not None
            if not done and row not in waiting and row.fault is None and (row.finish is None or row.settled):
                pieces[row] += [piece] if (piece := row.take()) else []
    batch.rest()
    found = []
    for row in rows:
        parts = pieces[row]
        answer = parts[-1].answer if parts and row.fault is None else None
        assert answer is None or "".join(part.text for part in parts) == answer.response.text
        found.append((answer, [token for part in parts for token in part.tokens], row))
    return found


def assert_at_rest(engine) -> None:
    """Nothing of a request is left: not here, not in vLLM, and not in the worker once it has run a step."""
    engine.generate([PROMPTS[0]], Sampling(max_new_tokens=1))
    client = engine._client
    steering = client.core.engine_core.engine_core.model_executor.driver_worker.worker.steerwell
    assert [client._inbox, +client._uses, steering._live, +steering._uses] == [{}] * 4
    assert set(steering._by_ticket) == set(steering._done)  # of rows that were dropped: the oldest go in time
    assert len(steering._slots) == ROWS
    assert not client.core.has_unfinished_requests()


def assert_same_tokens(got, expected) -> None:
    """Tokens with their log-probabilities and alternatives."""
    assert [(token.id, token.text) for token in got] == [(token.id, token.text) for token in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.logprob is None) == (theirs.logprob is None)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=TOLERANCE) if theirs.logprob is not None else True
        assert len(ours.top) == len(theirs.top)
        assert ours.edited == theirs.edited
        np.testing.assert_allclose(ours.projections, theirs.projections, atol=1e-3, rtol=1e-4)
        values = [[item[2] for item in token.top] for token in (ours, theirs)]
        np.testing.assert_allclose(*values, atol=TOLERANCE, rtol=0)
        if len(values[1]) > 1 and min(-np.diff(values[1])) > 1e-3:
            assert [item[:2] for item in ours.top[:-1]] == [item[:2] for item in theirs.top[:-1]]


def assert_same_rows(hf, engine, asked, most: float = 0.3) -> None:
    """Answers, tokens and receipts are equal, ties aside; ties are counted."""
    excluded = 0
    for item, (got, ours, row), (expected, theirs, _) in zip(
        asked, answered(engine, asked, at_once=2), answered(hf, asked), strict=True
    ):
        assert row.fault is None
        tokens = expected.response.token_ids
        if tokens and close_to_a_tie(hf, item.prompt, tokens, item.edit):
            excluded += 1
            continue
        assert replace(got.response, receipt=None) == replace(expected.response, receipt=None)
        assert (got.prompt_tokens, got.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
        assert_same_receipt(got.response.receipt, expected.response.receipt)
        assert_same_tokens(ours, theirs)
        assert_same_tokens(got.prompt_logprobs, expected.prompt_logprobs)
    assert excluded <= most * len(asked)


def test_rows_that_join_at_any_time_answer_as_hugging_face(pair, made) -> None:
    """Mixed edits at both positions and at several lengths, more rows than run at one time."""
    hf, engine = pair
    edits = [*mixed_edits(made), build(made, "swfc", [0, 3], 0.5), build(made, "clamp", 1, 1.0, position="response")]
    asked = [
        Asked(PROMPTS[row % len(PROMPTS)], Sampling(max_new_tokens=6 + row % 9), edits[row % len(edits)])
        for row in range(21)
    ]
    assert_same_rows(hf, engine, asked)
    assert_at_rest(engine)


def test_log_probabilities_and_echoes_equal_hugging_face(pair, made) -> None:
    hf, engine = pair
    asked = [
        Asked(prompt, SHORT, edit, logprobs=row, echo=row % 2 == 0)
        for row, (prompt, edit) in enumerate(zip(PROMPTS, mixed_edits(made), strict=True))
    ]
    asked += [Asked(PROMPTS[0], SHORT, logprobs=30), Asked(Prompt(tokens=(72, 105)), SHORT, logprobs=1, echo=True)]
    assert_same_rows(hf, engine, asked)


def test_traces_equal_hugging_face(pair, made) -> None:
    """What every term met at every token; together they are more than there is room for at one time."""
    hf, engine = pair
    asked = [
        Asked(PROMPTS[row % 5], Sampling(max_new_tokens=8 + row), edit, logprobs=1 if row == 3 else None, trace=True)
        for row, edit in enumerate([*mixed_edits(made), *mixed_edits(made)])
    ]
    assert_same_rows(hf, engine, asked)
    assert_at_rest(engine)
    with pytest.raises(ArgumentError, match="a trace of 61 tokens; this server keeps 60"):
        engine.row(Asked(PROMPTS[0], Sampling(max_new_tokens=61), asked[0].edit, trace=True))


def test_more_directions_than_the_table_has_rows_take_turns(pair) -> None:
    hf, engine = pair
    directions = [direction_of(hf, seed) for seed in range(4)]
    edits = [build(directions[row % 4], "swfc", [row % 3, 3], 0.1 * row) for row in range(16)]
    asked = [Asked(PROMPTS[row % 5], Sampling(max_new_tokens=6), edit) for row, edit in enumerate(edits)]
    assert_same_rows(hf, engine, asked)
    assert_at_rest(engine)


def test_a_stop_string_ends_a_row_and_frees_its_place(pair, made) -> None:
    hf, engine = pair
    edit = build(made, "swfc", 1, 0.5)
    whole = hf.generate([PROMPTS[0]], Sampling(max_new_tokens=20), edit)[0]
    stop = next(letter for letter in whole.text[3:] if letter.isascii() and letter not in whole.text[:3])
    how = Sampling(max_new_tokens=60, stop=(stop,))
    assert_same_rows(hf, engine, [Asked(PROMPTS[0], how, edit), Asked(PROMPTS[1], SHORT, None)], most=0.5)
    assert_at_rest(engine)


def test_rows_that_nobody_waits_for_are_ended(pair, made) -> None:
    _, engine = pair
    edit, long = build(made, "swfc", 1, 0.5), Sampling(max_new_tokens=150)
    batch, rows = engine.batch(), [engine.row(Asked(prompt, long, edit)) for prompt in PROMPTS[:3]]
    batch.admit(rows)
    for _ in range(3):
        batch.step()
    batch.drop(rows[:2])
    batch.step()
    assert rows[2].finish is None
    later = engine.row(Asked(PROMPTS[0], long, edit))
    batch.admit([later])
    batch.drop([later, rows[2]])  # one that waits, and one that runs
    assert batch.step() == 0
    assert_at_rest(engine)
    assert not batch._jobs


def test_what_vllm_could_not_run_is_refused_before(pair, made) -> None:
    _, engine = pair
    vector = np.eye(64, dtype=np.float32)
    three = Edit(tuple(EditTerm(1, vector[0], math.inf, 1.0, 0.0) for _ in range(3)))
    wide = Edit(tuple(EditTerm(place % 4, vector[place], math.inf, 1.0, 0.0) for place in range(7)))
    for asked, words in [
        (Asked(Prompt(tokens=(1, 264)), SHORT), "outside 0 to 263"),
        (Asked(Prompt(tokens=(-1,)), SHORT), "outside 0 to 263"),
        (Asked(Prompt(text="x" * 300), SHORT), "do not fit"),
        (Asked(PROMPTS[0], Sampling(temperature=2.5)), "0.01 to 2"),
        (Asked(PROMPTS[0], SHORT, three), "3 terms at one layer"),
        (Asked(PROMPTS[0], SHORT, wide), "7 vectors"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            engine.row(asked)
    for options, words in [({"seeed": 1}, "no 'seeed'"), ({"async_scheduling": True}, "cannot be given here")]:
        with pytest.raises(ArgumentError, match=words):
            VLLMEngine.load("pilot", options=options)


def test_a_row_that_vllm_refuses_or_ends_early_fails_alone(pair, monkeypatch) -> None:
    """Never a short answer in place of a whole one."""
    _, engine = pair
    (whole, _, _), *_ = answered(engine, [Asked(PROMPTS[0], SHORT)])
    rows = [engine.row(Asked(prompt, SHORT)) for prompt in PROMPTS[:3]]
    batch, send, wait = engine.batch(), engine._client.send, engine._client.wait

    def refuse(job):
        if job.ids == rows[1].prompt_ids:
            job.wants["temperature"] = -1.0
        return send(job)

    def end_early(flying):
        found = wait(flying)
        for output in found:
            if flying[output.request_id].ids == rows[2].prompt_ids and output.finished:
                output.outputs[0].finish_reason = "abort"
                output.outputs[0].token_ids = []
        return found

    monkeypatch.setattr(engine._client, "send", refuse)
    monkeypatch.setattr(engine._client, "wait", end_early)
    batch.admit(rows)
    while any(row.finish is None for row in rows):
        batch.step()
        batch.settle()
    assert rows[0].fault is None
    assert rows[0].response() == whole.response
    assert "vLLM refuses a request: temperature" in str(rows[1].fault)
    assert "ended this answer early (abort)" in str(rows[2].fault)
    got = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1], finish_reason="abort")])
    with pytest.raises(EngineError, match="early"):
        engine._answer(got)
    monkeypatch.undo()
    assert_at_rest(engine)


def test_activations_that_are_not_finite_fail_their_row_alone(pair, made) -> None:
    """Twice as far as a float32 can say. At one token no gate meets it: only what the token is drawn from shows it.

    vLLM gives the blocks of such a row's keys and values to others, whose answers must be whole.
    """
    hf, engine = pair
    vector = np.eye(64, dtype=np.float32)[3]
    far = Edit(tuple(EditTerm(1, vector, math.inf, 3e38, 0.0, "response") for _ in range(2)))
    mild = build(made, "swfc", 1, 0.5)
    for tokens in (1, 6):
        how = Sampling(max_new_tokens=tokens)
        with pytest.raises(NotFiniteError):
            hf.generate([PROMPTS[0]], how, far)
        asked = [Asked(PROMPTS[0], how, far), Asked(PROMPTS[1], how, mild), Asked(PROMPTS[2], how)]
        (_, _, broken), *others = answered(engine, asked, at_once=3)
        assert isinstance(broken.fault, NotFiniteError)
        assert broken.receipt is None
        for item, (answer, _, row) in zip(asked[1:], others, strict=True):
            assert row.fault is None
            assert answer.response == engine.generate([item.prompt], how, item.edit)[0]
        with pytest.raises(NotFiniteError):
            engine.generate([PROMPTS[0]], how, far)
    for _ in range(3):
        assert_same_rows(hf, engine, [Asked(prompt, SHORT) for prompt in PROMPTS])
    assert_at_rest(engine)


def test_streams_join_to_the_answer(pair, made) -> None:
    _, engine = pair
    edit = build(made, "swfc", 1, 0.5)
    chunks = list(engine.stream(PROMPTS[1], SHORT, edit))
    whole = engine.generate([PROMPTS[1]], SHORT, edit)[0]
    assert chunks[-1].response == whole
    assert "".join(chunk.text for chunk in chunks) == whole.text
    abandoned = engine.stream(PROMPTS[2], Sampling(max_new_tokens=100), edit)
    next(abandoned)
    abandoned.close()
    assert_at_rest(engine)


# --- over HTTP ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_server(pair, made):
    served = service(pair[1], made)
    with live(served) as base:
        yield served, base


def content(reply: dict) -> str:
    [choice] = reply["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_greedy_answers_and_receipts_are_those_of_hugging_face(pair, made, open_server) -> None:
    """The default policy, a policy by the model's name, a request's own steering, and none; chat and completion."""
    hf, _ = pair
    _, base = open_server
    own = {"direction": "made", "method": "sttp", "layers": [0, 2], "strength": 3, "position": "response"}
    default = build(made, "stmp", 1, 4)
    ways = [
        ({}, default),
        ({"model": f"{MODEL}:honest"}, default),
        ({"steering": own}, build(made, "sttp", [0, 2], 3, position="response")),
        ({"steering": []}, None),
        ({"model": f"{MODEL}:unsteered"}, None),
    ]
    compared = 0
    for way, edit in ways:
        for ask, prompt in ((chat, Prompt.chat("Who are you?")), (complete, Prompt(text="Who are you?"))):
            how = Sampling(max_new_tokens=12)
            reply = ask(base, "Who are you?", **way, max_tokens=12)
            assert reply.status_code == 200, reply.text
            steering = reply.json()["steering"]
            expected = hf.generate([prompt], how, edit)[0]
            assert steering["edit_id"] == (edit.id if edit else None)
            if close_to_a_tie(hf, prompt, expected.token_ids, edit):
                continue
            compared += 1
            assert content(reply.json()) == expected.text
            [receipt] = steering["receipts"]
            assert (receipt is None) == (edit is None)
            if receipt:
                assert receipt["edit_id"] == edit.id
                assert receipt["tokens_edited"] == expected.receipt.tokens_edited
                for ours, theirs in zip(receipt["terms"], expected.receipt.terms, strict=True):
                    assert (ours["tokens_seen"], ours["tokens_edited"]) == (theirs.tokens_seen, theirs.tokens_edited)
    assert compared >= len(ways)


def test_a_stream_is_the_whole_answer(open_server) -> None:
    _, base = open_server
    for ask in (chat, complete):
        whole = ask(base, max_tokens=16).json()
        streamed = ask(base, max_tokens=16, stream=True)
        *chunks, done = events(streamed)
        assert done == "[DONE]"
        parts = [json.loads(chunk) for chunk in chunks]
        texts = [
            choice.get("text") or choice.get("delta", {}).get("content") or ""
            for part in parts
            for choice in part["choices"]
        ]
        assert "".join(texts) == content(whole)
        assert parts[-1]["steering"]["receipts"] == whole["steering"]["receipts"]


def test_several_answers_seeds_and_log_probabilities(pair, open_server) -> None:
    _, base = open_server
    hot = {"temperature": 1.0, "seed": 5, "n": 2, "max_tokens": 16}
    first, again = (chat(base, **hot).json() for _ in range(2))
    texts = [[choice["message"]["content"] for choice in reply["choices"]] for reply in (first, again)]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    assert [receipt["tokens_edited"] > 0 for receipt in first["steering"]["receipts"]] == [True, True]
    assert chat(base, **hot | {"seed": 6}).json()["choices"][0]["message"]["content"] == texts[0][1]  # seed + 1
    told = chat(base, logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    for token in told:
        values = [item["logprob"] for item in token["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert (token["token"], token["logprob"]) == (token["top_logprobs"][0]["token"], values[0])
    echoed = complete(base, "The capital", logprobs=2, echo=True, max_tokens=3).json()["choices"][0]
    assert echoed["text"].startswith("The capital")
    assert "".join(echoed["logprobs"]["tokens"]) == echoed["text"]
    assert echoed["logprobs"]["token_logprobs"][0] is None


def test_a_trace_tells_every_token(open_server) -> None:
    _, base = open_server
    reply = chat(base, steering_trace=True).json()
    [tokens] = reply["steering"]["tokens"]
    assert len(tokens) == 12
    assert {(len(token["projections"]), len(token["edited"])) for token in tokens} == {(1, 1)}
    *chunks, _ = events(chat(base, steering_trace=True, stream=True))
    streamed = [token for chunk in map(json.loads, chunks) for token in chunk.get("steering", {}).get("tokens", [])]
    assert streamed == tokens
    [plain] = chat(base, steering_trace=True, steering=[]).json()["steering"]["tokens"]
    assert [token["projections"] for token in plain] == [[]] * len(plain)


def test_what_cannot_be_answered_is_a_400(open_server) -> None:
    _, base = open_server
    own = {"direction": "made", "method": "swfc", "layers": [1], "strength": 1}
    for answer, words in [
        (complete(base, [1, 264]), "outside 0 to 263"),
        (complete(base, "x" * 300), "do not fit"),
        (chat(base, steering=[own] * 3), "3 terms at one layer"),
        (chat(base, steering=own | {"layers": [4]}), "unknown layer 4"),
        (chat(base, temperature=3), "less than or equal to 2"),
        (chat(base, steerign=own), "did you mean 'steering'"),
    ]:
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]
    assert chat(base).status_code == 200


def test_a_locked_policy_cannot_be_switched_off(pair, made) -> None:
    hf, engine = pair
    edit = build(made, "stmp", 1, 4)
    with live(service(engine, made, "locked")) as base:
        plain = chat(base, "Who are you?").json()
        assert plain["steering"]["receipts"][0]["edit_id"] == edit.id
        own = {"direction": "made", "method": "swfc", "layers": [1], "strength": 0}
        for answer in (chat(base, steering=[]), chat(base, steering=own)):
            assert answer.status_code == 403, answer.text
        assert chat(base, model=f"{MODEL}:unsteered").status_code in (403, 404)
        assert chat(base, "Who are you?", vllm_xargs={"steerwell": "{}"}).status_code == 400
        assert chat(base, "Who are you?").json()["choices"] == plain["choices"]
    expected = hf.generate([Prompt.chat("Who are you?")], SHORT, edit)[0]
    if not close_to_a_tie(hf, expected.prompt, expected.token_ids, edit):
        assert content(plain) == expected.text
