"""Who may ask for which steering, and that nothing in a request gets around it."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from steerwell.core.errors import ArgumentError, ModelMismatchError, NotAllowedError, SteerwellError, UnknownNameError
from steerwell.core.policy import Policy
from steerwell.core.records import Direction, Edit, Receipt, TermReceipt
from steerwell.core.settings import Settings, read_settings
from steerwell.serving.catalog import Catalog, PolicySpec, Steering, SteeringField, Watch, flagged
from steerwell.serving.snapshot import CACHED
from steerwell.steering.interventions import METHODS, build
from steerwell.studies.config import STRENGTHS
from tests import made

MODEL = "pilot"
HONEST, KIND = made.direction(1, concept="dishonesty"), made.direction(2, concept="hostility")
POLICIES: dict[str, dict[str, Any]] = {
    "honest": {
        "direction": "dishonesty", "method": "sttp", "layers": [0, 2], "strength": 12, "bounds": {"strength": (2, 24)},
    },
    "kind": {"direction": "hostility", "method": "swfc", "layer": 1, "strength": 1.5},
}  # fmt: skip
OWN = {"direction": "dishonesty", "method": "swfc", "layers": [1], "strength": 0.5}


class Body(Settings):
    """As a request's body holds the field."""

    steering: SteeringField | None = None


def field(value: Any) -> Any:
    return read_settings(Body, {"steering": value}, "the request").steering


def spec(**fields: Any) -> PolicySpec:
    return PolicySpec.model_validate(fields)


def catalog(requests: Any = "open", default: str | None = "honest", monitor_only: bool = False, **more: Any) -> Catalog:
    found = Catalog(made.model_info(), MODEL, requests, default, monitor_only, **more)
    found.put_direction("dishonesty", HONEST)
    found.put_direction("hostility", KIND)
    for name, fields in POLICIES.items():
        found.put_policy(name, spec(**fields))
    return found


def ask(found: Catalog, steering: Any = None, model: str = MODEL) -> Steering:
    return found.resolve(model, field(steering))


def honest(strength: float = 12, direction: Direction = HONEST) -> Edit:
    return build(direction, "sttp", [0, 2], strength)


def kind() -> Edit:
    return build(KIND, "swfc", 1, 1.5)


def edit_id(steering: Steering) -> str | None:
    return steering.edit and steering.edit.id


# What a request gets.


@pytest.mark.parametrize(
    ("steering", "model", "name", "edit"),
    [
        (None, "pilot", "honest", honest()),
        (None, "pilot:honest", "honest", honest()),
        (None, "pilot:kind", "kind", kind()),
        (None, "pilot:unsteered", "unsteered", None),
        ([], "pilot", "unsteered", None),
        ([], "pilot:unsteered", "unsteered", None),
        ({"policy": "kind"}, "pilot", "kind", kind()),
        ([{"policy": "kind"}], "pilot:kind", "kind", kind()),
        ({"policy": "honest", "strength": 24}, "pilot", "honest", honest(24)),
        ({"policy": "honest", "strength": 2}, "pilot:honest", "honest", honest(2)),
        ({"policy": "kind", "strength": -3}, "pilot", "kind", build(KIND, "swfc", 1, -3)),
        (OWN, "pilot", "custom", build(HONEST, "swfc", 1, 0.5)),
        ([OWN, {"policy": "kind"}], "pilot", "custom", Edit.compose([build(HONEST, "swfc", 1, 0.5), kind()])),
        ([{"policy": "kind"}, OWN], "pilot", "custom", Edit.compose([kind(), build(HONEST, "swfc", 1, 0.5)])),
        ([{"policy": "kind"}, {"policy": "kind"}], "pilot", "custom", Edit.compose([kind(), kind()])),
        (
            {"direction": "hostility", "method": "conditional", "layer": 2, "strength": 2, "gate": "dishonesty",
             "threshold": -0.5, "above": True, "position": "response", "toward": "violating"},
            "pilot", "custom",
            build(KIND, "conditional", 2, 2, position="response", toward="violating", gate=HONEST, threshold=-0.5,
                  above=True),
        ),
    ],
)  # fmt: skip
def test_an_open_server_gives_what_is_asked_for(steering: Any, model: str, name: str, edit: Edit | None) -> None:
    got = ask(catalog("open"), steering, model)
    assert (got.name, edit_id(got), got.monitors) == (name, edit and edit.id, False)


