"""What the server refuses, with which status, and what it says: the field, what was expected, the fix."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from steerwell.apps.server.errors import INTERNAL, refusal_of
from steerwell.core.errors import (
    ArgumentError,
    EngineError,
    MissingDependencyError,
    NotAllowedError,
    NotFiniteError,
    OverloadedError,
    TimedOutError,
    UnknownNameError,
)
from tests.server.live import MODEL, FakeScheduler, chat, complete, live, service

LAYERS = {"method": "swfc", "layers": [0], "strength": 1}
CHAT = [
    ({"steerign": []}, "steerign", "did you mean 'steering'?"),
    ({"temprature": 0}, "temprature", "did you mean 'temperature'?"),
    ({"maxTokens": 3}, "maxTokens", "no such field"),
    ({"stream_options": {"include_usag": True}}, "stream_options.include_usag", "did you mean 'include_usage'?"),
    ({"messages": [{"role": "user", "content": "x", "contnt": ""}]}, "messages.0.contnt", "did you mean 'content'?"),
    ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
    ({"tool_choice": "required"}, "tool_choice", "calls no tools"),
    ({"functions": [{}]}, "functions", "calls no functions"),
    ({"response_format": {"type": "json_object"}}, "response_format", "plain text"),
    ({"logit_bias": {"5": 100}}, "logit_bias", "does not bias"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "no penalties"),
    ({"presence_penalty": -1}, "presence_penalty", "no penalties"),
    ({"modalities": ["audio"]}, "modalities", "plain text"),
    ({"audio": {}}, "audio", "no audio"),
    ({"prediction": {"type": "content", "content": ""}}, "prediction", "leave it out"),
    ({"web_search_options": {}}, "web_search_options", "leave it out"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "leave it out"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "string"),
    ({"messages": [{"role": "user", "content": "x", "name": "Al"}]}, "messages.0.name", "names"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
        "'text'",
    ),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls", "no tools"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "0"}, "temperature", "valid number"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 17}, "n", "16 at most"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5000}, "max_tokens", "2048 at most"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one of them"),
    ({"stop": [""]}, "stop.0", "at least 1"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"seed": 2**63}, "seed", "less than or equal to"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"timeout": 0}, "timeout", "greater than 0"),
    ({"steering": "honest"}, "steering", ""),
    ({"steering": {"polcy": "honest"}}, "steering.0.polcy", "did you mean 'policy'?"),
    ({"steering": {"policy": "honset"}}, "steering", "Did you mean 'honest'?"),
    ({"steering": {"direction": "maed", **LAYERS}}, "steering", "Did you mean 'made'?"),
    ({"steering": {"direction": "made", **LAYERS, "method": "swfx"}}, "steering", "known: "),
    ({"steering": {"direction": "made", **LAYERS, "layers": [77]}}, "steering", "unknown layer 77"),
    ({"steering": {"direction": "made", "method": "swfc", "layers": [0]}}, "steering.0", "strength missing"),
    ({"steering": {"policy": "bounded", "strength": 9}}, None, "2 to 8"),
    ({"steering": {"policy": "honest", "layers": [1]}}, "steering.0", "only 'strength'"),
    ({"steering": [{"policy": "honest"}] * 9}, "steering", "at most 8"),
    ({"model": f"{MODEL}:bounded", "steering": {"policy": "honest"}}, "steering", "something else"),
]
COMPLETION = [
    ({"prompt": None}, "prompt", ""),
    ({"prompt": []}, "prompt", ""),
    ({"prompt": [[]]}, "prompt.0", ""),
    ({"prompt": [-1]}, "prompt.0", ""),
    ({"prompt": [10**6]}, "prompt", "token"),
    ({"prompt": ["x"] * 17}, "n", "16 at most"),
    ({"best_of": 3}, "best_of", "equal to 'n'"),
    ({"suffix": "x"}, "suffix", "fill in"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"echo": True, "stream": True, "logprobs": 0}, "echo", "cannot be streamed"),
    ({"messages": []}, "messages", "no such field"),
]


def fault(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object of a refusal."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(("fields", "param", "said"), CHAT)
def test_a_chat_field_that_cannot_be_honoured(base: str, fields: dict[str, Any], param: str, said: str) -> None:
    error = fault(chat(base, **fields))
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(("fields", "param", "said"), COMPLETION)
def test_a_completion_field_that_cannot_be_honoured(base: str, fields: dict[str, Any], param: str, said: str) -> None:
    error = fault(complete(base, **fields))
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": None},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}},
        {"prompt_cache_key": "x", "stream_options": {"include_usage": True}, "modalities": ["text"]},
        dict.fromkeys(("n", "stop", "seed", "temperature", "top_p", "stream", "steering", "tools", "logprobs")),
    ],
)
def test_what_asks_for_nothing_is_accepted(base: str, fields: dict[str, Any]) -> None:
    assert chat(base, **fields).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"seed": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"model": "steerwell-pilot", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\ud800": 1, "model": "steerwell-pilot", "messages": [{"role": "user", "content": "x"}]}',
    ],
)
def test_a_body_that_is_no_request(base: str, body: bytes) -> None:
    answer = httpx.post(
        f"{base}/v1/chat/completions", content=body, headers={"content-type": "application/json"}, timeout=60
    )
    fault(answer)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_only_json_is_read(base: str, kind: str) -> None:
    """A page of another site could send the others without being asked."""
    answer = httpx.post(f"{base}/v1/chat/completions", content=b"{}", headers={"content-type": kind})
    assert "application/json" in fault(answer, 415)["message"]


def test_paths_and_methods(base: str) -> None:
    assert "openapi.json" in fault(httpx.get(f"{base}/v1/nothing"), 404)["message"]
    assert fault(httpx.get(f"{base}/v1/chat/completions"), 405)["message"].endswith("POST")
    assert httpx.post(f"{base}/v1/models").headers["allow"] == "GET"
    fault(httpx.get(f"{base}/docs"), 404)
    fault(httpx.get(f"{base}/v1/models/"), 404)
    error = fault(chat(base, model="gpt-5"), 404)
    assert (error["param"], error["code"], error["type"]) == ("model", "model_not_found", "not_found_error")


def test_a_long_value_is_not_repeated_whole(base: str) -> None:
    assert len(fault(chat(base, temperature="x" * 10_000))["message"]) < 400
    assert len(fault(chat(base, **{"x" * 10_000: 1}))["message"]) < 400
    assert len(fault(chat(base, model="x" * 299), 404)["message"]) < 500


@pytest.mark.parametrize(
    ("error", "status", "kind", "param"),
    [
        (ArgumentError("stop: got 3; expected text"), 400, "invalid_request_error", "stop"),
        (UnknownNameError("model", "x", ["y"]), 404, "not_found_error", "model"),
        (UnknownNameError("direction", "x", ["y"]), 400, "invalid_request_error", "steering"),
        (NotAllowedError("no"), 403, "permission_error", "steering"),
        (OverloadedError("full", 7), 429, "rate_limit_error", None),
        (TimedOutError("late"), 408, "timeout_error", "timeout"),
        (NotFiniteError("activations are not finite"), 400, "invalid_request_error", "steering"),
        (EngineError("a step of the model failed; ask again"), 503, "unavailable_error", None),
        (MissingDependencyError("x", "y"), 500, "server_error", None),
        (RuntimeError("a secret"), 500, "server_error", None),
    ],
)
def test_errors_have_a_status_and_a_type(error: Exception, status: int, kind: str, param: str | None) -> None:
    refusal = refusal_of(error)
    told = refusal.fault
    assert (refusal.status_code, told["type"], told["param"]) == (status, kind, param)
    assert told["message"] == (INTERNAL if status == 500 else str(error))


def test_a_full_queue_says_when_to_come_back(pilot) -> None:
    with live(service(pilot, scheduler=FakeScheduler(refusal=OverloadedError("256 answers wait", 7)))) as base:
        for stream in (False, True):
            answer = chat(base, stream=stream)
            assert answer.headers["retry-after"] == "7"
            assert fault(answer, 429)["code"] == "overloaded"


def test_a_late_answer_is_not_tried_again_by_the_client(pilot) -> None:
    with live(service(pilot, scheduler=FakeScheduler([], TimedOutError("not answered in its time")))) as base:
        for stream in (False, True):
            answer = chat(base, stream=stream)
            assert answer.headers["x-should-retry"] == "false"
            assert fault(answer, 408)["param"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_inside_stays_inside(pilot, stream: bool) -> None:
    with live(service(pilot, scheduler=FakeScheduler([], RuntimeError("a secret")))) as base:
        answer = chat(base, stream=stream)
        assert fault(answer, 500)["message"] == INTERNAL
        assert answer.headers["x-request-id"].startswith("req_")
        assert "secret" not in answer.text
        metrics = httpx.get(f"{base}/metrics").text
    assert 'steerwell_failed_requests_total{reason="internal"} 1.0' in metrics


@pytest.mark.parametrize(
    ("error", "message", "reason"),
    [
        (RuntimeError("a secret"), INTERNAL, "internal"),
        (EngineError("activations are not finite; lower the strength"), "lower the strength", "engine"),
        (TimedOutError("not answered in its time"), "not answered in its time", "timed_out"),
    ],
)
def test_an_error_in_the_middle_of_a_stream_is_an_event(pilot, error: Exception, message: str, reason: str) -> None:
    fake = FakeScheduler(["a", "b"], error)
    with live(service(pilot, scheduler=fake)) as base:
        answer = chat(base, stream=True)
        metrics = httpx.get(f"{base}/metrics").text
    assert answer.status_code == 200
    *others, last = [part for part in answer.text.split("\n\n") if part]
    assert message in last
    assert '"error":{"message"' in last
    assert "[DONE]" not in answer.text
    assert len(others) == 3, "the role and two pieces"
    assert "secret" not in answer.text
    assert fake.tickets[0].cancelled.is_set()
    assert f'steerwell_failed_requests_total{{reason="{reason}"}} 1.0' in metrics


def test_a_strength_that_breaks_the_model_is_told(base: str) -> None:
    steering = {"direction": "made", "method": "swfc", "layers": [0, 1, 2, 3, 4, 5], "strength": 1e9}
    for stream in (False, True):
        answer = chat(base, steering=steering, stream=stream)
        if answer.status_code != 200:
            assert "strength" in fault(answer)["message"]
    assert chat(base).status_code == 200, "and the server goes on"


def test_a_prompt_is_not_scored_as_if_steered(base) -> None:
    term = {"direction": "made", "method": "swfc", "layer": 1, "strength": 1}
    asked = {"echo": True, "logprobs": 1, "max_tokens": 1}
    late = complete(base, steering={**term, "position": "response"}, **asked)
    assert fault(late)["param"] == "echo"
    for fine in (term, {**term, "method": "monitor", "position": "response"}):
        assert complete(base, steering=fine, **asked).status_code == 200
