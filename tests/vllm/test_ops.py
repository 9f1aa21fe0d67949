"""The ops against the kernel of METHODS section 3, and the Triton kernels against the ops. They need no vLLM."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from steerwell.engines.vllm.ops import (
    BEFORE,
    CAPTURE,
    DISTANCE,
    EDITED,
    MARGIN,
    MOVED,
    ROW,
    SEEN,
    TALLY,
    TRACE,
    Buffers,
    read,
    steer,
    stream,
)
from steerwell.steering.kernel import Coefficients, gated_affine

LAYERS, SLOTS, TERMS, TOKENS, WIDTH = 3, 4, 3, 12, 16
STEERED = ("tokens", "live", "ids", "numbers", "table", "sums", "traced")


def made(seed: int = 0) -> tuple[Buffers, torch.Tensor, torch.Tensor]:
    """Filled buffers and the two parts of a state [T, d_model]; slot 2 has no terms, and row 0 is nobody's."""
    torch.manual_seed(seed)
    buffers = Buffers.empty(
        layers=LAYERS,
        slots=SLOTS,
        terms=TERMS,
        tokens=TOKENS + 3,
        rows=8,
        captures=2,
        width=WIDTH,
        device="cpu",
        traces=5,
    )
    buffers.table.copy_(torch.nn.functional.normalize(torch.randn(8, WIDTH), dim=1))
    buffers.live.copy_(torch.tensor([1, 0, 2]))
    for row in (1, 2, 5, 6, 7, 8):
        buffers.ids[:, row, : 1 + row % 3] = torch.randint(0, 8, (LAYERS, 1 + row % 3, 2), dtype=torch.int32)
        buffers.numbers[:, row] = torch.randn(LAYERS, TERMS, 3)
    buffers.numbers[0, 2, 0, 0] = math.inf
    buffers.tokens[ROW, :TOKENS] = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6, 6, 8, 8, 0])
    buffers.tokens[TALLY, :TOKENS] = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 0, 0])
    buffers.tokens[CAPTURE, :TOKENS] = torch.tensor([0, 1, 1, 0, 0, 2, 2, 2, 0, 0, 0, 1])
    buffers.tokens[TRACE, :TOKENS] = torch.tensor([0, 0, 3, 1, 0, 4, 0, 5, 0, 0, 2, 0])
    return buffers, torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)