@pytest.mark.parametrize("requests", ["locked", "policies", "open"])
def test_without_a_default_the_plain_name_is_unsteered(requests: str) -> None:
    got = ask(catalog(requests, default=None))
    assert got == Steering(None, "unsteered", (), monitors=False)


@pytest.mark.parametrize("requests", ["locked", "policies", "open"])
def test_a_default_that_is_not_registered_is_an_error_and_never_unsteered(requests: str) -> None:
    found = Catalog(made.model_info(), MODEL, requests, "honest", monitor_only=False)
    with pytest.raises(UnknownNameError, match="unknown policy 'honest'; known: none"):
        found.resolve(MODEL, None)


# What a request may not have.

NEVER = [  # (steering, model name): refused by a locked server and by one that lets policies be chosen
    ([], "pilot"),
    ([], "pilot:honest"),
    ([], "pilot:unsteered"),
    (None, "pilot:unsteered"),
    (OWN, "pilot"),
    (OWN, "pilot:honest"),
    ([{"policy": "honest"}, OWN], "pilot"),
    ([OWN, {"policy": "honest"}], "pilot"),
    ([{"policy": "honest"}, {"policy": "honest"}], "pilot"),
    ([{"policy": "honest"}, {"policy": "honest"}], "pilot:honest"),
    ([{"policy": "honest"}, {**OWN, "toward": "violating"}], "pilot"),
    ({**OWN, "strength": 0}, "pilot"),
    ({"direction": "dishonesty", "method": "monitor", "layer": 0}, "pilot"),
    ({"policy": "honest", "strength": 1.999}, "pilot"),
    ({"policy": "honest", "strength": 0}, "pilot"),
    ({"policy": "honest", "strength": -12}, "pilot"),
    ({"policy": "honest", "strength": 24.001}, "pilot:honest"),
    ({"policy": "kind", "strength": 0}, "pilot"),
    ({"policy": "unsteered"}, "pilot"),
    ({"policy": "custom"}, "pilot"),
    ({"policy": "dishonesty"}, "pilot"),
    ({"policy": "../honest"}, "pilot"),
    *((None, model) for model in (
        "", ":", "honest", "unsteered", "pilot:", ":honest", "pilot::honest", "pilot:honest:", "pilot:honest:unsteered",
        "pilot:unsteered:honest", "PILOT", "Pilot:Honest", " pilot", "pilot ", "pilot\n", "pilot:honest\n",
        "pilot:HONEST", "pilot:custom", "pilot:none", "pilot:null", "pilot:default", "pilot:../honest", "pilot/honest",
        "pilot\0", "pi\u200blot", "p\u0456lot", "pilot:\ud800", "*", "gpt-4", "pilot:pilot", "x" * 100_000,
        "pilot:" + "honest" * 10_000)),
]  # fmt: skip
MALFORMED = [
    {}, [[]], [None], [{}], 0, 1, True, False, "", "honest", "unsteered", "null", [[{"policy": "honest"}]],
    {"policy": None}, {"policy": ""}, {"policy": 1}, {"policy": True}, {"policy": ["honest"]}, {"policy": "\ud800"},
    {"policy": "honest", "strength": True}, {"policy": "honest", "strength": "12"},
    {"policy": "honest", "strength": [12]}, {"policy": "honest", "strength": math.nan},
    {"policy": "honest", "strength": math.inf},
    {"policy": "honest", "strength": 1e300}, {"policy": "honest", "strength": 10**400},
    {"policy": "honest", "layers": [1]}, {"policy": "honest", "layer": 1}, {"policy": "honest", "position": "response"},
    {"policy": "honest", "position": "all"}, {"policy": "honest", "toward": "violating"}, {"policy": "honest", **OWN},
    {"policy": "honest", "bounds": {"strength": [0, 99]}}, {"policy": "honest", "method": "monitor"},
    {"policy": "honest", "above": True}, {"policy": "honest", "gate": "hostility"},
    {"policy": "honest", "threshold": -9}, {"policy": "honest", "Strength": 3}, {"policy": "honest", "allow": "open"},
    {"Policy": "honest"},
    [{"policy": "honest"}] * 9, [OWN] * 100_000, {**OWN, "layers": [0] * 65}, {**OWN, "layers": []},
    {**OWN, "layers": 1}, {**OWN, "layers": [True]}, {**OWN, "layers": [0.5]}, {**OWN, "layers": ["0"]},
    {**OWN, "layers": [-1]}, {**OWN, "layers": [10**400]}, {**OWN, "layer": 1}, {**OWN, "strength": None},
    {**OWN, "strength": False}, {**OWN, "position": "prompt"}, {**OWN, "toward": "aligend"}, {**OWN, "above": 1},
    {**OWN, "threshold": math.nan}, {**OWN, "method": None}, {"direction": "dishonesty"}, {"method": "swfc"},
    {**OWN, "direction": "x" * 65},
]  # fmt: skip


