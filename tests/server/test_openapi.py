"""The OpenAPI document, and requests made at random from it: no 5xx, only documented statuses and forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from steerwell.serving.limits import Limits
from tests.server.live import MODEL, catalog, key_of, keys, live, service

schemathesis = pytest.importorskip("schemathesis")

CHECKS = (
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.unsupported_method,
    schemathesis.checks.negative_data_rejection,
)
ROUTES = (
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/steering",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /admin/directions",
    "PUT /admin/directions/{name}",
    "DELETE /admin/directions/{name}",
    "GET /admin/policies",
    "PUT /admin/policies/{name}",
    "DELETE /admin/policies/{name}",
    "GET /livez",
    "GET /readyz",
    "GET /metrics",
)
FEW = Limits(max_tokens=4, choices=4, body=100_000)
BEARER = {"authorization": f"Bearer {key_of('ann')}"}
ADMIN = {"authorization": f"Bearer {key_of('root')}"}


@pytest.fixture(scope="module")
def served(pilot) -> Iterator[str]:
    """A server with keys for both APIs and small limits."""
    with live(service(pilot, keys=keys("ann"), admins=keys("root"), limits=FEW)) as base:
        yield base


@pytest.fixture(scope="module")
def api(served: str) -> Any:
    """Its document, for making requests from."""
    return schemathesis.openapi.from_url(f"{served}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", ROUTES)
def test_random_requests(api: Any, label: str, mode: Any) -> None:
    method, path = label.split()

    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        model = case.body.get("model") if isinstance(case.body, dict) else None
        if isinstance(model, str) and 0 < len(model) <= 300:
            case.body["model"] = MODEL  # made-up ones would all be 404
        admin = path.startswith(("/admin", "/metrics"))
        case.call_and_validate(headers=ADMIN if admin else BEARER, checks=list(CHECKS))

    if mode.value == "positive" or method != "GET":  # nothing can be wrong about a GET that takes nothing
        run()


def test_the_document_tells_the_routes(served: str) -> None:
    document = httpx.get(f"{served}/openapi.json").json()
    told = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    assert told == set(ROUTES)
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
    assert "steering" in document["components"]["schemas"]["ChatRequest"]["properties"]
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False


def test_every_reply_is_as_documented(served: str, pilot) -> None:
    listed = httpx.get(f"{served}/v1/steering", headers=BEARER).json()
    assert {name: listed[name] for name in ("served", "d_model", "n_layers")} == {
        "served": MODEL, "d_model": pilot.info.d_model, "n_layers": pilot.info.n_layers
    }  # fmt: skip
    assert [item["name"] for item in listed["policies"]] == sorted(
        item["name"] for item in catalog(pilot).describe()["policies"]
    )
    metrics = httpx.get(f"{served}/metrics", headers=ADMIN)
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "steerwell_answers_total" in metrics.text
