"""What every engine promises for every row: batched = alone, mixed = separate, no edit = unsteered.

Equality is asserted in float32 where no gate and no greedy choice was within rounding of a tie; rows that come closer
than these margins are left out, counted, and may be few only.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import POOLS, Direction, Edit, EditTerm, Prompt, Sampling
from steerwell.steering.directions import estimate
from steerwell.steering.interventions import build

GATE_MARGIN, LOGIT_MARGIN, LOGIT_TOLERANCE = 1e-3, 1e-3, 1e-4
QUESTIONS = [
    "Why?",
    "What is the capital of France?",
    "Tell me a long story about a cat and a dog.",
    "Hm",
    "Who are you",
]
PROMPTS = [
    Prompt.chat(text, system)
    for text, system in zip(QUESTIONS, ["Lie.", None, "Be kind.", None, "x" * 40], strict=True)
]
SHORT = Sampling(max_new_tokens=12)


def direction_of(engine, seed: int = 0) -> Direction:
    """A calibrated direction: two classes of this model's own states, moved apart along a random vector."""
    tokens = [[5 + row, 40, 7] for row in range(len(PROMPTS))]
    states = engine.capture(PROMPTS, tokens)
    rng = np.random.default_rng(seed)
    push = rng.normal(size=(1, *states.shape[1:])) * states.std((0, 2), keepdims=True)
    noise = rng.normal(size=states.shape) * states.std() * 0.1
    return estimate(states + push + noise, states - push, engine.info, method="mean_difference", concept="made")


def mixed_edits(direction: Direction) -> list[Edit | None]:
    """One row unsteered, the others each steered in another way."""
    composed = [build(direction, "swfc", [0, 2], 0.5), build(direction, "sttp", 2, 1.0, position="response")]
    return [
        build(direction, "sttp", 1, 2.0),
        None,
        build(direction, "stmp", [1, 2], 1.5, position="response"),
        Edit.compose(composed),
        build(direction, "conditional", 2, 1.0, gate=direction, toward="violating"),
    ]


def close_to_a_tie(engine, prompt, tokens, edit) -> bool:
    """Whether a gate or a greedy choice of this row was within rounding of a tie."""
    score = engine.score([prompt], [tokens], edit)[0]
    gates = [term.gate_margin for term in score.receipt.terms] if score.receipt else []
    return min([*gates, np.inf]) < GATE_MARGIN or score.margins.min() < LOGIT_MARGIN


def test_batched_equals_alone_and_mixed_equals_separate(any_engine) -> None:
    edits = mixed_edits(direction_of(any_engine))
    together = any_engine.generate(PROMPTS, SHORT, edits)
    excluded = 0
    for prompt, edit, row in zip(PROMPTS, edits, together, strict=True):
        alone = any_engine.generate([prompt], SHORT, edit)[0]
        if alone.token_ids and close_to_a_tie(any_engine, prompt, alone.token_ids, edit):
            excluded += 1
            continue
        assert row.token_ids == alone.token_ids
        assert row.text == alone.text
        if edit is not None:
            for got, expected in zip(row.receipt.terms, alone.receipt.terms, strict=True):
                assert (got.tokens_seen, got.tokens_edited) == (expected.tokens_seen, expected.tokens_edited)
    assert excluded <= 2


def test_log_probabilities_do_not_depend_on_the_batch(any_engine) -> None:
    edits = mixed_edits(direction_of(any_engine))
    answers = [row.token_ids for row in any_engine.generate(PROMPTS, SHORT, edits)]
    together = any_engine.score(PROMPTS, answers, edits)
    for row, (prompt, tokens, edit) in enumerate(zip(PROMPTS, answers, edits, strict=True)):
        alone = any_engine.score([prompt], [tokens], edit)[0]
        if alone.receipt and min(term.gate_margin for term in alone.receipt.terms) < GATE_MARGIN:
            continue
        assert_allclose(together[row].logprobs, alone.logprobs, atol=LOGIT_TOLERANCE, rtol=0)


