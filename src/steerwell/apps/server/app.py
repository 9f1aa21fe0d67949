"""The app: routes, errors and the guard around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from steerwell import __version__
from steerwell.apps.server import admin, errors, openai, pages
from steerwell.apps.server.guard import Guard
from steerwell.apps.server.service import Service

DRAIN_SECONDS = 5.0  # once the server has been told to stop and waited already


def create_app(service: Service) -> FastAPI:
    """An app that serves one model; its scheduler starts and stops with it."""

    @asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await service.scheduler.drain(DRAIN_SECONDS)
        service.scheduler.stop()

    app = FastAPI(
        title="Steerwell",
        version=__version__,
        summary="Steered language models behind OpenAI's API.",
        lifespan=running,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    errors.register(app)
    for router in (openai.router, admin.router, pages.health, pages.metrics_router):
        app.include_router(router)
    pages.add_pages(app, service.report)
    app.add_middleware(Guard, service=service)
    document = app.openapi
    app.openapi = lambda: _without_422(document())  # type: ignore[method-assign]
    return app


def _without_422(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI documents its own answer to faulty requests; this app gives another (400)."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document