@pytest.mark.parametrize("requests", ["locked", "policies"])
@pytest.mark.parametrize(("steering", "model"), NEVER)
def test_nothing_gets_around_a_default(requests: str, steering: Any, model: str) -> None:
    with pytest.raises(SteerwellError) as told:
        ask(catalog(requests), steering, model)
    assert len(str(told.value)) < 1000
    str(told.value).encode()


@pytest.mark.parametrize("value", MALFORMED)
def test_a_field_of_another_form_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="steering"):
        field(value)


@pytest.mark.parametrize("requests", ["locked", "policies"])
@pytest.mark.parametrize(
    ("steering", "model", "strength"),
    [
        (None, "pilot", 12),
        (None, "pilot:honest", 12),
        ({"policy": "honest"}, "pilot", 12),
        ([{"policy": "honest", "strength": None}], "pilot:honest", 12),
        ({"policy": "honest", "strength": 2}, "pilot", 2),
        ({"policy": "honest", "strength": 24.0}, "pilot", 24),
    ],
)
def test_the_default_itself_may_be_asked_for(requests: str, steering: Any, model: str, strength: float) -> None:
    assert edit_id(ask(catalog(requests), steering, model)) == honest(strength).id


def test_another_policy_in_place_of_the_default() -> None:
    for steering, model in ((None, "pilot:kind"), ({"policy": "kind"}, "pilot"), ({"policy": "kind"}, "pilot:kind")):
        assert edit_id(ask(catalog("policies"), steering, model)) == kind().id
        with pytest.raises(NotAllowedError, match="answers every request with policy 'honest'"):
            ask(catalog("locked"), steering, model)
    assert edit_id(ask(catalog("policies"), {"policy": "kind", "strength": 1.5})) == kind().id
    with pytest.raises(NotAllowedError, match="strength: policy 'kind' has a fixed one"):
        ask(catalog("policies"), {"policy": "kind", "strength": 1.6})


@pytest.mark.parametrize("steering", [OWN, {"policy": "honest"}, [OWN, OWN]])
def test_a_locked_server_without_a_default_steers_nothing(steering: Any) -> None:
    with pytest.raises(NotAllowedError, match="answers every request with no steering"):
        ask(catalog("locked", default=None), steering)


SCRAPS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 30), st.floats(), st.sampled_from([10**400, -(10**20)]),
    st.sampled_from(["honest", "kind", "unsteered", "custom", "dishonesty", "hostility", "monitor", "swfc", "sttp", "",
                     "all", "response", "violating"]),
    st.lists(st.integers(-1, 4), max_size=3),
)  # fmt: skip
TERMS = st.dictionaries(
    st.sampled_from([*PolicySpec.model_fields, "policy", "policy", "strength", "allow"]), SCRAPS, max_size=6
)
STEERING = st.one_of(SCRAPS, TERMS, st.lists(TERMS, max_size=4), st.just({"policy": "honest"}))
MODELS = st.lists(st.sampled_from(["pilot", ":", "honest", "kind", "unsteered", "custom", " ", ""]), max_size=5).map(
    "".join
)


