from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from steerwell.core.errors import ArgumentError, ModelMismatchError, UnknownNameError
from steerwell.core.records import (
    Edit,
    EditTerm,
    Message,
    Prompt,
    Receipt,
    Sampling,
    TermReceipt,
)
from tests import made

UNIT = np.eye(4, dtype=np.float32)


def term(**changes) -> EditTerm:
    fields = {"layer": 1, "direction": UNIT[0], "gate": 0.5, "offset": 2.0, "gain": -1.0}
    return EditTerm(**(fields | changes))


def term_receipt(**changes) -> TermReceipt:
    fields = {
        "label": "",
        "layer": 0,
        "position": "all",
        "tokens_seen": 10,
        "tokens_edited": 4,
        "projection_before": 0.0,
        "projection_after": 1.0,
        "perturbation": 2.0,
        "gate_margin": 0.1,
    }
    return TermReceipt(**(fields | changes))


def test_a_single_turn_conversation() -> None:
    assert Prompt.chat("hi", "be kind").messages == (Message("system", "be kind"), Message("user", "hi"))
    assert Prompt.chat("hi", "").messages == Prompt.chat("hi").messages == (Message("user", "hi"),)
    assert Prompt.chat("hi", prefill="Well").prefill == "Well"


def test_a_prompt_is_a_conversation_or_text_but_not_both() -> None:
    assert Prompt(text="").text == ""
    with pytest.raises(ArgumentError, match=r"got messages and text of .*give exactly one"):
        Prompt(messages=(Message("user", "hi"),), text="hi")
    with pytest.raises(ArgumentError, match=r"got none of .*give exactly one"):
        Prompt()
    assert Prompt(tokens=(1, 2)).tokens == (1, 2)
    with pytest.raises(ArgumentError, match="got text and tokens of"):
        Prompt(text="", tokens=())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("stop", "###"),
        ("stop", ("",)),
    ],
)
def test_sampling_refuses(field: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{field}: got .*expected"):
        Sampling(**{field: value})


def test_records_are_frozen() -> None:
    for record, field in ((Sampling(), "seed"), (made.direction(), "concept"), (term(), "gain")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field, 1)


@pytest.mark.parametrize(("field", "value"), [("d_model", 8), ("n_layers", 4), ("config_hash", "other")])
def test_models_of_another_shape_are_told_apart(field: str, value: object) -> None:
    with pytest.raises(ModelMismatchError, match=f"direction 'x' was made for 'made-up' \\({field}"):
        made.model_info().require_same(made.model_info(**{field: value}), "direction 'x'")


def test_models_of_one_shape_are_told_apart_by_their_weights() -> None:
    ours = made.model_info()
    ours.require_same(made.model_info(name="copy", signature=(0.51, -1.02, 1.9, -1.5)), "it")
    ours.require_same(made.model_info(signature=()), "it")
    for other in ((1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.5, -1.0)):
        with pytest.raises(ModelMismatchError, match="same shape but other weights"):
            ours.require_same(made.model_info(signature=other), "it")


def test_swapping_the_classes() -> None:
    """v -> -v: projections change sign and the classes trade places; what does not depend on the side stays."""
    ours = made.calibration()
    other = ours.swapped()
    assert (other.mu_aligned, other.mu_violating) == (-ours.mu_violating, -ours.mu_aligned)
    assert (other.sigma_aligned, other.sigma_violating) == (ours.sigma_violating, ours.sigma_aligned)
    assert other.boundary == -ours.boundary
    assert other.separation == ours.separation == 3.75
    assert other.swapped() == ours


@pytest.mark.parametrize("field", ["boundary", "mu_aligned", "sigma_violating", "cohens_d"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_calibration_holds_finite_numbers(field: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=f"^{field}: got"):
        made.calibration(**{field: value})


def test_only_the_stability_may_be_unknown() -> None:
    assert math.isnan(made.calibration(split_half=math.nan).split_half)
    with pytest.raises(ArgumentError, match="split_half"):
        made.calibration(split_half=math.inf)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vectors": np.ones((3, 5), np.float32)}, r"vectors: got shape \(3, 5\).*\(3, 6\)"),
        ({"mean_difference": np.ones((2, 6), np.float32)}, "mean_difference: got shape"),
        ({"vectors": np.full((3, 6), np.nan, np.float32)}, "vectors: holds NaN"),
        ({"mean_difference": np.full((3, 6), np.inf, np.float32)}, "mean_difference: holds NaN or infinity"),
        ({"vectors": np.ones((3, 6), np.float32)}, r"vectors: layer 0 has norm 2\.449; expected unit norm"),
        ({"calibration": (made.calibration(),)}, "calibration: got 1 layers; the model has 3"),
    ],
)
def test_a_direction_is_whole_or_refused(changes: dict, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        made.direction(**changes)


def test_one_layer_of_a_direction() -> None:
    ours = made.direction()
    vector, calibration = ours.at(2)
    assert vector is not None
    np.testing.assert_array_equal(vector, ours.vectors[2])
    assert calibration is ours.calibration[2]
    for layer in (-1, 3):
        with pytest.raises(UnknownNameError, match=f"unknown layer {layer}; known: 0, 1, 2"):
            ours.at(layer)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"direction": 2 * UNIT[0]}, "direction: got shape .* norm 2"),
        ({"direction": UNIT}, "direction: got shape"),
        ({"direction": np.array([np.nan, 0, 0, 1], np.float32)}, "direction: got"),
        ({"direction": [1.0, 0.0, 0.0, 0.0]}, "direction: got list"),
        ({"gate_direction": 0.5 * UNIT[1]}, "gate_direction: got shape .* norm 0.5"),
        ({"gate_direction": np.eye(3, dtype=np.float32)[0]}, "gate_direction: its width differs"),
        ({"gate": math.nan}, "offset, gain, gate"),
        ({"offset": math.inf}, "offset, gain, gate"),
        ({"gain": math.nan}, "offset, gain, gate"),
    ],
)
def test_a_term_is_sound_or_refused(changes: dict, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        term(**changes)


def test_a_term_knows_two_positions() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown position 'respons'.*Did you mean 'response'"):
        term(position="respons")


def test_an_edit_has_terms() -> None:
    with pytest.raises(ArgumentError, match="pass None instead of an Edit"):
        Edit(())


def test_composing_keeps_the_order() -> None:
    first, second = Edit((term(layer=2),), made.model_info()), Edit((term(layer=0), term(layer=2)))
    both = Edit.compose([first, second])
    assert [item.layer for item in both.terms] == [2, 0, 2]
    assert both.model == first.model
    assert Edit.compose([second]).model is None
    with pytest.raises(ModelMismatchError, match="composed"):
        Edit.compose([first, replace(first, model=made.model_info(d_model=8))])
    with pytest.raises(ArgumentError, match="none"):
        Edit.compose([])


def test_equal_edits_have_equal_ids() -> None:
    """The id is that of the content: label and model do not count, nor in which number type it was written."""
    ours = Edit((term(),))
    same = term(layer=np.int64(1), gate=np.float64(0.5), offset=np.float32(2.0), gain=-1, label="other")
    assert Edit((same,), made.model_info()).id == ours.id
    assert Edit((term(gate_direction=UNIT[0]),)).id == ours.id
    assert Edit((term(direction=UNIT[0].astype(np.float64)),)).id == ours.id


@pytest.mark.parametrize(
    "changes",
    [
        {"layer": 2},
        {"direction": UNIT[1]},
        {"gate": 0.25},
        {"offset": 2.5},
        {"gain": -0.5},
        {"position": "response"},
        {"gate_direction": UNIT[1]},
    ],
)
def test_different_edits_have_different_ids(changes: dict) -> None:
    assert Edit((term(**changes),)).id != Edit((term(),)).id


def test_the_order_of_terms_counts_in_the_id() -> None:
    first, second = term(), term(offset=1.0)
    assert Edit((first, second)).id != Edit((second, first)).id


def test_a_receipt_adds_up_its_terms() -> None:
    receipt = Receipt("id", (term_receipt(), term_receipt(tokens_seen=30, tokens_edited=6, perturbation=4.5)))
    assert receipt.tokens_edited == 10
    assert receipt.gate_rate == 10 / 40
    assert receipt.perturbation == pytest.approx((4 * 2.0 + 6 * 4.5) / 10)
    assert receipt.terms[0].gate_rate == 0.4


def test_a_receipt_of_nothing() -> None:
    nothing = term_receipt(tokens_seen=0, tokens_edited=0, perturbation=0.0)
    assert math.isnan(nothing.gate_rate)
    assert Receipt("id", (nothing,)).perturbation == 0.0
    assert math.isnan(Receipt("id", (nothing,)).gate_rate)
