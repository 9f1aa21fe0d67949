"""Metrics: what is counted, that nobody can swell them, and that an attack on the bundled model shows."""

from __future__ import annotations

import math
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from steerwell.concepts import load_concept
from steerwell.core.records import Prompt, Receipt, Response, Sampling, TermReceipt
from steerwell.engines.base import Answer
from steerwell.serving.catalog import Catalog, Steering, Watch, flagged
from steerwell.serving.monitoring import FAILED, NAMES, OTHER, RECENT, REFUSED, Monitor
from steerwell.serving.steering import PolicySpec
from steerwell.studies.defence import attack_prompts, baseline_prompts
from steerwell.studies.fitting import contrast

STEERING = Steering(None, "honest", (Watch(0, 3, "dishonesty", boundary=1.0, separation=4.0, sign=1),), False)
WHOLE = Sampling(max_new_tokens=64)  # answers that are cut read lower: most of what they say is yet to come


def term(seen: int, edited: int, before: float, after: float, moved: float) -> TermReceipt:
    return TermReceipt("made", 3, "all", seen, edited, before, after, moved, math.inf)


def answer(*terms: TermReceipt, finish: str = "stop") -> Answer:
    receipt = Receipt("edit", terms) if terms else None
    return Answer(Response(Prompt.chat("Hello"), "Hi", (1,), finish, Sampling(), receipt), 7, 2)


def told(monitor: Monitor) -> dict[tuple[str, ...], float]:
    """Every sample of our own: name and label values (`steering` first) -> value."""
    body, kind = monitor.exposition()
    assert kind.startswith("text/plain")
    return {
        (
            item.name.removeprefix("steerwell_"),
            *(item.labels[key] for key in sorted(item.labels, reverse=True)),
        ): item.value
        for family in text_string_to_metric_families(body.decode())
        for item in family.samples
        if item.name.startswith("steerwell_") and not item.name.endswith("_created")
    }


def test_what_one_answer_adds() -> None:
    monitor = Monitor()
    two = answer(term(10, 4, before=-1.0, after=5.0, moved=3.0), term(10, 2, 0.0, 0.0, 6.0), finish="length")
    monitor.answered(STEERING, two, seconds=0.3, flagged=True)
    found = told(monitor)
    assert found["answers_total", "honest", "length"] == 1
    assert found["seen_tokens_total", "honest"] == 20
    assert found["edited_tokens_total", "honest"] == 6
    assert found["perturbation_total", "honest"] / 6 == pytest.approx((4 * 3.0 + 2 * 6.0) / 6)
    assert found["edited_share_sum", "honest"] == pytest.approx(0.3)
    assert found["projection_before_recent", "honest"] == (-1 - 1) / 4
    assert found["projection_after_recent", "honest"] == (5 - 1) / 4
    assert found["projection_before_bucket", "honest", "-0.75"] == 0  # the one reading is -0.5 ...
    assert found["projection_before_bucket", "honest", "-0.5"] == 1
    assert found["projection_after_bucket", "honest", "0.75"] == 0  # ... and 1 afterwards; the second term is unwatched
    assert found["projection_after_bucket", "honest", "1.0"] == 1
    assert found["flagged_answers_total", "honest"] == 1
    assert found["answer_seconds_sum",] == 0.3
    assert found["prompt_tokens_total",] == 7


def test_a_swapped_direction_is_read_the_same_way() -> None:
    monitor, swapped = Monitor(), replace(STEERING, watches=(replace(STEERING.watches[0], sign=-1),))
    monitor.answered(swapped, answer(term(10, 4, before=1.0, after=-5.0, moved=3.0)), 0.3, None)
    found = told(monitor)
    assert found["projection_before_recent", "honest"] == (-1 - 1) / 4
    assert found["projection_after_recent", "honest"] == (5 - 1) / 4


def test_what_is_missing_is_not_counted() -> None:
    """NaN must not stay in a sum for good, and what nothing judged is no answer without a flag."""
    monitor = Monitor()
    monitor.answered(STEERING, answer(term(0, 0, math.nan, math.nan, 0.0)), 0.1, None)
    monitor.answered(Steering(None, "unsteered", (), False), answer(), 0.1, None)
    monitor.answered(STEERING, answer(term(4, 2, 3.0, 3.0, 1.0)), 0.1, False)
    found = told(monitor)
    assert found["projection_before_count", "honest"] == found["edited_share_count", "honest"] == 1
    assert found["edited_share_sum", "honest"] == found["projection_before_recent", "honest"] == 0.5
    assert found["answers_total", "unsteered", "stop"] == 1
    assert ("seen_tokens_total", "unsteered") not in found
    assert found["flagged_answers_total", "honest"] == 0
    assert not any(math.isnan(value) for value in found.values())


def test_the_recent_mean_forgets() -> None:
    monitor = Monitor()
    for _ in range(RECENT):
        monitor.answered(STEERING, answer(term(1, 0, 3.0, 3.0, 0.0)), 0.1, None)
    assert told(monitor)["projection_before_recent", "honest"] == pytest.approx(0.5)
    monitor.answered(STEERING, answer(term(1, 0, -1.0, -1.0, 0.0)), 0.1, None)
    assert told(monitor)["projection_before_recent", "honest"] == pytest.approx(0.5 - 1 / RECENT)