@pytest.mark.parametrize("requests", ["locked", "policies"])
@settings(max_examples=400, deadline=None)
@given(steering=STEERING, model=st.one_of(st.just("pilot"), MODELS))
def test_whatever_is_asked_the_answer_is_defended_or_refused(requests: str, steering: Any, model: str) -> None:
    try:
        got = ask(catalog(requests), steering, model)
    except SteerwellError:
        return
    assert got.edit is not None
    strength = float(got.edit.terms[0].label.rpartition("strength ")[2].rstrip(")"))
    allowed = {honest(strength).id} if 2 <= strength <= 24 else set()
    assert got.edit.id in allowed | ({kind().id} if requests == "policies" else set())


@pytest.mark.parametrize(
    ("requests", "name", "fields", "told"),
    [
        ("locked", "honest", {"method": "swfc", "bounds": {"strength": (0, 24)}}, "at strength 0"),
        ("locked", "honest", {"method": "swfc", "bounds": {"strength": (-1, 24)}}, "at strength 0"),
        ("policies", "honest", {"method": "stmp", "bounds": {"strength": (0, 24)}}, "at strength 0"),
        ("policies", "idle", {"method": "swfc", "strength": 0}, "at strength 0"),
        ("policies", "watch", {"method": "monitor", "strength": None}, "at strength 0"),
    ],
)
def test_no_policy_may_switch_the_default_off(requests: str, name: str, fields: dict, told: str) -> None:
    found = catalog(requests)
    policy = spec(**(POLICIES["honest"] | {"bounds": None} | fields))
    with pytest.raises(ArgumentError, match=f"policy '{name}' changes nothing {told}, so requests could switch"):
        found.put_policy(name, policy)
    assert edit_id(ask(found)) == honest().id
    catalog("open").put_policy(name, policy)
    catalog(requests, monitor_only=True).put_policy(name, policy)
    if name != "honest":
        catalog("locked").put_policy(name, policy)  # out of reach there


def test_a_default_that_only_watches_is_the_operators_choice() -> None:
    watch = spec(direction="dishonesty", method="monitor", layer=0)
    found = Catalog(made.model_info(), MODEL, "policies", "watch", monitor_only=False)
    found.put_direction("dishonesty", HONEST)
    found.put_policy("watch", watch)
    found.put_policy("idle", spec(direction="dishonesty", method="swfc", layer=0, strength=0))
    assert ask(found).monitors
    with pytest.raises(ArgumentError, match="policy 'idle' changes nothing"):
        found.put_policy("watch", spec(**OWN))  # now there is something to switch off
    assert ask(found).monitors


# Errors.