def test_scoring_agrees_with_generating(any_engine) -> None:
    """Teacher-forced under the same edit, a greedy answer's tokens are the most likely ones, with the same receipt."""
    edits = mixed_edits(direction_of(any_engine))
    answers = any_engine.generate(PROMPTS, SHORT, edits)
    for prompt, edit, answer in zip(PROMPTS, edits, answers, strict=True):
        if close_to_a_tie(any_engine, prompt, answer.token_ids, edit) or answer.finish_reason != "length":
            continue
        score = any_engine.score([prompt], [answer.token_ids], edit)[0]
        assert (score.logprobs > np.log(1 / 264)).all()
        if edit is not None:
            seen = [(term.tokens_seen, term.tokens_edited) for term in answer.receipt.terms]
            assert [(term.tokens_seen, term.tokens_edited) for term in score.receipt.terms] == seen


def test_traces_add_up_to_the_receipt_and_pieces_to_the_text(any_engine) -> None:
    direction = direction_of(any_engine)
    edits = [
        build(direction, "sttp", 1, 2.0, position="response"),
        None,
        Edit.compose(build(direction, "stmp", [2, 1], strength, position="response") for strength in (1.5, 1.0)),
        build(direction, "swfc", 0, 0.0, position="response"),
        build(direction, "sttp", 3, 1.0, position="response", toward="violating"),
    ]
    answers = any_engine.generate(PROMPTS, SHORT, edits)
    for answer, edit, score in zip(
        answers, edits, any_engine.score(PROMPTS, [item.token_ids for item in answers], edits), strict=True
    ):
        assert "".join(any_engine.pieces(answer.token_ids)) == answer.text
        assert (
            [trace.layer for trace in score.traces] == [term.layer for term in edit.terms] if edit else not score.traces
        )
        for trace, term in zip(score.traces, score.receipt.terms if edit else (), strict=True):
            assert trace.edited.shape == trace.projection.shape == (len(answer.token_ids),)
            assert trace.edited.sum() == term.tokens_edited
            assert trace.projection.mean() == pytest.approx(term.projection_before, rel=1e-4, abs=1e-4)
    text = "What now? Grüße."
    assert any_engine.tokenise("") == ()
    assert "".join(any_engine.pieces(any_engine.tokenise(text))).strip() == text


@pytest.mark.parametrize("method", ["swfc", "stmp", "conditional"])
def test_strength_zero_is_exactly_unsteered(any_engine, method: str) -> None:
    direction = direction_of(any_engine)
    edit = build(direction, method, [0, 3], 0.0, gate=direction if method == "conditional" else None)
    tokens = [[9, 8, 7]] * len(PROMPTS)
    for plain, steered in zip(any_engine.score(PROMPTS, tokens), any_engine.score(PROMPTS, tokens, edit), strict=True):
        assert_array_equal(steered.logprobs, plain.logprobs)


def test_rows_without_edit_are_exactly_unsteered_in_a_mixed_batch(any_engine) -> None:
    direction = direction_of(any_engine)
    edits = [None, build(direction, "swfc", 1, 3.0), None, build(direction, "clamp", 2, 1.0), None]
    tokens = [[9, 8, 7]] * len(PROMPTS)
    plain, mixed = any_engine.score(PROMPTS, tokens), any_engine.score(PROMPTS, tokens, edits)
    for row, edit in enumerate(edits):
        assert (mixed[row].receipt is None) == (edit is None)
        if edit is None:
            assert_array_equal(mixed[row].logprobs, plain[row].logprobs)
        else:
            assert np.abs(mixed[row].logprobs - plain[row].logprobs).max() > 1e-3


def test_layers_below_the_edited_one_are_bit_identical(any_engine) -> None:
    edit = build(direction_of(any_engine), "swfc", 2, 2.0)
    tokens = [[9, 8, 7]] * len(PROMPTS)
    plain, steered = any_engine.capture(PROMPTS, tokens), any_engine.capture(PROMPTS, tokens, edit)
    assert_array_equal(steered[:, :2], plain[:, :2])
    assert np.abs(steered[:, 2] - plain[:, 2]).max() > 1e-3


