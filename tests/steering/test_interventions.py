"""What each method does to a state, derived here from the papers' words, not from the coefficients under test."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from steerwell.core.errors import ArgumentError, ModelMismatchError, UnknownNameError
from steerwell.core.records import Direction, Edit, EditTerm, Prompt
from steerwell.steering.interventions import METHODS, build
from steerwell.steering.kernel import Coefficients, gated_affine
from tests import made

METHOD_NAMES = ("clamp", "conditional", "directional_ablation", "monitor", "stmp", "sttp", "swfc", "transport")
LAYER = 1


@pytest.fixture
def direction() -> Direction:
    return made.direction(0)


@pytest.fixture
def states() -> np.ndarray:
    """Tokens [40, d_model] whose projections lie on both sides of everything."""
    return np.random.default_rng(5).normal(scale=3.0, size=(40, made.D_MODEL)).astype(np.float32)


def term_applied(term: EditTerm, states: np.ndarray) -> np.ndarray:
    def tensor(value: object) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float32).reshape(1, 1, -1)

    gate_direction = None if term.gate_direction is None else tensor(term.gate_direction)
    numbers = (tensor(value)[0] for value in (term.gate, term.offset, term.gain))
    edited, _ = gated_affine(
        torch.from_numpy(states)[None], Coefficients(tensor(term.direction), gate_direction, *numbers)
    )
    return edited[0].numpy()


def steered(states: np.ndarray, direction: Direction, method: str, strength: float, **options) -> np.ndarray:
    (term,) = build(direction, method, LAYER, strength, **options).terms
    return term_applied(term, states)


def read(direction: Direction, states: np.ndarray):
    """v, calibration and projections at the layer."""
    vector, calibration = direction.at(LAYER)
    return vector, calibration, states @ vector


def moved_along(states: np.ndarray, vector: np.ndarray, amounts: object) -> np.ndarray:
    return states + np.broadcast_to(np.asarray(amounts, np.float32), len(states))[:, None] * vector


def assert_states(got: np.ndarray, expected: np.ndarray) -> None:
    assert_allclose(got, expected, atol=2e-5)


def test_the_methods_are_registered() -> None:
    assert set(METHOD_NAMES) <= set(METHODS.names())


@pytest.mark.parametrize("strength", [-2.0, 0.5, 1.0, 4.0])
def test_swfc_moves_every_token_by_that_many_class_separations(direction, states, strength: float) -> None:
    vector, calibration, _ = read(direction, states)
    displacement = strength * (calibration.mu_aligned - calibration.mu_violating)
    assert_states(steered(states, direction, "swfc", strength), moved_along(states, vector, displacement))


@pytest.mark.parametrize("strength", [-1.0, 0.0, 6.0, 36.0])
def test_sttp_sets_gated_projections_and_touches_no_other_token(direction, states, strength: float) -> None:
    vector, calibration, before = read(direction, states)
    got = steered(states, direction, "sttp", strength)
    gated = before < calibration.boundary
    assert 0 < gated.sum() < len(states)
    target = calibration.mu_aligned + strength * calibration.sigma_aligned
    assert_allclose(got[gated] @ vector, target, atol=2e-5)
    assert_states(got[gated], moved_along(states, vector, target - before)[gated])
    assert_array_equal(got[~gated], states[~gated])


def test_sttp_at_zero_goes_to_the_aligned_mean(direction, states) -> None:
    vector, calibration, before = read(direction, states)
    got = steered(states, direction, "sttp", 0.0) @ vector
    assert_allclose(got[before < calibration.boundary], calibration.mu_aligned, atol=2e-5)


def test_stmp_at_one_reflects_across_the_boundary(direction, states) -> None:
    vector, calibration, before = read(direction, states)
    got = steered(states, direction, "stmp", 1.0)
    gated = before < calibration.boundary
    assert_allclose(got[gated] @ vector - calibration.boundary, calibration.boundary - before[gated], atol=2e-5)
    off_axis = states - before[:, None] * vector
    assert_states(got - (got @ vector)[:, None] * vector, off_axis)
    assert_array_equal(got[~gated], states[~gated])


@pytest.mark.parametrize("strength", [0.5, 1.5, 4.0])
def test_stmp_scales_the_mirror_step(direction, states, strength: float) -> None:
    vector, calibration, before = read(direction, states)
    step = np.where(before < calibration.boundary, 2 * strength * (calibration.boundary - before), 0)
    assert_states(steered(states, direction, "stmp", strength), moved_along(states, vector, step))


def test_ablation_leaves_no_component(direction, states) -> None:
    vector, _, before = read(direction, states)
    got = steered(states, direction, "directional_ablation", 1.0)
    assert_allclose(got @ vector, 0.0, atol=2e-5)
    assert_states(got, states - before[:, None] * vector)
    assert_allclose(steered(states, direction, "directional_ablation", 0.25) @ vector, 0.75 * before, atol=2e-5)


@pytest.mark.parametrize(("strength", "where"), [(0.0, "mu_violating"), (1.0, "mu_aligned")])
def test_clamp_puts_every_token_on_its_scale(direction, states, strength: float, where: str) -> None:
    vector, calibration, before = read(direction, states)
    got = steered(states, direction, "clamp", strength)
    assert_states(got, moved_along(states, vector, getattr(calibration, where) - before))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_transport_carries_the_violating_class_onto_the_aligned_one(direction, states, strength: float) -> None:
    """Quantile to quantile: z spreads from mu- go to z spreads from mu+, a share `strength` of the way."""
    vector, calibration, before = read(direction, states)
    quantile = (before - calibration.mu_violating) / calibration.sigma_violating
    image = calibration.mu_aligned + quantile * calibration.sigma_aligned
    step = np.where(before < calibration.boundary, strength * (image - before), 0)
    assert_states(steered(states, direction, "transport", strength), moved_along(states, vector, step))


def test_transport_without_a_spread_goes_to_the_mean(direction, states) -> None:
    point = replace(direction.calibration[LAYER], sigma_violating=0.0)
    direction = replace(direction, calibration=(point,) * len(direction.calibration))
    vector, calibration, before = read(direction, states)
    got = steered(states, direction, "transport", 1.0) @ vector
    assert_allclose(got[before < calibration.boundary], calibration.mu_aligned, atol=2e-5)


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("threshold", [None, -1.5])
def test_conditional_is_gated_by_a_second_direction(direction, states, above: bool, threshold: float | None) -> None:
    second = made.direction(9)
    vector, calibration, _ = read(direction, states)
    _, gate_calibration, gate = read(second, states)
    bound = gate_calibration.boundary if threshold is None else threshold
    passed = gate > bound if above else gate < bound
    assert 0 < passed.sum() < len(states)
    got = steered(states, direction, "conditional", 1.5, gate=second, threshold=threshold, above=above)
    separation = calibration.mu_aligned - calibration.mu_violating
    assert_states(got, moved_along(states, vector, np.where(passed, 1.5 * separation, 0)))
    assert_array_equal(got[~passed], states[~passed])


@pytest.mark.parametrize("strength", [0.0, -3.0, 1e9])
@pytest.mark.parametrize("toward", ["aligned", "violating"])
def test_monitor_changes_nothing_and_its_gate_is_the_boundary(direction, states, strength: float, toward: str) -> None:
    """Its gate is open on the side that a method would steer from."""
    (term,) = build(direction, "monitor", LAYER, strength, toward=toward).terms
    assert_array_equal(term_applied(term, states), states)
    _, calibration, before = read(direction, states)
    far = before < calibration.boundary if toward == "aligned" else before > calibration.boundary
    assert 0 < far.sum() < len(states)
    assert_array_equal(states @ term.direction < term.gate, far)


def test_monitors_receipt_tells_the_violating_tokens_and_no_change(engine) -> None:
    direction = on_engine(engine, 1)
    vector, calibration = direction.at(LAYER)
    edit = build(direction, "monitor", LAYER, 0.0, position="response")
    plain, watched = engine.generate([PROMPT, PROMPT], edits=[None, edit])
    assert watched.token_ids == plain.token_ids
    score = engine.score([PROMPT], [plain.token_ids], edit)[0]
    (seen,), (trace,) = score.receipt.terms, score.traces
    assert seen.projection_after == seen.projection_before
    assert seen.perturbation == 0
    assert seen.tokens_edited == (trace.projection < calibration.boundary).sum()
    assert_array_equal(engine.capture([PROMPT], [[7]], edit), engine.capture([PROMPT], [[7]]))
    assert engine.capture([PROMPT], [[7]], edit)[0, LAYER] @ vector < calibration.boundary  # as on_engine made it


@pytest.mark.parametrize("method", ["swfc", "stmp", "conditional", "directional_ablation", "transport", "monitor"])
@pytest.mark.parametrize("toward", ["aligned", "violating"])
def test_strength_zero_changes_nothing(direction, states, method: str, toward: str) -> None:
    gate = made.direction(9) if method == "conditional" else None
    assert_array_equal(steered(states, direction, method, 0.0, toward=toward, gate=gate), states)


def unswapped(method: str, calibration, before: np.ndarray, strength: float) -> np.ndarray:
    """How far along v a token goes toward the violating class, with v and the classes as they are (METHODS 3)."""
    separation = calibration.mu_aligned - calibration.mu_violating
    above = before > calibration.boundary
    if method == "swfc":
        return np.full_like(before, -strength * separation)
    if method == "sttp":
        target = calibration.mu_violating - strength * calibration.sigma_violating
        return np.where(above, target - before, 0)
    if method == "stmp":
        return np.where(above, 2 * strength * (calibration.boundary - before), 0)
    if method == "transport":
        quantile = (before - calibration.mu_aligned) / calibration.sigma_aligned
        image = calibration.mu_violating + quantile * calibration.sigma_violating
        return np.where(above, strength * (image - before), 0)
    if method == "clamp":
        return calibration.mu_aligned - strength * separation - before
    return -strength * before  # directional ablation: the same on both sides


@pytest.mark.parametrize("method", ["swfc", "sttp", "stmp", "clamp", "directional_ablation"])
@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_toward_violating_equals_the_unswapped_form(direction, states, method: str, strength: float) -> None:
    vector, calibration, before = read(direction, states)
    got = steered(states, direction, method, strength, toward="violating")
    assert_states(got, moved_along(states, vector, unswapped(method, calibration, before, strength)))
    assert not np.allclose(got, states)


@pytest.mark.parametrize("above", [False, True])
def test_toward_violating_leaves_the_second_directions_side_as_it_is(direction, states, above: bool) -> None:
    second = made.direction(9)
    vector, calibration, _ = read(direction, states)
    _, gate_calibration, gate = read(second, states)
    passed = gate > gate_calibration.boundary if above else gate < gate_calibration.boundary
    got = steered(states, direction, "conditional", 2.0, gate=second, above=above, toward="violating")
    separation = calibration.mu_aligned - calibration.mu_violating
    assert_states(got, moved_along(states, vector, np.where(passed, -2.0 * separation, 0)))


def test_each_layer_is_steered_with_its_own_numbers(direction) -> None:
    edit = build(direction, "sttp", [2, 0], 2.0, position="response")
    assert [term.layer for term in edit.terms] == [0, 2]
    assert edit.model == direction.model
    for term in edit.terms:
        vector, calibration = direction.at(term.layer)
        assert_array_equal(term.direction, vector)
        assert term.gate == calibration.boundary
        assert term.position == "response"
        assert term.label == "sttp(made toward aligned, strength 2)"


def test_a_layer_may_come_from_numpy(direction) -> None:
    layers = np.argsort([0.5, 0.1, 0.9])[::-1][:2]
    edit = build(direction, "swfc", layers, 1.0)
    assert [term.layer for term in edit.terms] == [0, 2]
    assert edit.id == build(direction, "swfc", [0, 2], 1.0).id
    assert build(direction, "swfc", layers[0], 1.0).id == build(direction, "swfc", 2, 1.0).id


def on_engine(engine, seed: int) -> Direction:
    """A direction of the engine's model; its own token lies just below the boundary of every layer."""
    made_up = made.direction(seed, model=engine.info)
    states = engine.capture([PROMPT], [[7]])[0]
    layers = tuple(
        made.calibration(boundary=rho + 1.0, mu_aligned=rho + 4.0, mu_violating=rho - 1.0)
        for rho in np.einsum("ld,ld->l", states, made_up.vectors).tolist()
    )
    return made.direction(seed, model=engine.info, calibration=layers)