@pytest.mark.parametrize(
    ("steering", "model", "error", "told"),
    [
        (None, "pilot:hones", UnknownNameError,
         "unknown model 'pilot:hones'; known: pilot, pilot:honest, .*Did you mean 'pilot:honest'"),
        ({"policy": "hones"}, "pilot", UnknownNameError,
         "unknown policy 'hones'; known: honest, kind. Did you mean 'honest'"),
        ({"policy": "honest", "strength": 99}, "pilot", ArgumentError,
         "strength of policy 'honest': got 99; its bounds allow 2 to 24"),
        ({"policy": "honest"}, "pilot:kind", ArgumentError,
         "the model name asks for 'kind' and 'steering' for something"),
        ([], "pilot:kind", ArgumentError, "give 'steering' with the model name 'pilot', or leave it out"),
        (OWN, "pilot:unsteered", ArgumentError, "the model name asks for 'unsteered'"),
        ({**OWN, "direction": "dishonest"}, "pilot", UnknownNameError,
         "unknown direction 'dishonest'; known: dishonesty, hostility. Did you mean 'dishonesty'"),
        ({**OWN, "method": "swfk"}, "pilot", UnknownNameError, "unknown intervention 'swfk'.*Did you mean 'swfc'"),
        ({**OWN, "layers": [3]}, "pilot", UnknownNameError, "unknown layer 3; known: 0, 1, 2"),
        ({**OWN, "layers": [1, 1]}, "pilot", ArgumentError, "a layer may be named once"),
        ({**OWN, "method": "conditional"}, "pilot", ArgumentError, "gate: 'conditional' needs a second direction"),
        ({**OWN, "gate": "hostility"}, "pilot", ArgumentError, "gate: 'swfc' takes no second direction"),
        ({**OWN, "method": "conditional", "gate": "hostil"}, "pilot", UnknownNameError, "unknown direction 'hostil'"),
        ({**OWN, "threshold": 1}, "pilot", ArgumentError, "threshold, above: 'swfc' takes neither"),
    ],
)  # fmt: skip
def test_errors_name_the_fix(steering: Any, model: str, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        ask(catalog("open"), steering, model)


def test_the_kind_of_name_is_told_apart() -> None:
    """404 for a model, 400 for the rest."""
    for steering, model, kind_of_name in ((None, "gpt", "model"), ({"policy": "x"}, "pilot", "policy")):
        with pytest.raises(UnknownNameError) as told:
            ask(catalog("open"), steering, model)
        assert told.value.kind == kind_of_name


def test_a_request_edits_at_most_64_layers() -> None:
    info = made.model_info(n_layers=40)
    found = Catalog(info, MODEL, "open", None, monitor_only=False)
    found.put_direction("d", made.direction(model=info))
    term = {"direction": "d", "method": "swfc", "layers": list(range(32)), "strength": 1}
    assert len(ask(found, [term, term]).edit.terms) == 64
    with pytest.raises(ArgumentError, match="got 3 terms at 65 layers in all; at most 8 terms at 64 layers"):
        ask(found, [term, term, {**term, "layers": [0]}])


def test_an_edit_beyond_float32_is_refused() -> None:
    far = tuple(replace(layer, mu_aligned=1e31) for layer in HONEST.calibration)
    found = catalog("open")
    found.put_direction("far", made.direction(1, calibration=far))
    assert ask(found, {**OWN, "direction": "far"}).edit is not None
    with pytest.raises(ArgumentError, match=r"strength: got 1e\+09; the edit of layer 1 overflows"):
        ask(found, {**OWN, "direction": "far", "strength": 1e9})


# Registering.

BAD_NAMES = ["", ".", "..", ".hidden", "a b", "a/b", "a\\b", "a:b", "a\n", "é", "x" * 65, "unsteered", "custom", "a\0"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be(name: str) -> None:
    found = catalog("open")
    with pytest.raises(ArgumentError, match="direction name"):
        found.put_direction(name, HONEST)
    with pytest.raises(ArgumentError, match="policy name"):
        found.put_policy(name, spec(**OWN))
    with pytest.raises(ArgumentError, match="policy name"):
        Catalog(made.model_info(), MODEL, "open", name, monitor_only=False)


@pytest.mark.parametrize("name", ["a", "A-b_c.d", "x" * 64, "0", "-"])
def test_names_that_can_be(name: str) -> None:
    found = catalog("open")
    found.put_direction(name, HONEST)
    found.put_policy(name, spec(**OWN | {"direction": name}))
    assert ask(found, None, f"pilot:{name}").name == name


@pytest.mark.parametrize("changes", [{"d_model": 8}, {"n_layers": 4}, {"signature": (1.0, 1.0, 1.0, 1.0)}])
def test_a_direction_of_another_model_is_refused(changes: dict) -> None:
    found = catalog("open")
    with pytest.raises(ModelMismatchError, match="direction 'dishonesty' was made for"):
        found.put_direction("dishonesty", made.direction(model=made.model_info(**changes)))
    assert edit_id(ask(found)) == honest().id


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"direction": "nope"}, UnknownNameError, "unknown direction 'nope'"),
        ({"layers": [3]}, UnknownNameError, "unknown layer 3; known: 0, 1, 2"),
        ({"method": "stpt"}, UnknownNameError, "Did you mean 'sttp'"),
        ({"method": "conditional"}, ArgumentError, "needs a second direction"),
        ({"method": "conditional", "gate": "nope"}, UnknownNameError, "unknown direction 'nope'"),
    ],
)
def test_a_policy_that_cannot_be_built_changes_nothing(fields: dict, error: type, told: str) -> None:
    found = catalog("locked")
    with pytest.raises(error, match=told):
        found.put_policy("honest", spec(**(POLICIES["honest"] | fields)))
    assert edit_id(ask(found)) == honest().id


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"strength": 25}, "strength: got 25; its bounds allow 2 to 24"),
        ({"bounds": {"strength": (3, 1)}}, "exceeds"),
        ({"policy": "kind", "direction": None}, "beside 'policy' only 'strength'"),
        ({"strength": None}, "strength missing"),
    ],
)
def test_a_policys_own_faults(fields: dict, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        read_settings(PolicySpec, POLICIES["honest"] | fields, "policy")
    with pytest.raises(ArgumentError, match="cannot stand for another"):
        read_settings(PolicySpec, {"policy": "kind"}, "policy")


def test_a_policy_file_becomes_a_registered_policy() -> None:
    file = Policy(name="x", direction="folder/d", method="conditional", layers=(2, 0), strength=1.5,
                  position="response", toward="violating", bounds={"strength": (1, 2)}, gate="folder/g",
                  threshold=0.25, above=True, found={"trait": 3})  # fmt: skip
    found = catalog("locked")
    found.put_policy("honest", PolicySpec.of(file, "dishonesty", "hostility"))
    expected = build(HONEST, "conditional", [2, 0], 1.5, position="response", toward="violating", gate=KIND,
                     threshold=0.25, above=True)  # fmt: skip
    assert edit_id(ask(found)) == expected.id
    with pytest.raises(ArgumentError, match="its bounds allow 1 to 2"):
        ask(found, {"policy": "honest", "strength": 3})


def test_what_is_in_use_stays() -> None:
    found = catalog("policies")
    found.put_policy("gated", spec(**OWN | {"method": "conditional", "direction": "hostility", "gate": "dishonesty"}))
    with pytest.raises(ArgumentError, match="direction 'dishonesty' is in use by policy 'gated', 'honest'; remove or"):
        found.remove_direction("dishonesty")
    with pytest.raises(ArgumentError, match="policy 'honest' is the server's default and cannot be removed; replace"):
        found.remove_policy("honest")
    for remove, told in (
        (found.remove_direction, "unknown direction 'x'"),
        (found.remove_policy, "unknown policy 'x'"),
    ):
        with pytest.raises(UnknownNameError, match=told):
            remove("x")
    assert edit_id(ask(found)) == honest().id


def test_removed_and_replaced() -> None:
    found = catalog("open")
    before = ask(found)
    assert ask(found).edit is before.edit
    other = made.direction(7)
    found.put_direction("dishonesty", other)
    assert edit_id(ask(found)) == honest(direction=other).id
    assert_array_equal(before.edit.terms[0].direction, HONEST.vectors[0])  # in flight: as it was
    found.put_policy("honest", spec(**OWN))
    assert edit_id(ask(found)) == build(other, "swfc", 1, 0.5).id
    found.remove_policy("kind")
    found.remove_direction("hostility")
    assert found.models() == ["pilot", "pilot:honest", "pilot:unsteered"]
    with pytest.raises(UnknownNameError, match="unknown model 'pilot:kind'"):
        ask(found, None, "pilot:kind")


def test_a_swap_is_seen_whole_or_not_at_all() -> None:
    """Requests while two directions take turns: every edit is one of the two, never a mixture, and fits its watches."""
    shifted = tuple(replace(layer, boundary=layer.boundary - 5) for layer in HONEST.calibration)
    both = [HONEST, made.direction(7, calibration=shifted)]
    ids = {honest(direction=one).id: one.calibration[0].boundary for one in both}
    found, over = catalog("locked"), Event()

    def asking() -> list[Steering]:
        got = [ask(found)]
        while not over.is_set():
            got.append(ask(found))
        return got

    with ThreadPoolExecutor(2) as pool:
        askers = [pool.submit(asking) for _ in range(2)]
        for turn in range(60):
            found.put_direction("dishonesty", both[turn % 2])
        over.set()
        got = [steering for asker in askers for steering in asker.result()]
    assert all(steering.watches[0].boundary == ids.get(steering.edit.id) for steering in got)


def test_equal_requests_share_one_edit_and_the_cache_is_bounded() -> None:
    found = catalog("open")
    first = ask(found, OWN)
    assert ask(found, json.loads(json.dumps(OWN))).edit is first.edit
    for strength in range(CACHED + 50):
        ask(found, {**OWN, "strength": strength})
    assert found._snapshot.steering.cache_info().currsize == CACHED
    again = ask(found, OWN)
    assert again.edit is not first.edit
    assert again.edit.id == first.edit.id


# Watching.


def test_a_watch_reads_the_direction_itself_whichever_way_a_term_steers() -> None:
    """h . v is 2.5, the aligned mean; the boundary is 0.7 and the classes are 3.75 apart: (2.5 - 0.7) / 3.75 = 0.48."""
    found = catalog("open")
    state = (2.5 * HONEST.vectors[0]).astype(np.float32)
    for toward, sign in (("aligned", 1), ("violating", -1)):
        steering = ask(found, {**OWN, "layers": [0], "toward": toward})
        (term,), (watch,) = steering.edit.terms, steering.watches
        assert watch == Watch(0, 0, "dishonesty", boundary=0.7, separation=3.75, sign=sign)
        assert float(state @ term.direction) == pytest.approx(sign * 2.5, abs=1e-5)
        assert watch.reading(float(state @ term.direction)) == pytest.approx(0.48, abs=1e-5)
    assert Watch(0, 0, "d", 0.7, 3.75, 1).reading(-1.25) == pytest.approx(-0.52)
    assert Watch(0, 0, "d", 0.7, 3.75, -1).reading(1.25) == pytest.approx(-0.52)
    assert math.isnan(Watch(0, 0, "d", 0.7, 0.0, 1).reading(1.0))


def test_watches_stand_in_the_order_of_the_terms() -> None:
    steering = ask(catalog("open"), [{"policy": "kind"}, {**OWN, "layers": [2, 0], "toward": "violating"}])
    assert [(watch.term, watch.layer, watch.direction, watch.sign) for watch in steering.watches] == [
        (0, 1, "hostility", 1), (1, 0, "dishonesty", -1), (2, 2, "dishonesty", -1),
    ]  # fmt: skip
    assert [term.layer for term in steering.edit.terms] == [1, 0, 2]
    assert [watch.boundary for watch in steering.watches] == pytest.approx([0.2, 0.7, -0.3])


def test_a_conditional_term_is_watched_along_its_own_direction() -> None:
    steering = ask(catalog("open"), {**OWN, "method": "conditional", "gate": "hostility"})
    assert [(watch.direction, watch.boundary) for watch in steering.watches] == [("dishonesty", pytest.approx(0.2))]


def receipt(*after: float) -> Receipt:
    terms = (TermReceipt("", 0, "all", 5, 5, -9.0, mean, 0.0, 0.0) for mean in after)
    return Receipt("0" * 16, tuple(terms))


@pytest.mark.parametrize(
    ("signs", "after", "expected"),
    [
        ((1,), (0.71,), False),
        ((1,), (0.69,), True),
        ((-1,), (-0.71,), False),
        ((-1,), (-0.69,), True),
        ((1, 1), (3.0, 0.6), True),
        ((1, 1), (3.0, math.nan), False),
        ((1,), (math.nan,), None),
        ((), (0.0,), None),
    ],
)
def test_flagged_is_what_stays_on_the_violating_side(signs: tuple, after: tuple, expected: bool | None) -> None:
    watches = tuple(Watch(term, 0, "d", 0.7, 3.75, sign) for term, sign in enumerate(signs))
    assert flagged(receipt(*after), Steering(None, "x", watches, monitors=False)) is expected


def test_without_a_receipt_nothing_is_flagged() -> None:
    assert flagged(None, ask(catalog("open"))) is None


@pytest.mark.parametrize("requests", ["locked", "policies", "open"])
def test_a_server_that_only_monitors_edits_nothing(requests: str) -> None:
    found = catalog(requests, monitor_only=True)
    for steering in (None, {"policy": "honest", "strength": 24}):
        got = ask(found, steering)
        assert (got.name, got.monitors) == ("honest", True)
        assert got.edit.id == build(HONEST, "monitor", [0, 2], 0.0, position="response").id
        assert [(term.offset, term.gain, term.position) for term in got.edit.terms] == [(0, 0, "response")] * 2
    with pytest.raises(ArgumentError, match="its bounds allow 2 to 24"):
        ask(found, {"policy": "honest", "strength": 25})
    assert describes(found)["monitor_only"]


def test_a_monitor_reads_where_its_direction_tells_the_classes_apart() -> None:
    found = catalog("locked", monitor_only=True)
    early = replace(HONEST, provenance={"pool": "prompt_last"})
    found.put_direction("dishonesty", early)
    assert ask(found).edit.id == build(early, "monitor", [0, 2], 0.0, position="all").id


def test_a_monitor_reads_toward_aligned_whichever_way_the_term_would_steer() -> None:
    found = catalog("open", monitor_only=True)
    got = ask(found, [{**OWN, "toward": "violating"}, {"policy": "kind"}])
    assert got.edit.id == Edit.compose(
        [build(HONEST, "monitor", 1, 0.0, position="response"), build(KIND, "monitor", 1, 0.0, position="response")]
    ).id  # fmt: skip
    assert [watch.sign for watch in got.watches] == [1, 1]
    with pytest.raises(UnknownNameError, match="Did you mean 'swfc'"):  # as it would be told without monitoring
        ask(found, {**OWN, "method": "swfk"})


def test_steering_that_only_observes_says_so() -> None:
    found, watch = catalog("open"), {"direction": "dishonesty", "method": "monitor", "layer": 0}
    assert ask(found, watch).monitors
    assert ask(found, [watch, watch]).monitors
    assert not ask(found, [watch, OWN]).monitors
    assert not ask(found, []).monitors


# What is told.


def describes(found: Catalog) -> dict[str, Any]:
    return json.loads(json.dumps(found.describe(), allow_nan=False))


@pytest.mark.parametrize(
    ("requests", "default", "names"),
    [
        ("locked", "honest", ["pilot", "pilot:honest"]),
        ("locked", None, ["pilot"]),
        ("policies", "honest", ["pilot", "pilot:honest", "pilot:kind"]),
        ("open", None, ["pilot", "pilot:honest", "pilot:kind", "pilot:unsteered"]),
    ],
)
def test_every_model_that_is_listed_can_be_asked_for(requests: str, default: str | None, names: list[str]) -> None:
    found = catalog(requests, default)
    assert found.models() == names
    for name in names:
        ask(found, None, name)


def test_the_description() -> None:
    poles = {"dishonesty": {"aligned": "honest", "violating": "dishonest"}}
    told = describes(catalog("policies", poles=poles))
    lists = {"methods", "directions", "policies"}
    assert {key: value for key, value in told.items() if key not in lists} == {
        "model": "made-up", "served": "pilot", "d_model": 6, "n_layers": 3, "requests": "policies", "default": "honest",
        "monitor_only": False,
    }  # fmt: skip
    first, second = told["directions"]
    assert (first["name"], first["concept"], first["method"]) == ("dishonesty", "dishonesty", "mean_difference")
    assert (first["poles"], second["poles"]) == (poles["dishonesty"], None)
    assert first["layers"][0] == {
        "layer": 0, "boundary": 0.7, "mu_aligned": 2.5, "mu_violating": -1.25, "sigma_aligned": 0.375,
        "sigma_violating": 0.625, "cohens_d": 3.1,
    }  # fmt: skip
    assert told["policies"][0] == {
        "name": "honest", "direction": "dishonesty", "method": "sttp", "layers": [0, 2], "strength": 12,
        "position": "all", "toward": "aligned", "gate": None, "threshold": None, "above": False, "bounds": [2, 24],
        "watches": [
            {"term": index, "layer": layer, "direction": "dishonesty", "boundary": 0.7 - 0.5 * layer,
             "separation": 3.75, "sign": 1}
            for index, layer in enumerate((0, 2))
        ],
    }  # fmt: skip


def test_every_method_is_described_with_the_studies_strengths() -> None:
    methods = {method["name"]: method for method in describes(catalog())["methods"]}
    assert set(methods) == set(METHODS.names())
    assert {name: tuple(method["strengths"]) for name, method in methods.items() if method["strengths"]} == STRENGTHS
    assert methods["sttp"]["doc"].startswith("Steering to target projection (StTP)")
    assert all(method["doc"] for method in methods.values())


def test_an_unknown_mode_of_requests() -> None:
    with pytest.raises(UnknownNameError, match="unknown mode of requests 'lock'; known: locked, policies, open"):
        catalog("lock")
