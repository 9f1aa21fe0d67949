"""Directions and policies registered, replaced and removed while the server runs; requests under way keep theirs."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, File, Request, Response, UploadFile
from typing_extensions import TypedDict

from steerwell.apps.server.errors import Refusal
from steerwell.apps.server.routing import BEARER, AdminRoute, errors, service_of
from steerwell.core.artifacts import read_direction
from steerwell.core.errors import UnknownNameError
from steerwell.serving.steering import PolicySpec

ADMIN = errors(401, 404, 421)
CHANGING = errors(400, 401, 404, 408, 413, 415, 421, 500)

router = APIRouter(prefix="/admin", route_class=AdminRoute, dependencies=BEARER, tags=["Admin"])


class Directions(TypedDict):
    """Registered directions; see `/v1/steering`."""

    directions: list[dict[str, Any]]


class Policies(TypedDict):
    """Registered policies; see `/v1/steering`."""

    default: str | None
    policies: list[dict[str, Any]]


@router.get("/directions", responses=ADMIN, response_model=Directions)
async def directions(request: Request) -> Any:
    """What is registered."""
    return Directions(directions=service_of(request).catalog.describe()["directions"])


@router.put("/directions/{name}", responses=CHANGING, status_code=204, response_class=Response)
async def put_direction(
    request: Request,
    name: str,
    manifest: Annotated[UploadFile, File(description="The folder's artifact.json.")],
    tensors: Annotated[UploadFile, File(description="The folder's .safetensors file.")],
) -> None:
    """Register a direction, or replace it: the two files of a folder that `steerwell fit` wrote."""
    direction = await to_thread.run_sync(read_direction, await manifest.read(), await tensors.read())
    await to_thread.run_sync(service_of(request).catalog.put_direction, name, direction)


@router.delete("/directions/{name}", responses=CHANGING, status_code=204, response_class=Response)
async def remove_direction(request: Request, name: str) -> None:
    """Forget a direction that no policy uses."""
    _known(request, "directions", name)
    service_of(request).catalog.remove_direction(name)


@router.get("/policies", responses=ADMIN, response_model=Policies)
async def policies(request: Request) -> Any:
    """What is registered, and which policy is the default."""
    told = service_of(request).catalog.describe()
    return Policies(default=told["default"], policies=told["policies"])


@router.put("/policies/{name}", responses=CHANGING, status_code=204, response_class=Response)
async def put_policy(request: Request, name: str, policy: PolicySpec) -> None:
    """Register a policy along a registered direction, or replace it."""
    await to_thread.run_sync(service_of(request).catalog.put_policy, name, policy)


@router.delete("/policies/{name}", responses=CHANGING, status_code=204, response_class=Response)
async def remove_policy(request: Request, name: str) -> None:
    """Forget a policy that is not the default."""
    _known(request, "policies", name)
    service_of(request).catalog.remove_policy(name)


def _known(request: Request, kind: str, name: str) -> None:
    """Raise `Refusal` (404) where there is nothing of this name to remove."""
    known = [item["name"] for item in service_of(request).catalog.describe()[kind]]
    if name not in known:
        missing = UnknownNameError(kind, name[:80], known)
        raise Refusal(404, str(missing), param="name", code="not_found")