def call(buffers: Buffers, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
    at = torch.tensor(layer)
    parts = [getattr(buffers, name) for name in STEERED]
    torch.ops.steerwell.steer(hidden, residual, at, *parts)
    torch.ops.steerwell.read(hidden, residual, at, buffers.tokens, buffers.captured)


def expected(buffers: Buffers, layer: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token by token through the kernel of `steering`: the edited state, the sums, and the traces."""
    sums, traced = buffers.sums[layer].clone(), buffers.traced[layer].clone()
    state = state.clone()
    for token in range(TOKENS):
        row, slot = (int(buffers.tokens[which, token]) for which in (ROW, TALLY))
        for term in range(TERMS):
            v, c = buffers.ids[layer, row, term].tolist()
            if v < 0:
                continue
            gate, offset, gain = (number.view(1, 1) for number in buffers.numbers[layer, row, term])
            terms = Coefficients(buffers.table[v][None, None], buffers.table[c][None, None], gate, offset, gain)
            edited, trace = gated_affine(state[token][None, None], terms)
            state[token] = edited[0, 0]
            if place := int(buffers.tokens[TRACE, token]):
                traced[place, term] = torch.tensor([trace.fired.item(), trace.projection.item()])
            if slot:
                moved = trace.displacement.item()
                sums[slot, term, :MARGIN] += torch.tensor(
                    [1.0, trace.fired.item(), trace.projection.item(), moved, abs(moved)]
                )
                margin = abs(trace.gate_projection.item() - gate.item())
                sums[slot, term, MARGIN] = min(sums[slot, term, MARGIN].item(), margin)
    return state, sums, traced


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_op_is_the_kernel_of_every_token(layer: int, paired: bool) -> None:
    buffers, hidden, residual = made()
    other = residual if paired else None
    before = hidden.clone()
    state, sums, traced = expected(buffers, layer, stream(hidden, other))
    assert sums[1:, :, EDITED].sum() > 0
    assert traced[1:].isfinite().any()
    assert traced[1:].isnan().any()  # terms that are not there
    call(buffers, layer, hidden, other)
    if paired:
        assert_close(stream(hidden, other), state)
    else:
        assert torch.equal(hidden, state)  # with a residual the sum is rounded once more
    assert_close(buffers.sums[layer, 1:], sums[1:])
    assert_close(buffers.traced[layer, 1:], traced[1:], equal_nan=True)
    untouched = [0, 4, 5, 11]  # nobody's row, and a slot without terms
    assert torch.equal(hidden[untouched], before[untouched])
    places = buffers.tokens[CAPTURE, :TOKENS]
    for place in (1, 2):
        assert_close(buffers.captured[layer, place], state[places == place].sum(0))


def test_sums_grow_from_step_to_step_and_say_what_they_say() -> None:
    buffers, hidden, residual = made()
    for _ in range(2):
        call(buffers, 0, hidden.clone(), residual)
    assert buffers.sums[0, 1, 0, SEEN] == 6  # tokens 1 to 3, twice
    assert buffers.sums[0, 4, 0, SEEN] == 2  # token 9 twice; token 10 has the row, too, but is not counted
    assert (buffers.sums[..., DISTANCE] >= buffers.sums[..., MOVED].abs() - 1e-5).all()
    assert buffers.sums[0, 1, 0, BEFORE] != 0


def test_a_layer_without_live_terms_is_left_alone() -> None:
    buffers, hidden, residual = made()
    before, sums = hidden.clone(), buffers.sums.clone()
    call(buffers, 1, hidden, residual)
    assert torch.equal(hidden, before)
    assert torch.equal(buffers.sums, sums)


def test_half_precision_is_computed_in_float32() -> None:
    buffers, hidden, residual = made()
    half, other = hidden.bfloat16(), residual.bfloat16()
    state, _, _ = expected(buffers, 0, stream(half, other))
    call(buffers, 0, half, other)
    assert_close(stream(half, other), state, atol=0.05, rtol=0.02)


def test_the_ops_say_truly_what_they_change() -> None:
    buffers, hidden, residual = made()
    parts = [getattr(buffers, name) for name in STEERED]
    for given in (parts, parts[:-1]):
        torch.library.opcheck(torch.ops.steerwell.steer.default, (hidden, residual, torch.tensor(0), *given))
    arguments = (hidden, None, torch.tensor(0), buffers.tokens, buffers.captured)
    torch.library.opcheck(torch.ops.steerwell.read.default, arguments)


def test_the_reference_for_other_devices_gives_the_same() -> None:
    """Off the CPU the reference looks at no value."""
    for layer in range(LAYERS):
        (left, hidden, residual), (right, mine, _) = made(), made()
        steer(mine, residual, torch.tensor(layer), *(getattr(right, name) for name in STEERED))
        read(mine, residual, torch.tensor(layer), right.tokens, right.captured)
        call(left, layer, hidden, residual)
        assert_close(mine, hidden)
        for name in ("sums", "captured", "traced"):
            assert_close(getattr(right, name)[:, 1:], getattr(left, name)[:, 1:], equal_nan=True)


@pytest.mark.parametrize("inference", [True, False])
def test_what_is_kept_from_step_to_step_goes_when_a_buffer_changes(inference: bool) -> None:
    """Every change is made in place, also in inference mode, where vLLM makes them."""
    with torch.inference_mode(inference):
        buffers, hidden, residual = made()

        def check() -> None:
            mine = hidden.clone()
            state, _, _ = expected(buffers, 0, stream(mine, residual))
            captured = torch.zeros(3, WIDTH).index_add_(0, buffers.tokens[CAPTURE, :TOKENS].long(), state)
            buffers.captured.zero_()
            call(buffers, 0, mine, residual)
            assert_close(stream(mine, residual), state)
            assert_close(buffers.captured[0, 1:], captured[1:])

        check()
        kept = buffers.tokens.steerwell_step
        check()
        assert buffers.tokens.steerwell_step is kept
        for change in (
            lambda: buffers.tokens[ROW, :TOKENS].copy_(torch.tensor([2, 1, 2, 5, 6, 4, 5, 0, 6, 8, 7, 1])),
            lambda: buffers.tokens[CAPTURE].fill_(2),
            lambda: buffers.ids[:, 2].fill_(3),
            lambda: buffers.numbers[:, 5].mul_(2),
            lambda: buffers.table.copy_(buffers.table.flip(0)),
        ):
            change()
            check()
            assert buffers.tokens.steerwell_step is not kept
            kept = buffers.tokens.steerwell_step


def test_directions_that_are_too_many_to_keep_are_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from steerwell.engines.vllm import host

    monkeypatch.setattr(host, "KEPT", 0)
    test_the_op_is_the_kernel_of_every_token(0, True)


INTERPRETED = """
import torch
from tests.vllm.test_ops import STEERED, call, made
from steerwell.engines.vllm import kernels
from torch.testing import assert_close
for paired in (True, False):
    for layer in (0, 1, 2):
        (left, hidden, residual), (right, _, _) = made(), made()
        other, mine = residual if paired else None, hidden.clone()
        call(left, layer, hidden, other)
        kernels.steer(mine, other, torch.tensor(layer), *(getattr(right, name) for name in STEERED))
        kernels.read(mine, other, torch.tensor(layer), right.tokens, right.captured)
        assert_close(mine, hidden)
        for name in ("sums", "captured", "traced"):
            assert_close(getattr(right, name)[:, 1:], getattr(left, name)[:, 1:], equal_nan=True)
        without, untold, _ = made()
        kernels.steer(untold, other, torch.tensor(layer), *(getattr(without, name) for name in STEERED[:-1]))
        assert_close(untold, mine)
        assert without.traced.isnan().all()
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_give_the_same_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
