"""Logs: one JSON object per line, whatever a request says, and none of its text unless asked for."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from steerwell.core.records import Edit, EditTerm, Message, Prompt, Receipt, Response, Sampling, TermReceipt
from steerwell.engines.base import Answer
from steerwell.serving.logs import LONGEST_ID, UVICORN, configure
from steerwell.serving.steering import Steering

EDIT = Edit((EditTerm(0, np.array([1, 0], np.float32), math.inf, 1.0, 0.0),))
STEERING = Steering(EDIT, "honest", (), monitors=False)
SECRET, SAID = "my mother's maiden name", "it was Smith"
FORGED = 'x"}\n{"event": "request", "status": 200}\r\u2028\x1b[2J\x00\x7f\x85\udcff'


def answer(prompt: Prompt, seen: int = 10, edited: int = 4) -> Answer:
    term = TermReceipt("made", 0, "all", seen, edited, math.nan, math.nan, 0.0, math.inf)
    return Answer(Response(prompt, SAID, (1, 2), "stop", Sampling(), Receipt(EDIT.id, (term,))), 7, 3)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged; the process's loggers are put back afterwards."""
    loggers = [logging.getLogger(name) for name in ("", "steerwell", *UVICORN)]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield io.StringIO()
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    text = stream.getvalue()
    assert text.isascii()
    assert all(letter == "\n" or letter.isprintable() for letter in text)
    return [json.loads(line) for line in text.splitlines()]


def test_a_request_is_one_line_with_its_figures_and_without_its_text(stream) -> None:
    log = configure(stream=stream)
    done = [answer(Prompt.chat(SECRET)), answer(Prompt.chat(SECRET), seen=30, edited=0)]
    log.write(
        id="r1", client="alice", status=200, seconds=1.5, first_token=0.25, steering=STEERING, answers=done,
        flagged=[True, None],
    )  # fmt: skip
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "request", "level": "info", "logger": "steerwell.requests", "id": "r1", "client": "alice",
        "status": 200, "reason": None, "steering": "honest", "edit_id": EDIT.id, "monitor": False,
        "prompt_tokens": 14, "completion_tokens": 6, "edited_share": 0.1, "flagged": [True, None],
        "finish": ["stop", "stop"], "seconds": 1.5, "first_token_seconds": 0.25,
    }  # fmt: skip


def test_a_refused_request_has_a_line_too(stream) -> None:
    configure(stream=stream).write(id="r2", client=None, status=401, seconds=0.001, reason="unauthenticated")
    (line,) = lines(stream)
    assert (line["status"], line["reason"], line["steering"], line["edit_id"]) == (401, "unauthenticated", None, None)
    assert (line["edited_share"], line["prompt_tokens"], line["finish"]) == (None, 0, [])


def test_an_answer_whose_terms_saw_nothing_has_no_edited_share(stream) -> None:
    done = [answer(Prompt.chat(SECRET), seen=0, edited=0)]
    configure(stream=stream).write(id="r", client=None, status=200, seconds=math.nan, steering=STEERING, answers=done)
    assert (lines(stream)[0]["edited_share"], lines(stream)[0]["seconds"]) == (None, None)


def test_prompts_are_written_when_asked_for(stream) -> None:
    log = configure(log_prompts=True, stream=stream)
    turns = Prompt((Message("system", "Be kind."), Message("user", SECRET)), prefill="Well")
    done = [answer(turns), answer(Prompt(text=SECRET)), answer(Prompt(tokens=(5, 6)))]
    log.write(id="r", client=None, status=200, seconds=1.0, answers=done)
    (line,) = lines(stream)
    assert line["texts"] == [SAID] * 3
    assert line["prompts"][0][-1] == {"role": "assistant", "content": "Well"}
    assert [line["prompts"][0][1]["content"], *line["prompts"][1:]] == [SECRET, SECRET, [5, 6]]


def test_nothing_that_a_request_says_forges_a_line(stream) -> None:
    log = configure(log_prompts=True, stream=stream)
    log.write(id=FORGED, client=FORGED, status=200, seconds=1.0, reason=FORGED, answers=[answer(Prompt.chat(FORGED))])
    logging.getLogger("uvicorn.access").info('%s - "%s" %d', "1.2.3.4", FORGED, 200)
    logging.getLogger("asyncio").error("lost: %s", FORGED)
    found = lines(stream)
    assert [line["event"] for line in found] == ["request", f'1.2.3.4 - "{FORGED}" 200', f"lost: {FORGED}"]
    assert found[0]["id"] == found[0]["client"] == FORGED
    assert found[0]["prompts"][0][0]["content"] == FORGED


def test_an_id_has_a_bound(stream) -> None:
    configure(stream=stream).write(id="x" * 9999, client=None, status=200, seconds=1.0)
    assert lines(stream)[0]["id"] == "x" * LONGEST_ID


@pytest.mark.parametrize("name", [*UVICORN, "steerwell.serving", "some.library"])
@pytest.mark.parametrize("log_prompts", [False, True])
def test_an_exception_tells_where_and_its_message_only_when_asked_for(stream, name: str, log_prompts: bool) -> None:
    configure(log_prompts=log_prompts, stream=stream)
    try:
        raise ValueError(f"cannot read {SECRET!r}")
    except ValueError:
        logging.getLogger(name).exception("a request failed")
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["level"]) == ("a request failed", name, "error")
    assert line["exception"] == "ValueError"
    assert "test_logs.py" in line["at"][-1]
    assert (SECRET in stream.getvalue()) == log_prompts


def test_uvicorn_writes_through_the_same_formatter_once(stream) -> None:
    """Uvicorn sets up handlers of its own unless it is started with log_config=None."""
    import uvicorn

    for name in UVICORN:
        logging.getLogger(name).addHandler(logging.StreamHandler(stream))
        logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger(name).disabled = True
    configure(stream=stream)
    configure(stream=stream)  # replaces what the first call set up
    uvicorn.Config(app=None, log_config=None)
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7, extra={"color_message": "\x1b[36m"})
    assert [line["event"] for line in lines(stream)] == ["Started server process [7]"]


def test_other_libraries_are_heard_from_warnings_on(stream) -> None:
    configure(stream=stream)
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("careful")
    logging.getLogger("steerwell.serving").info("ready")
    assert [line["event"] for line in lines(stream)] == ["careful", "ready"]


def test_the_level_is_kept(stream) -> None:
    log = configure(level=logging.WARNING, stream=stream)
    log.write(id="r", client=None, status=200, seconds=1.0)
    assert stream.getvalue() == ""