@pytest.mark.parametrize("pool", POOLS)
def test_captured_states_are_the_means_of_hidden_states(any_hf_engine, pool) -> None:
    import torch

    prompt, tokens = PROMPTS[0], [9, 8, 7, 6]
    got = any_hf_engine.capture([*PROMPTS[1:], prompt], [[1], [2], [3], [4], tokens], pool=pool)[-1]
    model = any_hf_engine._model
    ids = torch.tensor([[*model.codec.encode(prompt), *tokens]])
    with torch.inference_mode():
        states = model.network(input_ids=ids, output_hidden_states=True).hidden_states
    span = slice(-len(tokens), None) if pool == "response_mean" else slice(-len(tokens) - 1, -len(tokens))
    expected = np.stack([state[0, span].mean(0).numpy() for state in states[1:-1]])  # the last is normed
    assert_allclose(got[:-1], expected, atol=1e-4, rtol=1e-4)


def test_the_last_prompt_token_is_read_before_the_answer(any_engine) -> None:
    """Whatever the answer is, the state that yields its first token is the same; an unknown pool is an error."""
    short, long = (any_engine.capture(PROMPTS, [tokens] * len(PROMPTS), pool="prompt_last") for tokens in ([9], [7, 6]))
    assert_allclose(short, long, atol=1e-4, rtol=1e-4)
    assert np.abs(short - any_engine.capture(PROMPTS, [[9]] * len(PROMPTS))).max() > 1e-3
    with pytest.raises(UnknownNameError, match="unknown pool"):
        any_engine.capture(PROMPTS, [[9]] * len(PROMPTS), pool="mean")


def test_swfc_displaces_exactly(engine) -> None:
    direction = direction_of(engine)
    vector, calibration = direction.at(1)
    tokens = [[9, 8, 7]] * len(PROMPTS)
    moved = (
        engine.capture(PROMPTS, tokens, build(direction, "swfc", 1, 1.5))[:, 1] - engine.capture(PROMPTS, tokens)[:, 1]
    )
    assert_allclose(moved, np.tile(1.5 * calibration.separation * vector, (len(PROMPTS), 1)), atol=1e-4)


def test_receipt_counts_tokens_by_position(engine) -> None:
    direction = direction_of(engine)
    edits = [build(direction, "swfc", 1, 1.0, position=position) for position in ("all", "response")]
    length = len(engine._model.codec.encode(PROMPTS[1]))
    every, response = engine.generate([PROMPTS[1]] * 2, Sampling(max_new_tokens=5), edits)
    assert every.finish_reason == response.finish_reason == "length"
    assert every.receipt.terms[0].tokens_seen == every.receipt.terms[0].tokens_edited == length + 4
    assert response.receipt.terms[0].tokens_seen == response.receipt.terms[0].tokens_edited == 5
    shift = every.receipt.terms[0].projection_after - every.receipt.terms[0].projection_before
    assert shift == pytest.approx(direction.at(1)[1].separation, rel=1e-4)
    assert every.receipt.perturbation == pytest.approx(shift, rel=1e-4)


def test_hand_made_edit_needs_no_direction_artifact(engine) -> None:
    vector = np.eye(engine.info.d_model, dtype=np.float32)[3]
    response = engine.generate(PROMPTS[:1], SHORT, Edit((EditTerm(0, vector, np.inf, 2.0, 0.0),)))[0]
    assert response.receipt.terms[0].perturbation == pytest.approx(2.0)


def test_token_ids_that_do_not_exist_are_an_error(any_engine) -> None:
    for tokens in ([10**6], [-1]):
        with pytest.raises(ArgumentError, match="row 1 holds token ids outside"):
            any_engine.score(PROMPTS[:2], [[1], tokens])
