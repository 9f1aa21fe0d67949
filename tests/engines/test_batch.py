"""Rows that join and leave a running batch get what they would get alone: tokens, receipts, log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from steerwell.core.errors import ArgumentError, EngineError, UnknownNameError
from steerwell.core.records import Edit, EditTerm, Prompt, Sampling
from steerwell.engines.base import Asked
from steerwell.engines.hf.batch import alike
from steerwell.steering.interventions import build
from tests.engines.test_contract import PROMPTS, SHORT, close_to_a_tie, direction_of, mixed_edits

SAMPLED = Sampling(temperature=1.2, top_p=0.9, max_new_tokens=9, seed=3)


def finish(batch, steps: int = 100) -> None:
    for _ in range(steps):
        if not batch.alive:
            break
        batch.sweep()
        batch.step()
    batch.settle()


def run_joining(engine, asked: list[Asked], gap: int = 3):
    """Every request joins `gap` steps after the one before, a long prompt after short ones too."""
    batch, rows = engine.batch(), [engine.row(item) for item in asked]
    for row in rows:
        batch.join([row])
        for _ in range(gap):
            batch.sweep()
            if batch.alive:
                batch.step()
    finish(batch)
    return rows, batch


def test_rows_that_join_while_others_decode_equal_alone(any_hf_engine) -> None:
    edits = mixed_edits(direction_of(any_hf_engine))
    long = Prompt.chat("Tell me more. " * 4)
    asked = [Asked(prompt, SHORT, edit) for prompt, edit in zip([*PROMPTS, long], [*edits, edits[0]], strict=True)]
    rows, _ = run_joining(any_hf_engine, asked)
    excluded = 0
    for row, item in zip(rows, asked, strict=True):
        alone = any_hf_engine.generate([item.prompt], item.sampling, item.edit)[0]
        if alone.token_ids and close_to_a_tie(any_hf_engine, item.prompt, alone.token_ids, item.edit):
            excluded += 1
            continue
        assert (row.response().text, tuple(row.tokens)) == (alone.text, alone.token_ids)
        assert row.finish == alone.finish_reason
        for got, expected in zip(*(item.terms if item else () for item in (row.receipt, alone.receipt)), strict=True):
            assert (got.tokens_seen, got.tokens_edited) == (expected.tokens_seen, expected.tokens_edited)
            assert got.projection_before == pytest.approx(expected.projection_before, rel=1e-3, abs=1e-3)
            assert got.projection_after == pytest.approx(expected.projection_after, rel=1e-3, abs=1e-3)
    assert excluded <= 2


def test_sampled_rows_draw_with_their_own_seeds(any_hf_engine) -> None:
    asked = [Asked(prompt, SAMPLED if row % 2 else SHORT) for row, prompt in enumerate(PROMPTS)]
    rows, _ = run_joining(any_hf_engine, asked, gap=2)
    same = [tuple(row.tokens) == any_hf_engine.generate([item.prompt], [item.sampling])[0].token_ids
            for row, item in zip(rows, asked, strict=True)]  # fmt: skip
    assert sum(same) >= 4  # one may have met a tie


def test_a_batch_forgets_rows_and_columns_that_nobody_needs(engine) -> None:
    long, short = Prompt.chat("x" * 100), Prompt.chat("Hm")
    batch = engine.batch()
    first, second = (engine.row(Asked(prompt, Sampling(max_new_tokens=size))) for prompt, size in
                     ((long, 2), (short, 30)))  # fmt: skip
    batch.join([first, second])
    assert batch.width == len(first.prompt_ids)
    while first.finish is None:
        batch.step()
    batch.sweep()
    assert batch.rows == [second]
    assert first.receipt is None
    assert batch.width == len(second.prompt_ids) + len(second.tokens) - 1
    batch.drop([second])
    batch.sweep()
    assert (batch.rows, batch.width) == ([], 0)


def test_steering_that_nobody_asks_for_any_more_costs_nothing(engine) -> None:
    edit = build(direction_of(engine), "swfc", [0, 1, 2], 1.0)
    batch = engine.batch()
    steered, plain = (engine.row(Asked(PROMPTS[0], Sampling(max_new_tokens=size), way)) for size, way in
                      ((2, edit), (9, None)))  # fmt: skip
    batch.join([plain])
    batch.join([steered])
    assert len(batch._plan._slots) == 3
    while steered.finish is None:
        batch.step()
    batch.sweep()
    assert batch._plan._slots == []
    assert steered.receipt.tokens_edited == 3 * (len(steered.prompt_ids) + 1)


def test_log_probabilities_are_those_of_scoring(any_hf_engine) -> None:
    edits = mixed_edits(direction_of(any_hf_engine))
    asked = [Asked(prompt, SHORT, edit, logprobs=2) for prompt, edit in zip(PROMPTS, edits, strict=True)]
    rows, _ = run_joining(any_hf_engine, asked)
    for row, item in zip(rows, asked, strict=True):
        if not row.tokens or close_to_a_tie(any_hf_engine, item.prompt, row.tokens, item.edit):
            continue
        tokens = row.take().tokens
        assert [token.id for token in tokens] == row.tokens
        score = any_hf_engine.score([item.prompt], [row.tokens], item.edit)[0]
        assert_allclose([token.logprob for token in tokens], score.logprobs, atol=1e-3)
        for token in tokens:
            assert token.top[0] == (token.id, token.text, pytest.approx(token.logprob, abs=1e-5))
            assert len(token.top) == 2
            assert token.top[0][2] >= token.top[1][2]


def test_an_echoed_prompt_has_the_log_probabilities_of_its_tokens(any_hf_engine) -> None:
    ids = any_hf_engine.loaded.encode(Prompt(text="What is it?"))
    whole = Asked(Prompt(tokens=tuple(ids)), Sampling(max_new_tokens=1), logprobs=1, echo=True)
    longer = Asked(Prompt(text="A longer prompt beside it, not echoed."), SHORT)
    rows, _ = run_joining(any_hf_engine, [longer, whole], gap=1)
    first, *others = rows[1].take().answer.prompt_logprobs
    assert (first.id, first.logprob) == (ids[0], None)
    score = any_hf_engine.score([Prompt(tokens=tuple(ids[:1]))], [ids[1:]])[0]
    assert [token.id for token in others] == ids[1:]
    assert_allclose([token.logprob for token in others], score.logprobs, atol=1e-3)
    assert rows[0].take().answer.prompt_logprobs == ()


def test_traces_are_those_of_scoring(engine) -> None:
    edits = mixed_edits(direction_of(engine))
    asked = [Asked(prompt, SHORT, edit, trace=True) for prompt, edit in zip(PROMPTS, edits, strict=True)]
    rows, _ = run_joining(engine, asked)
    for row, item in zip(rows, asked, strict=True):
        if close_to_a_tie(engine, item.prompt, row.tokens, item.edit):
            continue
        told = row.take().tokens
        score = engine.score([item.prompt], [row.tokens], item.edit)[0]
        assert len(told) == len(row.tokens)
        for term, trace in enumerate(score.traces):
            assert_allclose([token.projections[term] for token in told], trace.projection, atol=1e-3)
            assert [token.edited[term] for token in told] == trace.edited.tolist()
        assert len(told[0].projections) == len(score.traces)


def test_pieces_join_to_the_text_also_with_stop_strings_and_split_characters(engine) -> None:
    for stop in ((), ("e",), ("\n", "xyz")):
        sampling = Sampling(temperature=1.5, max_new_tokens=40, stop=stop, seed=5)
        batch, row = engine.batch(), engine.row(Asked(PROMPTS[1], sampling, logprobs=0))
        batch.join([row])
        pieces = [row.take()]
        while row.finish is None:
            batch.step()
            pieces.append(row.take())
        batch.settle()
        shown = [piece for piece in pieces if piece is not None]
        (expected,) = engine.generate([PROMPTS[1]], [sampling])
        assert "".join(piece.text for piece in shown) == expected.text
        assert [token.id for piece in shown for token in piece.tokens] == list(expected.token_ids)
        assert [piece.answer is None for piece in shown] == [True] * (len(shown) - 1) + [False]
        assert shown[-1].answer.response == expected
        assert shown[-1].answer.completion_tokens == len(expected.token_ids) + row.ended


def test_a_row_whose_activations_overflow_fails_alone(engine) -> None:
    vector = np.eye(engine.info.d_model, dtype=np.float32)[1]
    huge = Edit((EditTerm(0, vector, math.inf, 3e38, 3e38), EditTerm(2, vector, 0.0, 1.0, 0.0)))
    batch = engine.batch()
    good, bad = engine.row(Asked(PROMPTS[0], SHORT)), engine.row(Asked(PROMPTS[1], SHORT, huge))
    batch.join([good])
    batch.join([bad])
    finish(batch)
    assert isinstance(bad.fault, EngineError)
    assert "not finite" in str(bad.fault)
    assert good.fault is None
    assert tuple(good.tokens) == engine.generate(PROMPTS[:1], SHORT)[0].token_ids
    with pytest.raises(EngineError, match="not finite"):
        engine.generate(PROMPTS[:2], SHORT, [None, huge])


def test_a_model_whose_cache_cannot_be_joined_says_so(engine, monkeypatch) -> None:
    monkeypatch.setattr(engine.loaded, "joinable", False)
    batch = engine.batch()
    batch.join([engine.row(Asked(PROMPTS[0], SHORT))])
    with pytest.raises(EngineError, match="cannot join"):
        batch.join([engine.row(Asked(PROMPTS[1], SHORT))])


def test_prompts_are_read_together_where_padding_costs_less_than_a_pass(engine) -> None:
    rows = [engine.row(Asked(Prompt(tokens=(5,) * size), SHORT)) for size in (10, 200, 20, 190, 12, 90)]
    groups = [[len(row.prompt_ids) for row in group] for group in alike(rows)]
    assert groups == [[200, 190, 90], [20, 12, 10]]
    assert alike([]) == []


def test_a_request_is_checked_before_it_joins(engine) -> None:
    with pytest.raises(ArgumentError, match="token ids outside 0 to 263"):
        engine.row(Asked(Prompt(tokens=(1, 264)), SHORT))
    with pytest.raises(ArgumentError, match="holds no token"):
        engine.row(Asked(Prompt(tokens=()), SHORT))
    with pytest.raises(UnknownNameError, match="unknown layer"):
        engine.row(Asked(PROMPTS[0], SHORT, Edit((EditTerm(9, np.eye(32, dtype=np.float32)[0], 0.0, 1.0, 0.0),))))
