"""Routes that ask for a key before anything is read, and tell what is wrong with a body in OpenAI's schema."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.params import Form
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from steerwell.apps.server.errors import ErrorBody, Refusal, invalid
from steerwell.apps.server.service import Service, Visit
from steerwell.serving.keys import Keys

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
BEARER = [Depends(HTTPBearer(auto_error=False, description="A key, as OpenAI's clients send it."))]  # for the document


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documented errors of a route."""
    return {status: {"model": ErrorBody, "description": "An error, in OpenAI's schema."} for status in statuses}


def service_of(request: Request) -> Service:
    """What the app serves."""
    service: Service = request.app.state.service
    return service


def visit_of(request: Request) -> Visit:
    """This request's notes."""
    visit: Visit = request.state.visit
    return visit


class OpenRoute(APIRoute):
    """A route for everybody; bodies are JSON, and their faults are told by field."""

    def get_route_handler(self) -> Handler:
        """FastAPI's handler, with the checks around it."""
        original = super().get_route_handler()
        form = _json_form(self)

        async def handle(request: Request) -> Response:
            self.admit(request)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if form is not None and kind != "application/json":
                raise Refusal(415, f"content-type: got {kind[:80]!r}; send application/json", code="content_type")
            try:
                return await original(request)
            except RequestValidationError as error:
                raise invalid(error.errors(), form) from error

        return handle

    def admit(self, request: Request) -> None:
        """Raise `Refusal` unless the request may come in."""


class ClientRoute(OpenRoute):
    """A route for holders of an API key, or for everybody where the server has no keys."""

    def admit(self, request: Request) -> None:
        """Check the key."""
        keys = service_of(request).keys
        if keys:
            _present(request, keys, "API")


class AdminRoute(OpenRoute):
    """A route for holders of an admin key; without admin keys it does not exist."""

    def admit(self, request: Request) -> None:
        """Check the key."""
        admins = service_of(request).admins
        if not admins:
            raise Refusal(404, "there is no admin API; start the server with --admin-keys FILE", code="no_admin")
        _present(request, admins, "admin")


class MetricsRoute(OpenRoute):
    """A route for holders of an admin key, else of an API key, else for everybody."""

    def admit(self, request: Request) -> None:
        """Check the key."""
        service = service_of(request)
        if service.admins:
            _present(request, service.admins, "admin")
        elif service.keys:
            _present(request, service.keys, "API")


def _json_form(route: APIRoute) -> type[BaseModel] | None:
    """The record that a route reads as JSON; None: it reads no body, or a form with files."""
    field = route.body_field
    kind = field.field_info.annotation if field and not isinstance(field.field_info, Form) else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _present(request: Request, keys: Keys, kind: str) -> None:
    """Note who holds the presented key; raise `Refusal` for a wrong or missing one."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    name = keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
    if name is None:
        raise Refusal(
            401,
            f"authorization: expected 'Bearer KEY' with an {kind} key of this server",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    visit_of(request).client = name
