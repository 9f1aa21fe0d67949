"""Fitting and the defence study, on the fake engine (its arithmetic is exact) and a judge that is plain arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steerwell.core.errors import EngineError, UnknownNameError
from steerwell.core.records import POOLS, Prompt, Response, Sampling, Verdict
from steerwell.engines.fake import FakeEngine
from steerwell.steering.interventions import build
from steerwell.studies.defence import (
    Configuration,
    Outcome,
    attack_prompts,
    baseline_prompts,
    choose,
    choose_each,
    edits_of,
    fit_all,
    gap_closed,
    grid,
    measure,
)
from steerwell.studies.fitting import contrast, fit
from tests.sweep_run import CONCEPT, LetterJudge

SHORT = Sampling(temperature=0.6, max_new_tokens=6)


def outcome(trait: float, coherence: float) -> Outcome:
    return Outcome((), (Verdict(trait, coherence),))


@pytest.fixture(scope="module")
def concept():
    return CONCEPT


@pytest.fixture(scope="module")
def fitted(concept):
    return contrast(FakeEngine(), concept, SHORT)


def test_states_are_those_of_the_answers_under_each_pole(concept, fitted) -> None:
    engine = FakeEngine()
    (aligned, violating) = concept.contrastive()[3]
    both = fitted.responses[3]
    assert (both[0].prompt, both[1].prompt) == (aligned, violating)
    for pool, classes in fitted.states.items():
        states = engine.capture([aligned, violating], [both[0].token_ids, both[1].token_ids], pool=pool)
        for rows, expected in zip(classes, states, strict=True):
            np.testing.assert_allclose(rows[3], expected, rtol=1e-5)


def test_a_direction_remembers_where_it_comes_from(concept, fitted) -> None:
    direction = fitted.direction("mean_difference", "prompt_last", seed=7)
    assert direction.provenance["pool"] == "prompt_last"
    assert (direction.concept, direction.concept_hash) == ("hostility", concept.hash)
    assert direction.model == FakeEngine().info
    assert direction.provenance["sampling"]["temperature"] == 0.6
    assert direction.provenance["direction_seed"] == 7
    assert direction.provenance["n_pairs"] == len(concept.train) - fitted.dropped
    assert "numpy" in direction.provenance["versions"]


def test_fitting_is_reproducible(concept, fitted) -> None:
    again = fit(FakeEngine(), concept, sampling=SHORT)
    np.testing.assert_array_equal(again.vectors, fitted.direction().vectors)


def test_the_pool_decides_which_states_are_fitted(fitted) -> None:
    for pool, (aligned, violating) in fitted.states.items():
        difference = (aligned.mean(0, np.float64) - violating.mean(0, np.float64)).astype(np.float32)
        np.testing.assert_array_equal(fitted.direction(pool=pool).mean_difference, difference)
    with pytest.raises(UnknownNameError, match=r"unknown pool 'prompt_lost'.*Did you mean 'prompt_last'"):
        fitted.direction(pool="prompt_lost")


def test_a_model_that_does_not_answer_is_an_error(concept) -> None:
    class Silent(FakeEngine):
        def generate(self, prompts, sampling=SHORT, edits=None, *, progress=None):
            return [Response(prompt, "", (), "stop", SHORT) for prompt in prompts]

    with pytest.raises(EngineError, match=r"without an answer.*chat template"):
        contrast(Silent(), concept)


def test_conditions_measured_together_equal_those_measured_alone(concept, fitted) -> None:
    engine, ways = FakeEngine(), grid([1, 2], {"swfc": (1.0,), "sttp": (2.0,)})
    edits = [None, *edits_of(fit_all(fitted, ways), ways)]
    prompts = attack_prompts(concept, "validation", 5)
    together = measure(engine, LetterJudge(), concept, prompts, edits, SHORT)
    assert len(together) == len(edits) == 5
    for edit, item in zip(edits, together, strict=True):
        (alone,) = measure(engine, LetterJudge(), concept, prompts, [edit], SHORT)
        assert [row.text for row in item.responses] == [row.text for row in alone.responses]
        assert item.trait == alone.trait
        assert (item.perturbation > 0) == (edit is not None and item.gate_rate > 0)


def test_selection_never_sees_the_test_attacks_or_scenarios(concept) -> None:
    seen = {turn.content for prompt in attack_prompts(concept, "validation") for turn in prompt.messages}
    held_out = {turn.content for prompt in attack_prompts(concept, "test") for turn in prompt.messages}
    fitting = {turn.content for pair in concept.contrastive() for prompt in pair for turn in prompt.messages}
    assert not seen & held_out
    assert not (seen | held_out) & fitting
    assert {prompt.messages[0].content for prompt in attack_prompts(concept, "test")} == set(concept.attacks("test"))


def test_baseline_uses_neutral_system_prompts(concept) -> None:
    systems = {prompt.messages[0].content for prompt in baseline_prompts(concept, "test") if len(prompt.messages) == 2}
    assert systems == {text for text in concept.neutral_system if text}


def test_choice_is_the_highest_trait_that_stays_coherent() -> None:
    baseline = outcome(95, 80)
    tried = [outcome(99, 71.9), outcome(60, 90), outcome(85, 72), outcome(85, 75)]
    assert choose(tried, baseline) == 3
    assert choose([tried[0]], baseline) is None
    assert choose([outcome(math.nan, 90), outcome(5, 90), outcome(80, math.nan)], baseline) == 1


def test_choice_within_groups() -> None:
    tried = [Configuration("stmp", 1, 1), Configuration("sttp", 1, 0), Configuration("stmp", 2, 1)]
    found = [outcome(50, 80), outcome(90, 10), outcome(60, 80)]
    assert choose_each(tried, found, outcome(95, 80), lambda item: item.method) == {"stmp": 2}
    assert choose_each(tried, found, outcome(95, 10), lambda item: item.layer) == {1: 1, 2: 2}


def test_gap_closed() -> None:
    assert gap_closed(outcome(90, 0), outcome(10, 0), outcome(70, 0)) == pytest.approx(0.75)
    assert math.isnan(gap_closed(outcome(50, 0), outcome(50, 0), outcome(70, 0)))


def test_grid_is_the_product() -> None:
    found = grid([0, 3], {"swfc": (1, 2), "stmp": (1,)}, ["all", "response"], ["lda", "pca"], POOLS)
    assert len(found) == len(set(found)) == 48
    assert Configuration("stmp", 3, 1, "response", "pca", "prompt_last") in found


def test_edits_follow_their_configurations(fitted) -> None:
    tried = grid([0, 2], {"sttp": (1.0,)}, estimators=["mean_difference", "pca"], pools=POOLS)
    for item, edit in zip(tried, edits_of(fit_all(fitted, tried), tried), strict=True):
        direction = fitted.direction(item.estimator, item.pool)
        assert edit.id == build(direction, "sttp", item.layer, 1.0).id


def test_prompt_needs_exactly_one_form() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Prompt()