PROMPT = Prompt.chat("Who are you?", "Be kind.")


def test_terms_of_one_layer_apply_in_list_order_each_reading_what_the_one_before_left(engine) -> None:
    first, second = on_engine(engine, 1), on_engine(engine, 2)
    edits = [build(first, "sttp", LAYER, 1.0), build(second, "clamp", LAYER, 1.5), build(first, "swfc", LAYER, 0.5)]
    plain = engine.capture([PROMPT], [[7]])[0, LAYER][None]
    ends = []
    for order in ([0, 1, 2], [1, 2, 0], [2, 1, 0]):
        expected = plain
        for index in order:
            expected = term_applied(edits[index].terms[0], expected)
        got = engine.capture([PROMPT], [[7]], Edit.compose([edits[index] for index in order]))[0, LAYER]
        assert_allclose(got, expected[0], atol=1e-4)
        ends.append(got)
    assert np.abs(ends[0] - ends[1]).max() > 0.1
    assert np.abs(ends[0] - ends[2]).max() > 0.1


def test_a_gate_reads_the_state_that_the_term_before_left(engine) -> None:
    """SwFC lifts the token over StTP's boundary, so StTP leaves it; the other way round StTP sets it first."""
    direction = on_engine(engine, 1)
    vector, calibration = direction.at(LAYER)
    lift, target = build(direction, "swfc", LAYER, 2.0), build(direction, "sttp", LAYER, 0.0)
    separation = calibration.mu_aligned - calibration.mu_violating
    before = engine.capture([PROMPT], [[7]])[0, LAYER] @ vector
    for edits, expected in (
        ([lift, target], before + 2 * separation),
        ([target, lift], calibration.mu_aligned + 2 * separation),
    ):
        got = engine.capture([PROMPT], [[7]], Edit.compose(edits))[0, LAYER] @ vector
        assert got == pytest.approx(expected, abs=1e-3)


