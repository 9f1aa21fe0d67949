"""The load test's own parts: it must see a wrong answer, a lost one and a growing memory, and let right ones pass."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

import pytest

pytest.importorskip("aiohttp")

from benchmarks import load_cases, load_client, load_report
from benchmarks.load import Lengths
from benchmarks.load_cases import POLICIES, SERVED, WAYS, planned, prompts
from benchmarks.load_client import BrokenAnswerError, Tally, Turn, endless, streamed, take, whole
from benchmarks.load_report import Measured, Memory, ratios, targets

from steerwell.serving.catalog import Catalog, PolicySpec
from tests.engines import test_contract
from tests.made import direction
from tests.server.live import live, service

STEERING = {
    "name": "honest",
    "edit_id": "e1",
    "receipts": [{"edit_id": "e1", "terms": [{"layer": 0, "tokens_seen": 7, "tokens_edited": 3}]}],
}
COMPARED = {
    "text": "a b",
    "finish_reason": "stop",
    "name": "honest",
    "edit_id": "e1",
    "counts": [[0, 7, 3]],
}


def sse(*chunks: object, end: str = "data: [DONE]\n\n") -> bytes:
    return ("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end).encode()


def delta(text: str = "", reason: str | None = None) -> dict:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


LAST = {"choices": [], "usage": {"completion_tokens": 3}, "steering": STEERING}


def test_a_stream_and_a_whole_reply_of_one_answer_read_alike() -> None:
    reply = {
        "choices": [{"message": {"content": "a b"}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 3},
        "steering": STEERING,
    }
    stream = sse(delta("a"), delta(" b"), delta(reason="stop"), LAST)
    assert streamed(stream) == whole(json.dumps(reply).encode()) == COMPARED | {"tokens": 3}
    assert load_client.has_text(stream)
    assert not load_client.has_text(sse(delta(), end='data: {"choi'))


@pytest.mark.parametrize(
    "body",
    [
        sse(delta("a"), delta(reason="stop"), LAST, end=""),
        sse(delta("a"), {"error": {"message": "no"}}),
        sse(delta("a"), LAST),
        sse(delta("a"), delta(reason="stop")),
        sse(delta("a", "stop"), LAST | {"steering": STEERING | {"edit_id": "e2"}}),
    ],
    ids=["cut off", "error", "no reason", "no receipt", "receipt of another edit"],
)
def test_a_broken_stream_is_no_answer(body: bytes) -> None:
    with pytest.raises(BrokenAnswerError):
        streamed(body)


@pytest.mark.parametrize("name", list(COMPARED))
def test_every_difference_is_wrong_unless_it_was_a_tie(name: str) -> None:
    got, tally = COMPARED | {name: "other"}, Tally()
    tally.judge(COMPARED | {"tie": False}, COMPARED, stream=True)
    tally.judge(COMPARED | {"tie": True}, got, stream=False)
    assert (tally.answers, tally.streams, tally.wrong, tally.tied, tally.turned) == (2, 1, 0, 1, 1)
    tally.judge(COMPARED | {"tie": False}, got, stream=False)
    assert tally.wrong == 1
    assert name in tally.faults[0]


def test_requests_are_streamed_in_turns() -> None:
    order = endless([7, 8, 9])
    assert [next(order) for _ in range(6)] == [(7, True), (8, False), (9, True), (7, False), (8, True), (9, False)]


@pytest.fixture(scope="module")
def directions(pilot):
    names = {spec["direction"] for spec in POLICIES.values()}
    return {name: direction(seed, model=pilot.info, concept=name) for seed, name in enumerate(sorted(names))}


def test_there_are_twenty_different_ways_of_every_kind(pilot, directions) -> None:
    ids = {way.edit(directions).id for way in WAYS}
    assert len(WAYS) == len(ids) == 20
    assert {way.policy is not None for way in WAYS} == {way.field is not None for way in WAYS} == {True, False}
    methods = {term.label.partition("(")[0] for way in WAYS for term in way.edit(directions).terms}
    assert methods == {
        "clamp",
        "conditional",
        "directional_ablation",
        "monitor",
        "stmp",
        "sttp",
        "swfc",
        "transport",
    }
    assert {term.position for way in WAYS for term in way.edit(directions).terms} == {"all", "response"}
    assert (load_cases.GATE_MARGIN, load_cases.LOGIT_MARGIN) == (test_contract.GATE_MARGIN, test_contract.LOGIT_MARGIN)


def test_a_turn_against_a_live_server_counts_right_wrong_and_lost(pilot, directions) -> None:
    asked = prompts(pilot.info.language)[:7:3]
    plan = planned(pilot, directions, asked)
    plan.cases[1]["expected"]["tie"] = False
    plan.cases[1]["expected"]["edit_id"] = "planted"
    catalog = Catalog(pilot.info, SERVED, "open", load_cases.DEFAULT, False)
    for name, item in directions.items():
        catalog.put_direction(name, item)
    for name, spec in POLICIES.items():
        catalog.put_policy(name, PolicySpec.model_validate(spec))
    with live(service(pilot, catalog=catalog)) as base:
        turns = {
            name: Turn(base, name, clients=len(order), seconds=0.0, ramp=0.0) for name, order in plan.traffic.items()
        }
        mixed, plain = (asyncio.run(take(turns[name], plan.cases, endless(plan.traffic[name]))) for name in turns)
    assert (mixed.wrong, mixed.lost, mixed.refused) == (1, 0, 0), mixed.faults
    assert "planted" in mixed.faults[0]
    assert mixed.answers == len(WAYS) * len(asked)
    assert mixed.ways == set(range(len(WAYS)))
    assert len(mixed.first) == mixed.streams
    assert (plain.wrong, plain.lost, plain.ways) == (0, 0, {len(WAYS)}), plain.faults
    gone = asyncio.run(take(turns["mixed"], plan.cases, endless(plan.traffic["mixed"][:1])))
    assert gone.lost >= 1
    assert gone.answers == 0


def measured(**changes: object) -> Measured:
    got = asdict(Tally(answers=10, requests=8, tokens=100, window=2.0, first=[0.1], latency=[0.2, 0.4], ways={1}))
    return Measured(got | changes, seconds=4.0, server=3.0, generator=1.0)


def turns_of(**mixed: object) -> dict[str, list[Measured]]:
    slow = measured(tokens=10)
    return {
        "mixed": [measured(**mixed), measured()],
        "unsteered": [measured(), measured()],
        "single": [slow, slow],
        "alone": [slow, slow],
    }


def looks(*sizes: float) -> list[list[tuple[float, int]]]:
    """A minute per turn, two looks in each: so many MiB, one less and one more."""
    return [[(60.0 * n, int((size + more) * 2**20)) for more in (-1, 1)] for n, size in enumerate(sizes)]


def test_memory_is_flat_or_not() -> None:
    flat = Memory.of(looks(*[500] * 6))
    assert (flat.begin, flat.end, flat.off, flat.low, flat.high, flat.looks) == (500, 500, 0, 499, 501, 12)
    assert flat.slope == pytest.approx(0, abs=1e-6)
    grown = Memory.of(looks(*range(500, 600, 10)))
    assert (grown.begin, grown.end, grown.furthest, grown.slope) == pytest.approx((510, 580, 590, 10))
    assert grown.off == pytest.approx(80 / 510)
    assert not load_report.passed(turns_of(), grown)
    assert not load_report.passed(turns_of(), Memory.of(looks(500, 500, 530, 500, 500, 500)))
    assert load_report.passed(turns_of(), flat)


def test_ratios_are_of_one_round_and_missed_targets_are_told() -> None:
    flat = Memory.of(looks(500, 500))
    assert [row.ratio.median for row in ratios(turns_of(tokens=200))] == [1.5, 1.0, 15.0, 15.0]
    for changes, missed in (({"tokens": 40}, "0.9"), ({"wrong": 1}, "wrong"), ({"lost": 2}, "lost")):
        turns = turns_of(**changes)
        (what,) = [what for what, _, met in targets(turns, flat) if not met]
        assert missed in what
        assert "MISSED" in load_report.document(turns, flat, [{"expected": {"tie": False}}], 200, 60.0)
    assert "MISSED" not in load_report.document(turns_of(), flat, [{"expected": {"tie": False}}], 200, 60.0)


def test_turns_add_up_to_the_minutes_that_were_asked_for() -> None:
    for minutes in (0.5, 3, 10):
        lengths = Lengths.of(minutes)
        assert lengths.rounds * lengths.mixed == pytest.approx(60 * minutes)
        assert lengths.rounds >= 2
        assert lengths.ramp < lengths.beside
