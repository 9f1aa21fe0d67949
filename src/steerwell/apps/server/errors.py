"""Faults as OpenAI's error objects. What is not an error of ours tells nothing of the server's inside."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException
from typing_extensions import TypedDict

from steerwell.apps.server.schemas import UNSUPPORTED
from steerwell.core.errors import (
    EngineError,
    MissingDependencyError,
    NotAllowedError,
    NotFiniteError,
    OverloadedError,
    SteerwellError,
    TimedOutError,
    UnknownNameError,
)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
INTERNAL = "the server failed on this request; its log says more under the request's id (header x-request-id)"
SHOWN = 200  # characters of what came that a message repeats
BRANCHES = {"str", "int", "float", "bool", "none", "dict", "list", "literal"}  # pydantic's names of a union's parts


class Fault(TypedDict):
    """What went wrong, and the field it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """OpenAI's error object."""

    error: Fault


class Refusal(HTTPException):
    """A request that is answered with an error of this status.

    Args:
        status: HTTP status.
        message: what came, what was expected, the fix.
        param: the field it is about.
        code: for programs.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.fault = Fault(message=message, type=TYPES.get(status, "server_error"), param=param, code=code)

    @property
    def body(self) -> ErrorBody:
        """OpenAI's error object."""
        return ErrorBody(error=self.fault)

    def response(self) -> Response:
        """The error as a response; its text is ASCII, so that whatever it repeats can be sent."""
        return Response(json.dumps(self.body), self.status_code, self.headers, "application/json")


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(error.errors(), None)
    if isinstance(error, AnyHTTPException):
        return Refusal(error.status_code, _plain(error), headers=error.headers)
    if isinstance(error, OverloadedError):
        return Refusal(429, str(error), code="overloaded", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, TimedOutError):
        return Refusal(408, str(error), param="timeout", code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, NotAllowedError):
        return Refusal(403, str(error), param="steering", code="not_allowed")
    if isinstance(error, UnknownNameError):
        if error.kind == "model":
            return Refusal(404, str(error), param="model", code="model_not_found")
        return Refusal(400, str(error), param="steering", code=f"unknown_{error.kind.replace(' ', '_')}")
    if isinstance(error, NotFiniteError):
        return Refusal(400, str(error), param="steering", code="not_finite")
    if isinstance(error, EngineError):
        return Refusal(503, str(error), code="engine_failed")
    if isinstance(error, SteerwellError) and not isinstance(error, MissingDependencyError):
        named = re.match(r"([a-z_]+): ", str(error))
        return Refusal(400, str(error), param=named[1] if named else None)
    return Refusal(500, INTERNAL, code="internal_error")


def invalid(errors: Sequence[Any], form: type[BaseModel] | None) -> Refusal:
    """The first fault of a request's body, told so that it can be mended.

    Args:
        errors: pydantic's.
        form: what the body should have been; None: not known.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return _unknown(first["loc"], form)
    places = _places(first["loc"])
    if not places:
        return Refusal(400, "the body is no JSON object; send one with content-type application/json")
    for depth, place in enumerate(places, 1):
        if place in UNSUPPORTED:
            where = ".".join(places[:depth])
            return Refusal(400, f"{where}: {UNSUPPORTED[place]}; leave it out", param=where, code="unsupported_field")
    # What may be one of several things has a fault for each: the deepest is of the one that was meant.
    deepest = max((item for item in errors if _places(item["loc"])[: len(places)] == places), key=_depth)
    places = _places(deepest["loc"])
    where = ".".join(places)
    if deepest["type"] == "missing":
        return Refusal(400, f"{where}: is missing; give it", param=where, code="missing_field")
    same = [item["msg"].removeprefix("Value error, ") for item in errors if _places(item["loc"]) == places]
    told = " or ".join(dict.fromkeys(same[:6]))
    return Refusal(400, f"{where}: {told}{_got(deepest.get('input'))}", param=where, code="invalid_value")


def register(app: FastAPI) -> None:
    """Answer every error of a route in OpenAI's schema; unexpected ones go on to the guard, which logs them."""

    async def answer(_request: Request, error: Exception) -> Response:
        return refusal_of(error).response()

    for kind in (AnyHTTPException, SteerwellError, RequestValidationError):
        app.add_exception_handler(kind, answer)


def _plain(error: AnyHTTPException) -> str:
    """What a framework's error says, with the fix."""
    if error.status_code == 404:
        return "there is no such path; /openapi.json tells which there are"
    if error.status_code == 405:
        allowed = {name.lower(): value for name, value in (error.headers or {}).items()}.get("allow", "others")
        return f"this path does not take that method; it takes {allowed}"
    return str(error.detail)


def _unknown(location: Sequence[Any], form: type[BaseModel] | None) -> Refusal:
    """A field that no form has; its name is the client's, whatever it looks like."""
    parents, name = _places(location[:-1]), str(location[-1])
    where = _shown(".".join([*parents, name]))
    near = difflib.get_close_matches(name, _fields_at(form, parents) if form else (), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "leave it out"
    return Refusal(400, f"{where}: no such field; {hint}", param=where, code="unknown_field")


def _places(location: Sequence[Any]) -> list[str]:
    """A fault's place as the client wrote it: without `body`, and without pydantic's names of a union's parts."""
    names = (part for part in location[1:] if isinstance(part, int) or re.fullmatch(r"[a-z_]+", part))
    return [str(part) for part in names if part not in BRANCHES]


def _depth(item: Mapping[str, Any]) -> int:
    return len(_places(item["loc"]))


def _fields_at(form: type[BaseModel], places: Sequence[str]) -> Iterator[str]:
    """Names of the fields of the record that stands at a place."""
    kinds = [form]
    for place in places:
        if not place.isdecimal():
            kinds = [
                found
                for kind in kinds
                if place in kind.model_fields
                for found in _records(kind.model_fields[place].annotation)
            ]
    for kind in kinds:
        yield from kind.model_fields


def _records(form: Any) -> Iterator[type[BaseModel]]:
    if isinstance(form, type) and issubclass(form, BaseModel):
        yield form
    for part in get_args(form):
        yield from _records(part)


def _got(value: Any) -> str:
    return f"; got {_shown(repr(value))}" if value is None or isinstance(value, (str, int, float, bool)) else ""


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