def test_a_lower_layers_edit_reaches_the_gate_of_a_higher_one(engine) -> None:
    """The higher term's receipt starts from the state that the lower term's edit led to."""
    direction = on_engine(engine, 1)
    low = build(direction, "swfc", 0, 2.0)
    high = build(direction, "clamp", 2, 1.0)
    vector, calibration = direction.at(2)
    led_to = engine.capture([PROMPT], [[7]], low)[0, 2] @ vector
    assert abs(led_to - engine.capture([PROMPT], [[7]])[0, 2] @ vector) > 1e-2
    both = Edit.compose([high, low])
    assert engine.capture([PROMPT], [[7]], both)[0, 2] @ vector == pytest.approx(calibration.mu_aligned, abs=1e-3)
    hand_made = Edit((*low.terms, EditTerm(2, vector, math.inf, 0.0, 0.0, "response", label="probe")))
    before = engine.score([PROMPT], [[7]], hand_made)[0].receipt.terms[1].projection_before
    alone = engine.score([PROMPT], [[7]], Edit(hand_made.terms[1:]))[0].receipt.terms[0].projection_before
    assert abs(before - alone) > 1e-2


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"method": "stpt"}, UnknownNameError, "unknown intervention 'stpt'; known: .*Did you mean 'sttp'"),
        ({"layers": 3}, UnknownNameError, "unknown layer 3; known: 0, 1, 2"),
        ({"layers": -1}, UnknownNameError, "unknown layer -1"),
        ({"layers": []}, ArgumentError, "layers: got none"),
        ({"layers": [1, 2, 1]}, ArgumentError, r"layers: got \[1, 2, 1\]; a layer may be named once"),
        ({"position": "prompt"}, UnknownNameError, "unknown position 'prompt'; known: all, response"),
        ({"toward": "aligend"}, UnknownNameError, "class to steer toward 'aligend'.*Did you mean 'aligned'"),
        ({"strength": math.nan}, ArgumentError, "strength: got nan; expected a finite number"),
        ({"strength": math.inf}, ArgumentError, "strength: got inf"),
        ({"method": "conditional"}, ArgumentError, "gate: 'conditional' needs a second direction"),
        ({"gate": made.direction(9)}, ArgumentError, "gate: 'sttp' takes no second direction"),
        ({"threshold": 0.5}, ArgumentError, "threshold, above: 'sttp' takes neither"),
        ({"above": True}, ArgumentError, "threshold, above: 'sttp' takes neither"),
        (
            {"method": "conditional", "gate": made.direction(9), "threshold": math.nan},
            ArgumentError,
            "gate must be a number",
        ),
        (
            {"method": "conditional", "gate": made.direction(9, model=made.model_info(d_model=8))},
            ModelMismatchError,
            "direction 'made' was made for 'made-up'",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(direction, changes: dict, error: type, told: str) -> None:
    arguments = {"method": "sttp", "layers": 1, "strength": 1.0} | changes
    with pytest.raises(error, match=told):
        build(direction, **arguments)