def test_load() -> None:
    monitor = Monitor()
    monitor.stepped(rows=3, waiting=5, seconds=0.02, tokens=4)
    monitor.stepped(rows=1, waiting=0, seconds=0.04, tokens=1)
    monitor.first_token(0.2)
    found = told(monitor)
    assert found["batch_rows_sum",] == 4
    assert found["batch_rows_bucket", "2.0"] == 1
    assert found["queue_length",] == 0
    assert found["step_seconds_sum",] == pytest.approx(0.06)
    assert found["generated_tokens_total",] == 5
    assert (found["first_token_seconds_count",], found["first_token_seconds_sum",]) == (1, 0.2)


def test_nobody_can_make_series() -> None:
    """Names beyond a bound share one series, and so do reasons that are not known."""
    monitor = Monitor()
    monitor.refused("overloaded")
    monitor.failed("cancelled")
    for number in range(NAMES + 50):
        monitor.refused(f"reason {number}")
        monitor.failed(f"reason {number}")
        monitor.answered(replace(STEERING, name=f"name-{number}"), answer(), 0.1, None)
    found = told(monitor)
    assert len([key for key in found if key[0] == "answers_total"]) == NAMES + 1
    assert found["answers_total", OTHER, "stop"] == 50
    for name, reasons, known in (("refused", REFUSED, "overloaded"), ("failed", FAILED, "cancelled")):
        counted = {key[1]: value for key, value in found.items() if key[0] == f"{name}_requests_total"}
        assert counted == dict.fromkeys(reasons, 0) | {known: 1, OTHER: NAMES + 50}


def test_two_monitors_share_nothing_and_threads_lose_nothing() -> None:
    monitor, other = Monitor(), Monitor()

    def work() -> None:
        for _ in range(200):
            monitor.answered(STEERING, answer(term(1, 1, 3.0, 3.0, 1.0)), 0.1, True)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told(monitor)["flagged_answers_total", "honest"] == 800
    assert told(monitor)["projection_before_recent", "honest"] == pytest.approx(0.5)
    assert ("flagged_answers_total", "honest") not in told(other)


@pytest.fixture(scope="module")
def streams(pilot):
    """A function: (catalog's policy, monitor only) -> metrics of a calm and of an attacked stream of the same size."""
    concept = load_concept("dishonesty", pilot.info.language)
    answers = contrast(pilot, concept)
    prompts = [make(concept, "validation", 24) for make in (baseline_prompts, attack_prompts)]

    def serve(pool: str, policy: PolicySpec, monitor_only: bool = False) -> list[dict[tuple[str, ...], float]]:
        catalog = Catalog(pilot.info, "pilot", "locked", "honest", monitor_only)
        catalog.put_direction("dishonesty", answers.direction(pool=pool))
        catalog.put_policy("honest", policy)
        steering = catalog.resolve("pilot", None)
        found = []
        for stream in prompts:
            monitor = Monitor()
            for response in pilot.generate(stream, WHOLE, steering.edit):
                done = Answer(response, 1, len(response.token_ids))
                monitor.answered(steering, done, 0.1, flagged(response.receipt, steering))
            found.append(told(monitor))
        return found

    return serve


def test_an_attack_shows_before_an_effective_policy_and_not_after_it(streams) -> None:
    policy = PolicySpec(direction="dishonesty", method="sttp", layers=(0,), strength=12)
    calm, attacked = streams("prompt_last", policy)
    before = [found["projection_before_recent", "honest"] for found in (calm, attacked)]
    after = [found["projection_after_recent", "honest"] for found in (calm, attacked)]
    assert before[1] < before[0] - 0.15
    assert min(after) > 1
    assert after[1] > after[0] - 0.1
    below = [found["projection_before_bucket", "honest", "0.0"] for found in (calm, attacked)]
    assert below[1] >= below[0] + 6  # of 24 answers
    assert attacked["edited_tokens_total", "honest"] / attacked["seen_tokens_total", "honest"] > 0.3
    assert [found["flagged_answers_total", "honest"] for found in (calm, attacked)] == [0, 0]


def test_an_attack_shows_where_nothing_is_edited(streams) -> None:
    policy = PolicySpec(direction="dishonesty", method="sttp", layers=(1,), strength=12)
    calm, attacked = streams("response_mean", policy, monitor_only=True)
    for found in (calm, attacked):
        assert found["perturbation_total", "honest"] == 0
        means = [found[f"projection_{when}_recent", "honest"] for when in ("before", "after")]
        np.testing.assert_allclose(means[0], means[1], rtol=0, atol=1e-6)
    assert attacked["projection_before_recent", "honest"] < calm["projection_before_recent", "honest"] - 0.5
    flags = [found["flagged_answers_total", "honest"] for found in (calm, attacked)]
    assert flags[0] <= 4
    assert flags[1] >= 20
