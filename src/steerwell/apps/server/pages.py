"""Health, metrics, the playground and a study's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from typing_extensions import TypedDict

from steerwell.apps.server.routing import BEARER, MetricsRoute, OpenRoute, errors, service_of

PAGE = Path(__file__).parent / "playground" / "page"
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
TEXT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}


class Health(TypedDict):
    """Whether the server runs, or takes requests."""

    status: Literal["alive", "dead", "ready", "not ready"]


UNWELL: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "Not now."}}

health = APIRouter(route_class=OpenRoute, tags=["Health"])
metrics_router = APIRouter(route_class=MetricsRoute, dependencies=BEARER, tags=["Health"])


@health.get("/livez", responses=errors(421) | UNWELL, response_model=Health)
async def livez(request: Request) -> Response:
    """Whether the server runs; if not, start it again."""
    alive = service_of(request).scheduler.alive
    return JSONResponse(Health(status="alive" if alive else "dead"), 200 if alive else 503)


@health.get("/readyz", responses=errors(421) | UNWELL, response_model=Health)
async def readyz(request: Request) -> Response:
    """Whether it takes requests; it does not while its queue is full, or once it is about to stop."""
    ready = service_of(request).scheduler.ready
    return JSONResponse(Health(status="ready" if ready else "not ready"), 200 if ready else 503)


@metrics_router.get("/metrics", responses={**errors(401, 421), 200: TEXT}, response_class=Response)
async def metrics(request: Request) -> Response:
    """Load and steering, for Prometheus."""
    body, kind = service_of(request).monitor.exposition()
    return Response(body, headers={"content-type": kind})


def add_pages(app: FastAPI, report: Path | None) -> None:
    """A route per file of the playground (its index at `/`), and a study's page at `/report`.

    The files are listed here: no path of a request is looked up on the disk.
    """
    for file in sorted(item for item in PAGE.rglob("*") if item.is_file()):
        place = file.relative_to(PAGE).as_posix()
        _add_file(app, "/" if place == "index.html" else f"/{place}", file, {})
    if report is not None:
        _add_file(app, "/report", report, {"content-security-policy": REPORT_POLICY})


def _add_file(app: FastAPI, path: str, file: Path, headers: dict[str, str]) -> None:
    async def send() -> Response:
        return FileResponse(file, headers={**headers, "cache-control": "no-cache"})

    app.add_api_route(path, send, include_in_schema=False, methods=["GET", "HEAD"], response_class=Response)
