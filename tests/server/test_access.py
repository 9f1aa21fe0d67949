"""Who comes in: keys, admin keys, host names, sizes, and what browsers are told."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from steerwell.apps.server import run, start
from steerwell.core.artifacts import save_direction
from steerwell.core.errors import ArgumentError
from steerwell.serving.keys import Keys
from steerwell.serving.limits import Limits
from tests.made import calibration, direction
from tests.server.live import MODEL, FakeScheduler, catalog, chat, key_of, keys, live, post, service
from tests.server.test_refusals import fault

CLIENT = {"authorization": f"Bearer {key_of('ann')}"}
ADMIN = {"authorization": f"Bearer {key_of('root')}"}
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
POLICY = {"direction": "made", "method": "swfc", "layers": [0], "strength": 1}


@pytest.fixture(scope="module")
def closed(pilot) -> Iterator[str]:
    """A server with a client key and an admin key."""
    with live(service(pilot, keys=keys("ann", "ben"), admins=keys("root"), limits=Limits(body=10_000))) as base:
        yield base


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong-key-that-is-long-too", key_of("ann"), "Basic x"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/steering", "/v1/models/x", "/v1/chat/completions"])
def test_without_a_key_nothing_is_told(closed: str, path: str, header: str | None) -> None:
    method = "POST" if path.endswith("completions") else "GET"
    answer = httpx.request(
        method, f"{closed}{path}", headers={} if header is None else {"authorization": header}, json=BODY
    )
    assert fault(answer, 401)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_is_asked_for_before_the_body_is_read(closed: str) -> None:
    answer = httpx.post(f"{closed}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    fault(answer, 401)


def test_a_key_opens_what_it_is_for(closed: str) -> None:
    assert httpx.get(f"{closed}/v1/models", headers=CLIENT).status_code == 200
    assert post(closed, "/v1/chat/completions", BODY, headers=CLIENT).status_code == 200
    assert httpx.get(f"{closed}/admin/policies", headers=ADMIN).status_code == 200
    assert httpx.get(f"{closed}/metrics", headers=ADMIN).status_code == 200


def test_each_kind_of_key_opens_nothing_else(closed: str) -> None:
    fault(httpx.get(f"{closed}/v1/models", headers=ADMIN), 401)
    fault(httpx.get(f"{closed}/admin/policies", headers=CLIENT), 401)
    fault(httpx.get(f"{closed}/metrics", headers=CLIENT), 401)
    fault(httpx.get(f"{closed}/metrics"), 401)


def test_health_is_open_to_probes(closed: str) -> None:
    assert httpx.get(f"{closed}/livez").json() == {"status": "alive"}
    assert httpx.get(f"{closed}/readyz").json() == {"status": "ready"}


def test_without_an_admin_key_there_is_no_admin_api(base: str) -> None:
    for method, path in (("GET", "directions"), ("PUT", "policies/x"), ("DELETE", "directions/made")):
        assert fault(httpx.request(method, f"{base}/admin/{path}", headers=ADMIN), 404)["code"] == "no_admin"


def test_clients_are_told_apart_by_their_keys(pilot) -> None:
    fake = FakeScheduler()
    with live(service(pilot, scheduler=fake, keys=keys("ann", "ben"))) as base:
        for name in ("ann", "ben"):
            post(base, "/v1/chat/completions", BODY, headers={"authorization": f"bearer {key_of(name)}"})
    assert fake.clients == ["ann", "ben"]


def test_directions_and_policies_are_swapped_while_the_server_runs(pilot, tmp_path) -> None:
    info = pilot.info
    layers = tuple(calibration(boundary=0.1 * layer) for layer in range(info.n_layers))
    folder = save_direction(direction(1, model=info, calibration=layers), tmp_path / "other")
    tensors = next(folder.glob("*.safetensors"))
    files = {"manifest": (folder / "artifact.json").read_bytes(), "tensors": tensors.read_bytes()}
    with live(service(pilot, admins=keys("root"))) as base, httpx.Client(base_url=base, headers=ADMIN) as admin:

        def names(kind: str) -> list[str]:
            return [item["name"] for item in admin.get(f"/admin/{kind}").json()[kind]]

        before = chat(base).json()["steering"]["edit_id"]
        assert admin.put("/admin/directions/other", files=files).status_code == 204
        assert names("directions") == ["made", "other"]
        assert admin.put("/admin/policies/new", json=POLICY | {"direction": "other"}).status_code == 204
        assert names("policies") == ["bounded", "honest", "new"]
        assert chat(base, model=f"{MODEL}:new").json()["steering"]["name"] == "new"
        assert "'new'" in fault(admin.delete("/admin/directions/other"))["message"], "in use"
        assert "default" in fault(admin.delete("/admin/policies/honest"))["message"]
        assert admin.put("/admin/policies/honest", json=POLICY).status_code == 204
        assert admin.get("/admin/policies").json()["default"] == "honest"
        assert chat(base).json()["steering"]["edit_id"] != before
        assert admin.delete("/admin/policies/new").status_code == 204
        assert admin.delete("/admin/directions/other").status_code == 204
        assert names("directions") == ["made"]
        fault(chat(base, model=f"{MODEL}:new"), 404)
        fault(admin.delete("/admin/policies/new"), 404)
        fault(admin.delete("/admin/directions/other"), 404)
        damaged = files | {"tensors": files["tensors"][:-9]}
        assert "truncated or altered" in fault(admin.put("/admin/directions/other", files=damaged))["message"]
        path = json.loads(files["manifest"])
        path["tensors"]["file"] = "../../../etc/passwd"
        fault(admin.put("/admin/directions/other", files=files | {"manifest": json.dumps(path).encode()}))
        fault(admin.put("/admin/directions/other", files={"manifest": b"[]", "tensors": b""}))
        assert "missing" in fault(admin.put("/admin/directions/other", files={"manifest": b"x"}))["message"]
        assert "did you mean 'method'?" in fault(admin.put("/admin/policies/x", json=POLICY | {"methd": 1}))["message"]
        fault(admin.put("/admin/policies/x", json=POLICY | {"direction": "nothing"}))
        fault(admin.put("/admin/policies/..%2fx", json=POLICY), 404)
        assert names("policies") == ["bounded", "honest"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_not_read(closed: str, chunked: bool) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    content = parts() if chunked else b"x" * 1_000_000
    headers = CLIENT | {"content-type": "application/json"}
    try:
        answer = httpx.post(f"{closed}/v1/chat/completions", content=content, headers=headers)
    except (httpx.WriteError, httpx.ReadError):
        return  # the server has answered and hung up before all was sent
    assert "10000 bytes" in fault(answer, 413)["message"]
    assert answer.headers["connection"] == "close"


def test_an_upload_may_be_larger(closed: str) -> None:
    body = POLICY | {"gate": "x" * 20_000}
    fault(httpx.put(f"{closed}/admin/policies/x", json=body, headers=ADMIN), 400)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "", "127.0.0.1.nip.io"])
def test_a_foreign_host_name_is_refused_on_loopback(base: str, host: str) -> None:
    for path in ("/", "/v1/models", "/livez"):
        fault(httpx.get(f"{base}{path}", headers={"host": host}), 421)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9", "[::1]:8000", "LOCALHOST:1"])
def test_its_own_names_are_not(base: str, host: str) -> None:
    assert httpx.get(f"{base}/livez", headers={"host": host}).status_code == 200


def test_other_origins_get_no_leave(base: str) -> None:
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for answer in (
        httpx.options(f"{base}/v1/chat/completions", headers=asked),
        httpx.get(f"{base}/v1/models", headers=asked),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert httpx.options(f"{base}/v1/chat/completions", headers=asked).status_code == 405


def test_pages_may_load_nothing_from_elsewhere(base: str) -> None:
    for path in ("/", "/v1/models", "/nothing"):
        headers = httpx.get(f"{base}{path}").headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_the_playground_is_at_the_root(base: str) -> None:
    page = httpx.get(f"{base}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "app.js" in page.text
    assert "javascript" in httpx.get(f"{base}/app.js").headers["content-type"]
    for path in ("/../pages.py", "/%2e%2e/pages.py", "/__init__.py", "//etc/passwd", "/vendor", "/vendor/"):
        fault(httpx.get(f"{base}{path}"), 404)


def test_a_report_is_one_page(pilot, tmp_path) -> None:
    (tmp_path / "report.html").write_text("<p>found</p>")
    (tmp_path / "secret.txt").write_text("secret")
    with live(service(pilot, scheduler=FakeScheduler(), report=start.report_page(tmp_path))) as base:
        page = httpx.get(f"{base}/report")
        assert page.text == "<p>found</p>"
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert httpx.get(f"{base}/v1/steering").json()["report"] is True
        fault(httpx.get(f"{base}/report/secret.txt"), 404)
        fault(httpx.get(f"{base}/report/../secret.txt"), 404)


def test_without_a_report_there_is_none(base: str) -> None:
    fault(httpx.get(f"{base}/report"), 404)
    assert httpx.get(f"{base}/v1/steering").json()["report"] is False


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ArgumentError, match="--no-auth"):
        start.require_safe(host, Keys(), no_auth=False)
    start.require_safe(host, Keys(), no_auth=True)
    start.require_safe(host, keys("ann"), no_auth=False)
    assert start.hosts_of(host, []) is None


def test_this_machine_needs_none() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        start.require_safe(host, Keys(), no_auth=False)
        assert host in (start.hosts_of(host, []) or ())
    assert "api.example" in (start.hosts_of("127.0.0.1", ["API.example"]) or ())


def test_requests_and_their_keys_are_logged_without_them(pilot, caplog: pytest.LogCaptureFixture) -> None:
    secret = "a-very-secret-prompt"
    with caplog.at_level("INFO"), live(service(pilot, scheduler=FakeScheduler(), keys=keys("ann"))) as base:
        sent = BODY | {"messages": [{"role": "user", "content": secret}]}
        answer = post(base, "/v1/chat/completions", sent, headers=CLIENT)
        httpx.get(f"{base}/livez")
    lines = [record for record in caplog.records if record.name == "steerwell.requests"]
    assert len(lines) == 1, "probes are not logged"
    told = str(lines[0].msg)
    assert answer.headers["x-request-id"] in told
    assert "'client': 'ann'" in told
    assert secret not in caplog.text
    assert key_of("ann") not in caplog.text


def test_monitor_only_flags_and_edits_nothing(pilot) -> None:
    with live(service(pilot, catalog=catalog(pilot, "locked", monitor_only=True))) as base:
        watched = chat(base).json()
    with live(service(pilot)) as base:
        plain = chat(base, steering=[]).json()
    assert watched["choices"][0]["message"] == plain["choices"][0]["message"]
    assert watched["steering"]["monitor"] is True
    assert watched["steering"]["flagged"][0] in (True, False)
    term = watched["steering"]["receipts"][0]["terms"][0]
    assert term["projection_before"] == term["projection_after"]


def test_pieces_are_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off for sockets that name their protocol: it held first tokens back by 40 ms."""
    with run.bound("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
