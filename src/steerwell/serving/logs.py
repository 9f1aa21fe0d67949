"""Structured logs: one JSON object per line, one line per request, and no prompt or answer text unless asked for.

Whatever a request says stays inside a JSON string whose control characters and non-ASCII letters are escaped, so no
request can forge a line or move a terminal's cursor.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from steerwell.core.artifacts import finite
from steerwell.core.records import Prompt
from steerwell.engines.base import Answer
from steerwell.serving.steering import Steering

REQUESTS = "steerwell.requests"
LONGEST_ID = 128  # characters of a request's id, which a client may choose
UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")


class RequestLog:
    """Writes one line per request, to the logger `steerwell.requests`.

    Args:
        log_prompts: also write the prompts and the answers' texts.
    """

    def __init__(self, log_prompts: bool = False) -> None:
        self._log_prompts = log_prompts
        self._log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
            logging.getLogger(REQUESTS),
            processors=[
                structlog.stdlib.filter_by_level,
                *_common(log_prompts),
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            wrapper_class=structlog.stdlib.BoundLogger,
        )

    def write(
        self,
        *,
        id: str,
        client: str | None,
        status: int,
        seconds: float,
        first_token: float | None = None,
        steering: Steering | None = None,
        answers: Sequence[Answer] = (),
        flagged: Sequence[bool | None] = (),
        reason: str | None = None,
    ) -> None:
        """Log a request that has ended.

        Args:
            id: the request's.
            client: name of the key that was presented, never the key; None: no key.
            status: HTTP status that was sent (200 also where a stream broke off later: see `reason`).
            seconds: from the request to its end.
            first_token: seconds to the first token; None: there was none, or it is not known.
            steering: what the request was answered under; None: it never came that far.
            answers: those that were finished.
            flagged: per answer, whether it was flagged; None: nothing judged it.
            reason: why it was refused or failed, as in `monitoring.REFUSED` and `FAILED`. Not the error's message,
                which may quote the request.
        """
        receipts = [answer.response.receipt for answer in answers if answer.response.receipt is not None]
        seen = sum(term.tokens_seen for receipt in receipts for term in receipt.terms)
        fields: dict[str, Any] = {
            "id": id[:LONGEST_ID],
            "client": client,
            "status": status,
            "reason": reason,
            "steering": steering.name if steering else None,
            "edit_id": steering.edit.id if steering and steering.edit else None,
            "monitor": steering.monitors if steering else None,
            "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.completion_tokens for answer in answers),
            "edited_share": sum(receipt.tokens_edited for receipt in receipts) / seen if seen else None,
            "flagged": list(flagged),
            "finish": [answer.response.finish_reason for answer in answers],
            "seconds": round(seconds, 6),
            "first_token_seconds": None if first_token is None else round(first_token, 6),
        }
        if self._log_prompts:
            fields["prompts"] = [_prompt(answer.response.prompt) for answer in answers]
            fields["texts"] = [answer.response.text for answer in answers]
        self._log.info("request", **fields)


def configure(log_prompts: bool = False, level: int = logging.INFO, stream: TextIO | None = None) -> RequestLog:
    """Send every log of this process through one JSON formatter, uvicorn's too, and return the log of requests.

    Start uvicorn with `log_config=None` after this, or it sets up its own handlers again. Other libraries are heard
    from warnings on. A second call replaces what the first one set up.

    Args:
        log_prompts: write prompts, answers, and the messages of unexpected exceptions, which may quote them.
        level: least level of our own and uvicorn's lines.
        stream: where to; default: stderr.
    """
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_common(log_prompts),
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _render],
        )
    )
    root = logging.getLogger()
    for old in [item for item in root.handlers if isinstance(item, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("steerwell").setLevel(level)
    for name in UVICORN:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate, logger.disabled = [], True, False
        logger.setLevel(level)
    return RequestLog(log_prompts)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that it is known among the root logger's handlers."""


def _common(log_prompts: bool) -> list[structlog.typing.Processor]:
    """What every line goes through, ours or another library's."""
    return [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _told if log_prompts else _untold,
    ]


def _untold(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """An exception as its type and where it was raised; its message may quote a request."""
    return _exception(event, message=False)


def _told(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return _exception(event, message=True)


def _exception(event: EventDict, message: bool) -> EventDict:
    raised = event.pop("exc_info", None)
    error = sys.exc_info()[1] if raised is True else raised[1] if isinstance(raised, tuple) else raised
    if isinstance(error, BaseException):
        frames = traceback.extract_tb(error.__traceback__)
        event["exception"] = type(error).__name__
        event["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        if message:
            event["message"] = str(error)
    return event


def _render(logger: WrappedLogger, method: str, event: EventDict) -> str:
    line = json.dumps(finite(dict(event)), ensure_ascii=True, default=repr)
    return line.replace("\x7f", "\\u007f")  # the one control character that ASCII-only JSON leaves as it is


def _prompt(prompt: Prompt) -> Any:
    """A prompt as JSON values: its turns, its text or its token ids."""
    if prompt.tokens is not None:
        return list(prompt.tokens)
    if prompt.text is not None:
        return prompt.text
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    return [*turns, {"role": "assistant", "content": prompt.prefill}] if prompt.prefill else turns
