"""The kernel against a plain float64 reference: h <- h + 1[h . c < g] (a + b (h . v)) v, row by row, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from steerwell.steering.kernel import Coefficients, gated_affine

PROPERTY = settings(max_examples=80, deadline=None)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISION = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}  # half a unit in the last place, and some more
GATE_TIE = 1e-3  # tokens this close to their gate (in parts of |h|) may fall on either side of it


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """States, one term per row, a mask or none: as plain float64 arrays, the states already rounded to their dtype."""
    rows, tokens, width = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    numbers = st.floats(-4, 4, width=32)

    def units() -> np.ndarray:
        vectors = rng.normal(size=(rows, width))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)

    gate = st.sampled_from([math.inf, -math.inf]) | numbers.map(lambda value: value * scale)
    states = torch.from_numpy(rng.normal(size=(rows, tokens, width)) * scale).to(DTYPES[dtype])
    return {
        "dtype": dtype,
        "states": states,
        "v": units(),
        "c": units() if draw(st.booleans()) else None,
        "g": np.float32(draw(st.lists(gate, min_size=rows, max_size=rows))).astype(np.float64),
        "a": np.array(draw(st.lists(numbers, min_size=rows, max_size=rows))),
        "b": np.array(draw(st.lists(numbers, min_size=rows, max_size=rows))),
        "mask": rng.random((rows, tokens)) < 0.7 if draw(st.booleans()) else None,
    }


def coefficients(v: Any, c: Any, g: Any, a: Any, b: Any) -> Coefficients:
    def tensor(array: Any, *shape: int) -> torch.Tensor:
        return torch.tensor(np.asarray(array), dtype=torch.float32).reshape(len(v), *shape)

    return Coefficients(
        tensor(v, 1, -1), None if c is None else tensor(c, 1, -1), tensor(g, 1), tensor(a, 1), tensor(b, 1)
    )


def applied(case: dict[str, Any], rows: list[int] | None = None) -> tuple[torch.Tensor, Any]:
    keep = list(range(len(case["v"]))) if rows is None else rows
    terms = coefficients(*(None if case[name] is None else case[name][keep] for name in "vcgab"))
    mask = None if case["mask"] is None else torch.from_numpy(case["mask"][keep])
    return gated_affine(case["states"][keep], terms, mask)


def reference(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(edited states, whether the gate is so close that rounding decides), one token at a time in float64."""
    states = case["states"].double().numpy()
    edited, tie = states.copy(), np.zeros(states.shape[:2], bool)
    for row, token in np.ndindex(*tie.shape):
        h, v = states[row, token], case["v"][row]
        c = v if case["c"] is None else case["c"][row]
        if case["mask"] is not None and not case["mask"][row, token]:
            continue
        tie[row, token] = abs(h @ c - case["g"][row]) <= GATE_TIE * np.linalg.norm(h)
        if h @ c < case["g"][row]:
            edited[row, token] = h + (case["a"][row] + case["b"][row] * (h @ v)) * v
    return edited, tie


def assert_close(got: torch.Tensor, expected: np.ndarray, dtype: str) -> None:
    assert got.dtype == DTYPES[dtype]
    assert_allclose(
        got.double().numpy(), expected, rtol=PRECISION[dtype], atol=1e-5 * (1 + np.abs(expected).max(initial=0))
    )


@PROPERTY
@given(case=cases())
def test_equals_the_plain_formula(case) -> None:
    edited, _ = applied(case)
    expected, tie = reference(case)
    assert_close(edited[torch.from_numpy(~tie)], expected[~tie], case["dtype"])


@PROPERTY
@given(case=cases())
def test_the_trace_tells_what_was_done(case) -> None:
    _, trace = applied(case)
    expected, tie = reference(case)
    states = case["states"].double().numpy()
    slack = 1e-5 * (1 + np.abs(states).max())
    before = np.einsum("btd,bd->bt", states, case["v"])
    gating = before if case["c"] is None else np.einsum("btd,bd->bt", states, case["c"])
    assert_allclose(trace.projection.numpy(), before, rtol=1e-5, atol=slack)
    assert_allclose(trace.gate_projection.numpy(), gating, rtol=1e-5, atol=slack)
    fired = gating < case["g"][:, None]
    if case["mask"] is not None:
        fired &= case["mask"]
    assert_array_equal(trace.fired.numpy()[~tie], fired[~tie])
    moved = np.einsum("btd,bd->bt", expected - states, case["v"])
    assert_allclose(trace.displacement.numpy()[~tie], moved[~tie], rtol=1e-4, atol=10 * slack)
    assert (trace.displacement[~trace.fired] == 0).all()
    assert trace.projection.dtype == trace.displacement.dtype == torch.float32


@PROPERTY
@given(case=cases())
def test_tokens_that_are_not_edited_keep_their_value_exactly(case) -> None:
    edited, trace = applied(case)
    assert torch.equal(edited[~trace.fired], case["states"][~trace.fired])
    if case["mask"] is not None:
        outside = torch.from_numpy(~case["mask"])
        assert torch.equal(edited[outside], case["states"][outside])


