"""Arguments become the edit that they say, or an error; never nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import steerwell as sw
from steerwell.apps.harnesses.common import load_steered, steering_from_args
from steerwell.core.errors import ArgumentError, EngineError, ModelMismatchError, UnknownNameError
from steerwell.core.records import receipt_row
from steerwell.engines.base import proven
from tests import made


@pytest.fixture
def policy(direction: Path, tmp_path: Path) -> Path:
    chosen = sw.Policy(direction=str(direction), method="sttp", layers=(0, 2), strength=3, position="response")
    return sw.save_policy(chosen, tmp_path / "policy.yaml")


def test_no_arguments_are_no_edit() -> None:
    assert steering_from_args({}) is None


def test_arguments_build_the_edit_that_they_name(args, edit) -> None:
    assert steering_from_args(args).id == edit.id
    assert steering_from_args({key: str(value) for key, value in args.items()}).id == edit.id


def test_several_layers_and_every_option(direction: Path) -> None:
    loaded = sw.load_direction(direction)
    options = {"position": "response", "toward": "violating", "threshold": "0.5", "above": "true"}
    found = steering_from_args(
        {"direction": direction.as_posix(), "method": "conditional", "layer": ["2", "0"], "strength": 2}
        | {"gate": str(direction)}
        | options
    )
    built = sw.build(
        loaded,
        "conditional",
        [0, 2],
        2,
        position="response",
        toward="violating",
        gate=loaded,
        threshold=0.5,
        above=True,
    )
    assert found.id == built.id


def test_policies_apply_in_order(policy: Path, direction: Path) -> None:
    single = steering_from_args({"policy": str(policy)})
    assert single.id == sw.policy_edit(sw.load_policy(policy)).id
    assert steering_from_args({"policy": [str(policy)] * 2}).id == sw.Edit.compose([single, single]).id


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"layer": ...}, ArgumentError, "layer: missing"),
        ({"strength": ...}, ArgumentError, "strength: missing"),
        ({"method": ...}, ArgumentError, "method: missing"),
        ({"direction": ...}, ArgumentError, "direction: missing"),
        ({"direction": ""}, ArgumentError, "direction: got ''"),
        ({"direction": None}, ArgumentError, "direction: got None"),
        ({"policy": None}, ArgumentError, "policy: got None"),
        ({"policy": "p.yaml"}, ArgumentError, "give either a policy or a direction"),
        ({"layers": 1}, UnknownNameError, "Did you mean 'layer'?"),
        ({"layer": "deep"}, ArgumentError, "layer: got 'deep'"),
        ({"layer": -1}, ArgumentError, "layer: got -1"),
        ({"layer": 99}, UnknownNameError, "unknown layer 99"),
        ({"layer": []}, ArgumentError, "layer: got \\[\\]"),
        ({"strength": "strong"}, ArgumentError, "strength: got 'strong'"),
        ({"strength": float("nan")}, ArgumentError, "strength: got nan"),
        ({"position": "prompt"}, ArgumentError, "position: got 'prompt'"),
        ({"method": "swcf"}, UnknownNameError, "Did you mean 'swfc'?"),
        ({"direction": "/nowhere"}, sw.SteerwellError, "is missing"),
    ],
)
def test_mistakes_are_errors(args, changes: dict[str, object], error: type[Exception], said: str) -> None:
    changed = {key: value for key, value in (args | changes).items() if value is not ...}
    with pytest.raises(error, match=said):
        steering_from_args(changed)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"strenght": 1}, UnknownNameError, "Did you mean 'strength'?"),
        ({"batch_size": "auto"}, ArgumentError, "batch_size: got 'auto'"),
        ({"batch_size": 0}, ArgumentError, "batch_size: got 0"),
        ({"dtype": "float8"}, ArgumentError, "dtype: got 'float8'"),
    ],
)
def test_loading_refuses_what_nothing_reads(args, changes: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        load_steered("pilot", args | changes)


def test_loading_refuses_a_direction_of_another_model(args, tmp_path: Path) -> None:
    other = sw.save_direction(made.direction(), tmp_path / "other")
    with pytest.raises(ModelMismatchError, match="was made for 'made-up'"):
        load_steered("pilot", args | {"direction": str(other)})


def test_an_answer_under_another_edit_is_no_answer(pilot, edit) -> None:
    ask = [sw.Prompt.chat("What is the capital of France?")]
    (steered,) = pilot.generate(ask, sw.Sampling(max_new_tokens=2), edit)
    assert proven(steered.receipt, edit) is steered.receipt
    assert proven(None, None) is None
    for receipt, asked in ((None, edit), (steered.receipt, None), (replace(steered.receipt, edit_id="x"), edit)):
        with pytest.raises(EngineError, match="was asked for"):
            proven(receipt, asked)


def test_a_receipt_is_strict_json(pilot, edit) -> None:
    (response,) = pilot.generate([sw.Prompt.chat("Hello")], sw.Sampling(max_new_tokens=2), edit)
    row = json.loads(json.dumps(receipt_row(response.receipt), allow_nan=False))
    assert row["edit_id"] == edit.id
    assert row["terms"][0]["gate_margin"] is None  # swfc has no gate: infinitely far from one
    assert row["terms"][0]["tokens_edited"] == row["tokens_edited"] > 0
    assert receipt_row(None) is None
