"""Random requests, with the keys that test_openapi.py leaves out, and with steering that reaches the model.

Whatever a request says: no 5xx, a documented answer, and what the library does for the same edit, or its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from steerwell.core.errors import NotFiniteError, SteerwellError
from steerwell.core.records import Prompt, Sampling
from steerwell.serving.catalog import Catalog
from steerwell.serving.limits import Limits
from steerwell.serving.steering import PolicySpec, Term
from tests.server.live import MODEL, FakeScheduler, catalog, chat, key_of, keys, live, service
from tests.server.test_openapi import CHECKS, FEW, ROUTES
from tests.server.test_refusals import fault
from tests.server.test_trouble import OVERFLOWING
from tests.server.ways import QUESTION

schemathesis = pytest.importorskip("schemathesis")

ADMIN = {"authorization": f"Bearer {key_of('root')}"}
PROBES = ("GET /livez", "GET /readyz")
KEYS = [None, "", "Bearer ", "Bearer nobody's-key-that-is-long", f"Basic {key_of('ann')}"]
METHODS = ["swfc", "sttp", "stmp", "transport", "directional_ablation", "clamp", "conditional", "monitor"]


def few(examples: int) -> settings:
    """The same examples in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def keyless(pilot) -> Iterator[Any]:
    """The document of a server without any key."""
    with live(service(pilot, limits=FEW)) as base:
        yield schemathesis.openapi.from_url(f"{base}/openapi.json")


@pytest.fixture(scope="module")
def closed(pilot) -> Iterator[Any]:
    """The document of a server with keys, which nobody here has."""
    with live(service(pilot, scheduler=FakeScheduler(), keys=keys("ann"), admins=keys("root"))) as base:
        yield schemathesis.openapi.from_url(f"{base}/openapi.json")


def requests(api: Any, label: str, test: Callable[[Any], None], examples: int) -> None:
    """Try a route with requests that fit its document, and with some that do not."""
    method, path = label.split()
    made = [api[path][method].as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
    given(case=made[0] if method == "GET" and "{" not in path else st.one_of(made))(few(examples)(test))()


@pytest.mark.parametrize("label", ROUTES)
def test_a_server_without_keys(keyless: Any, label: str) -> None:
    """Nobody needs a key, and there is no admin API."""

    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL
        answer = case.call_and_validate(checks=list(CHECKS[:4]), timeout=30)
        assert answer.status_code != 401
        if " /admin" in label:
            assert answer.status_code in (404, 405)

    requests(keyless, label, check, 12)


@pytest.mark.parametrize("label", [label for label in ROUTES if label not in PROBES])
def test_nobody_comes_in_without_a_key(closed: Any, label: str) -> None:
    """Whatever else a request holds, well-formed or not."""

    def check(case: Any) -> None:
        for key in KEYS:
            headers = {} if key is None else {"authorization": key}
            answer = case.call(headers=headers, timeout=30)
            assert answer.status_code in (401, 404, 405), answer.text
            assert answer.status_code == 401 or case.path_parameters, "a name that makes the path another one"
            case.validate_response(answer, checks=list(CHECKS[:4]))

    requests(closed, label, check, 6)


NUMBERS = st.one_of(
    st.floats(-40, 40), st.sampled_from([0.0, -0.0, 1e9, -1e9, 1e-300, 5e-324, 1e10, 12345678]), st.integers(-50, 50)
)
OWN = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["made", "made", "made", "maed"]),
        "method": st.sampled_from(METHODS),
        "layers": st.lists(st.integers(0, 6), min_size=1, max_size=4),
        "strength": NUMBERS,
    },
    optional={
        "position": st.sampled_from(["all", "response"]),
        "toward": st.sampled_from(["aligned", "violating"]),
        "gate": st.just("made"),
        "threshold": NUMBERS,
        "above": st.booleans(),
    },
)
NAMED = st.fixed_dictionaries(
    {"policy": st.sampled_from(["honest", "bounded", "nobody"])}, optional={"strength": st.floats(-1, 10)}
)
BOUNDS = st.fixed_dictionaries(
    {}, optional={"bounds": st.fixed_dictionaries({"strength": st.tuples(NUMBERS, NUMBERS)})}
)
TERMS = st.lists(st.one_of(OWN, OWN, NAMED), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def steered(pilot) -> Iterator[tuple[str, Catalog]]:
    """A server that lets requests choose everything, with an admin."""
    listed = catalog(pilot)
    with live(service(pilot, catalog=listed, admins=keys("root"), limits=Limits(max_tokens=8))) as base:
        yield base, listed


def library(pilot: Any, listed: Catalog, terms: list[dict[str, Any]]) -> Any:
    """(The edit's id, the answer) of steering without a server; an error where the library gives one."""
    try:
        edit = listed.resolve(MODEL, tuple(Term.model_validate(term) for term in terms)).edit
        (response,) = pilot.generate([Prompt.chat(QUESTION)], Sampling(max_new_tokens=4), edit)
    except (SteerwellError, ValueError) as error:  # pydantic's is a ValueError
        return error
    return edit.id, response.text


def test_any_steering_is_the_librarys_or_refused(steered: tuple[str, Catalog], pilot) -> None:
    """Never unsteered, never another edit, and never a 5xx."""
    outcomes = set()

    @example(terms=OVERFLOWING)
    @given(terms=TERMS)
    @few(80)
    def check(terms: list[dict[str, Any]]) -> None:
        answer, expected = chat(steered[0], steering=terms, max_tokens=4), library(pilot, steered[1], terms)
        if isinstance(expected, Exception):
            code = fault(answer, 400)["code"]
            assert (code == "not_finite") == isinstance(expected, NotFiniteError)
            return outcomes.add(type(expected))
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["steering"]["edit_id"], told["choices"][0]["message"]["content"]) == expected
        (receipt,) = told["steering"]["receipts"]
        assert receipt["edit_id"] == expected[0]
        assert len(receipt["terms"]) > 0
        return outcomes.add(type(expected))

    check()
    assert {tuple, NotFiniteError} <= outcomes
    assert len(outcomes) > 2, "some were refused for what they are"
    assert chat(steered[0], max_tokens=4).status_code == 200


def test_any_policy_of_an_admin_works_or_is_refused(steered: tuple[str, Catalog], pilot) -> None:
    """A policy that was taken answers as the library does under the same edit; the default stays as it is."""
    base, listed = steered
    default = chat(base, max_tokens=4).json()["choices"]
    taken = []

    @given(spec=st.builds(lambda own, more: own | more, OWN, BOUNDS))
    @few(40)
    def check(spec: dict[str, Any]) -> None:
        answer = httpx.put(f"{base}/admin/policies/tried", json=spec, headers=ADMIN, timeout=30)
        if answer.status_code != 204:
            fault(answer, 400)
            return
        taken.append(PolicySpec.model_validate(spec))
        expected = library(pilot, listed, [{"policy": "tried"}])
        said = chat(base, model=f"{MODEL}:tried", max_tokens=4)
        if isinstance(expected, Exception):
            assert fault(said, 400)["code"] == "not_finite"
        else:
            assert (said.json()["steering"]["edit_id"], said.json()["choices"][0]["message"]["content"]) == expected

    check()
    assert taken
    assert chat(base, max_tokens=4).json()["choices"] == default