@PROPERTY
@given(case=cases(), data=st.data())
def test_rows_are_independent(case, data) -> None:
    """A row's result is the same alone, in another order, and whatever is done to the other rows."""
    together, _ = applied(case)
    order = data.draw(st.permutations(range(len(together))))
    assert torch.equal(applied(case, order)[0], together[order])
    for row in range(len(together)):
        assert torch.equal(applied(case, [row])[0][0], together[row])


@PROPERTY
@given(case=cases())
def test_offset_and_gain_zero_change_nothing(case) -> None:
    edited, _ = applied(case | {"a": 0 * case["a"], "b": 0 * case["b"]})
    assert torch.equal(edited, case["states"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_edit_is_left_alone_even_if_it_overflows(dtype: str) -> None:
    """What the plan lays out for such a row: v = 0, a = b = 0, g = -inf. Its neighbour is steered."""
    wild = [math.inf, -math.inf, torch.finfo(DTYPES[dtype]).max, torch.finfo(DTYPES[dtype]).tiny, 0.0, -1.0]
    states = torch.tensor([[wild, wild[::-1]], [[1.0] * 6, [2.0] * 6]], dtype=DTYPES[dtype])
    unit = np.eye(6)[2]
    terms = coefficients([0 * unit, unit], None, [-math.inf, math.inf], [0.0, 3.0], [0.0, 0.0])
    for mask in (None, torch.ones(2, 2, dtype=torch.bool)):
        edited, trace = gated_affine(states, terms, mask)
        assert torch.equal(edited[0], states[0])
        assert not trace.fired[0].any()
        assert (trace.displacement[0] == 0).all()
        assert_allclose(edited[1].float().numpy(), states[1].float().numpy() + 3.0 * unit)


def test_nan_stays_in_its_row() -> None:
    states = torch.ones(2, 1, 3)
    states[0, 0, 1] = math.nan
    terms = coefficients(np.eye(3)[[1, 1]], None, [math.inf] * 2, [1.0] * 2, [0.0] * 2)
    edited, trace = gated_affine(states, terms)
    assert_array_equal(edited[1, 0].numpy(), [1.0, 2.0, 1.0])
    assert math.isnan(trace.projection[0, 0])


@pytest.mark.parametrize(("gate", "fires"), [(1.0, False), (np.nextafter(np.float32(1), np.float32(2)), True)])
def test_the_gate_is_strict(gate: float, fires: bool) -> None:
    terms = coefficients(np.eye(2)[:1], None, [gate], [5.0], [0.0])
    edited, trace = gated_affine(torch.tensor([[[1.0, 7.0]]]), terms)
    assert bool(trace.fired[0, 0]) == fires
    assert_array_equal(edited[0, 0].numpy(), [6.0 if fires else 1.0, 7.0])


def test_the_second_direction_gates_and_the_first_one_moves() -> None:
    terms = coefficients(np.eye(3)[:1], np.eye(3)[1:2], [0.0], [2.0], [-1.0])
    edited, trace = gated_affine(torch.tensor([[[9.0, -1.0, 4.0], [9.0, 1.0, 4.0]]]), terms)
    assert_array_equal(edited[0].numpy(), [[2.0, -1.0, 4.0], [9.0, 1.0, 4.0]])
    assert_array_equal(trace.gate_projection[0].numpy(), [-1.0, 1.0])
    assert_array_equal(trace.projection[0].numpy(), [9.0, 9.0])


def test_half_precision_is_edited_in_single_precision() -> None:
    """In bfloat16 the projection 256 + 1 would round to 256: the target would be missed by one."""
    states = torch.tensor([[[256.0, 1.0]]], dtype=torch.bfloat16)
    unit = np.array([[1.0, 1.0]]) / math.sqrt(2)
    edited, trace = gated_affine(states, coefficients(unit, None, [math.inf], [0.0], [-1.0]))
    assert trace.projection.item() == pytest.approx(257 / math.sqrt(2), rel=1e-6)
    assert_allclose(edited.float().numpy()[0, 0], [127.5, -127.5])


def test_selected_rows_keep_their_coefficients() -> None:
    terms = coefficients(np.eye(3), np.eye(3)[::-1].copy(), [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0])
    chosen = terms.select(torch.tensor([2, 0]))
    assert_array_equal(chosen.direction[:, 0].numpy(), np.eye(3)[[2, 0]])
    assert chosen.gate_direction is not None
    assert_array_equal(chosen.gate_direction[:, 0].numpy(), np.eye(3)[[0, 2]])
    assert (chosen.gate.flatten().tolist(), chosen.offset.flatten().tolist()) == ([3.0, 1.0], [6.0, 4.0])
    assert chosen.gain.flatten().tolist() == [9.0, 7.0]


def test_the_input_is_not_written_to() -> None:
    states = torch.ones(1, 2, 3)
    gated_affine(states, coefficients(np.eye(3)[:1], None, [math.inf], [1.0], [0.0]))
    assert (states == 1).all()
