"""The scheduler: what is asked under load equals what the library says alone, and nothing stops it."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from steerwell.core.errors import ArgumentError, EngineError, EngineGoneError, OverloadedError, TimedOutError
from steerwell.core.records import Edit, EditTerm, Prompt, Sampling
from steerwell.engines.base import Answer, Asked
from steerwell.engines.hf.batch import Batch
from steerwell.serving.limits import Limits
from steerwell.serving.scheduler import Scheduler, Ticket
from tests.engines.test_contract import PROMPTS, SHORT, close_to_a_tie, direction_of, mixed_edits

LONG = Sampling(max_new_tokens=100)
ENDLESS = Edit((EditTerm(3, np.eye(32, dtype=np.float32)[0], math.inf, 0.0, 0.0),))  # changes nothing, has a receipt


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def stepped(self, rows: int, waiting: int, seconds: float, tokens: int) -> None:
        self.rows.append(rows)


def run(engine, work: Callable[[Scheduler], Awaitable[None]], observer=None, **limits) -> None:
    """Let a scheduler do some work, and see that it still answers afterwards."""

    async def go() -> None:
        scheduler = Scheduler(engine, Limits(**limits), observer)
        scheduler.start()
        try:
            await work(scheduler)
            if scheduler.alive:
                assert (await answers(await scheduler.submit([Asked(PROMPTS[0], SHORT)])))[0].response.text
        finally:
            scheduler.stop()
        assert not scheduler.alive

    asyncio.run(asyncio.wait_for(go(), 60))


async def answers(ticket: Ticket) -> list[Answer]:
    """Every answer of a ticket; pieces must join to it."""
    texts, found = [""] * len(ticket.rows), {}
    async for index, piece in ticket:
        texts[index] += piece.text
        if piece.answer is not None:
            found[index] = piece.answer
    assert [found[index].response.text for index in range(len(texts))] == texts
    return [found[index] for index in range(len(texts))]


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


@pytest.fixture
def endless(engine, monkeypatch: pytest.MonkeyPatch):
    """The engine with answers that no end token ends."""
    monkeypatch.setattr(engine.loaded, "end_ids", frozenset())
    return engine


def test_mixed_requests_under_load_equal_the_librarys(engine) -> None:
    edits = mixed_edits(direction_of(engine))
    ways = [Asked(prompt, SHORT, edit) for prompt in PROMPTS for edit in edits] * 3
    seen = Seen()

    async def work(scheduler: Scheduler) -> None:
        async def one(place: int) -> Answer:
            await asyncio.sleep(0.003 * place)
            ticket = await scheduler.submit([ways[place]], client=str(place % 4), stream=place % 2 == 0)
            return (await answers(ticket))[0]

        got = await asyncio.gather(*(one(place) for place in range(len(ways))))
        excluded = 0
        for way, answer in zip(ways, got, strict=True):
            (alone,) = engine.generate([way.prompt], way.sampling, way.edit)
            if close_to_a_tie(engine, way.prompt, alone.token_ids, way.edit):
                excluded += 1
                continue
            assert (answer.response.text, answer.response.token_ids) == (alone.text, alone.token_ids)
            assert (answer.response.receipt is None) == (way.edit is None)
            if way.edit is not None:
                assert answer.response.receipt.edit_id == way.edit.id
                assert answer.response.receipt.tokens_edited == alone.receipt.tokens_edited
        assert excluded <= len(ways) // 4

    run(engine, work, seen, batch=8)
    assert 4 < max(seen.rows) <= 8


def test_several_answers_to_one_request_each_have_their_seed(engine) -> None:
    sampling = [Sampling(temperature=1.0, max_new_tokens=8, seed=seed) for seed in (7, 8, 9)]

    async def work(scheduler: Scheduler) -> None:
        got = await answers(await scheduler.submit([Asked(PROMPTS[0], how) for how in sampling]))
        alone = engine.generate([PROMPTS[0]] * 3, sampling)
        assert [item.response.text for item in got] == [item.text for item in alone]
        assert len({item.response.text for item in got}) > 1
        with pytest.raises(ArgumentError, match="17 answers at once; this server gives 16"):
            await scheduler.submit([Asked(PROMPTS[0], SHORT)] * 17)

    run(engine, work)


def test_at_rest_nothing_is_held(engine) -> None:
    async def work(scheduler: Scheduler) -> None:
        await answers(await scheduler.submit([Asked(PROMPTS[0], SHORT, ENDLESS)]))
        await until(lambda: scheduler._batch.rows == [] and scheduler._batch.width == 0)

    run(engine, work)


def test_a_cancelled_request_frees_its_row(endless) -> None:
    async def work(scheduler: Scheduler) -> None:
        ticket = await scheduler.submit([Asked(PROMPTS[0], LONG, ENDLESS)])
        async for _ in ticket:
            break
        waiting = await scheduler.submit([Asked(PROMPTS[1], SHORT)])
        assert scheduler._queue.size == 1  # one row only
        ticket.cancel()
        assert (await answers(waiting))[0].response.text
        assert len(ticket.rows[0].tokens) < 100

    run(endless, work, batch=1)


def test_what_waits_and_is_cancelled_never_starts(endless) -> None:
    async def work(scheduler: Scheduler) -> None:
        busy = await scheduler.submit([Asked(PROMPTS[0], LONG)])
        waiting = await scheduler.submit([Asked(PROMPTS[1], SHORT)] * 3)
        waiting.cancel()
        await answers(busy)
        await until(lambda: scheduler._queue.size == 0)
        assert [row.tokens for row in waiting.rows] == [[]] * 3

    run(endless, work, batch=1)


def test_time_is_up_for_the_one_that_waits_and_the_one_that_decodes(endless) -> None:
    async def work(scheduler: Scheduler) -> None:
        slow = await scheduler.submit([Asked(PROMPTS[0], LONG)] * 2, timeout=0.05)
        for late in (slow, await scheduler.submit([Asked(PROMPTS[1], LONG)], timeout=0.01)):
            with pytest.raises(TimedOutError, match="not answered in its time"):
                await answers(late)

    run(endless, work, batch=1)


def test_a_full_queue_says_when_to_come_again(endless) -> None:
    async def work(scheduler: Scheduler) -> None:
        first = await scheduler.submit([Asked(PROMPTS[0], LONG)])
        async for _ in first:
            break
        held = [await scheduler.submit([Asked(PROMPTS[0], SHORT)] * 2)]
        assert scheduler.ready
        with pytest.raises(OverloadedError, match="2 answers wait already and 2 more") as refused:
            await scheduler.submit([Asked(PROMPTS[0], SHORT)] * 2)
        assert 1 <= refused.value.retry_after <= 60
        held.append(await scheduler.submit([Asked(PROMPTS[0], SHORT)]))
        assert not scheduler.ready
        for ticket in held:
            assert (await answers(ticket))[0].response.text
        assert scheduler.ready
        first.cancel()

    run(endless, work, batch=1, queue=3)


def test_clients_take_turns(endless) -> None:
    order: list[str] = []

    async def work(scheduler: Scheduler) -> None:
        async def one(client: str, ticket: Ticket) -> None:
            await answers(ticket)
            order.append(client)

        tickets = [("first", await scheduler.submit([Asked(PROMPTS[0], LONG)], "first"))]
        tickets += [("greedy", await scheduler.submit([Asked(PROMPTS[0], SHORT)], "greedy")) for _ in range(6)]
        tickets += [("modest", await scheduler.submit([Asked(PROMPTS[0], SHORT)], "modest")) for _ in range(2)]
        await asyncio.gather(*(one(*item) for item in tickets))

    run(endless, work, batch=1)
    assert order == ["first", "greedy", "modest", "greedy", "modest", "greedy", "greedy", "greedy", "greedy"]


def test_a_short_answer_does_not_wait_for_a_long_one(endless) -> None:
    async def work(scheduler: Scheduler) -> None:
        long = await scheduler.submit([Asked(PROMPTS[2], LONG)])
        async for _ in long:
            break
        short = await scheduler.submit([Asked(PROMPTS[3], Sampling(max_new_tokens=3))])
        assert (await answers(short))[0].completion_tokens == 3
        assert len(long.rows[0].tokens) < 100
        long.cancel()

    run(endless, work)


def test_a_nearly_full_batch_fills_several_places_at_a_time(endless, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    join = Batch.join
    monkeypatch.setattr(Batch, "join", lambda self, rows: (joined.append(len(rows)), join(self, rows))[1])

    async def work(scheduler: Scheduler) -> None:
        sizes = [4 + place % 9 for place in range(120)]
        asked = [Asked(PROMPTS[0], Sampling(max_new_tokens=size)) for size in sizes]
        got = await asyncio.gather(*[answers(await scheduler.submit([item])) for item in asked])
        assert [answer.completion_tokens for (answer,) in got] == sizes

    run(endless, work, batch=24)
    assert sum(joined) == 121
    assert max(joined[2:]) >= 2
    assert len(joined) < 80


def test_memory_is_bounded_by_the_widest_row(endless) -> None:
    seen = Seen()

    async def work(scheduler: Scheduler) -> None:
        asked = [Asked(prompt, Sampling(max_new_tokens=20)) for prompt in (PROMPTS[0], Prompt.chat("x" * 100)) * 4]
        await asyncio.gather(*[answers(await scheduler.submit([item], str(n))) for n, item in enumerate(asked)])

    run(endless, work, seen, batch=8, batch_tokens=300)
    assert 2 <= max(seen.rows) < 8


def test_a_row_that_cannot_be_steered_fails_alone(engine) -> None:
    vector = np.eye(engine.info.d_model, dtype=np.float32)[1]
    huge = Edit((EditTerm(0, vector, math.inf, 3e38, 3e38), EditTerm(2, vector, 0.0, 1.0, 0.0)))

    async def work(scheduler: Scheduler) -> None:
        good = await scheduler.submit([Asked(PROMPTS[0], SHORT)])
        bad = await scheduler.submit([Asked(PROMPTS[0], SHORT, huge), Asked(PROMPTS[0], SHORT)])
        with pytest.raises(EngineError, match="not finite"):
            await answers(bad)
        assert (await answers(good))[0].response.text == engine.generate(PROMPTS[:1], SHORT)[0].text

    run(engine, work)


def test_an_answer_without_its_receipt_is_an_error(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerwell.engines.hf.plan import Plan

    monkeypatch.setattr(Plan, "receipt", lambda *_: None)

    async def work(scheduler: Scheduler) -> None:
        with pytest.raises(EngineError, match="was asked for"):
            await answers(await scheduler.submit([Asked(PROMPTS[0], SHORT, ENDLESS)]))

    run(engine, work)


def test_a_step_that_fails_takes_its_batch_only(engine, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    step, broken = type(engine.loaded).step, threading.Event()

    def failing(*arguments, **options):
        if broken.is_set():
            broken.clear()
            raise MemoryError
        return step(*arguments, **options)

    monkeypatch.setattr(type(engine.loaded), "step", failing)

    async def work(scheduler: Scheduler) -> None:
        broken.set()
        with pytest.raises(EngineError, match=r"step of the model failed \(MemoryError\)"):
            await answers(await scheduler.submit([Asked(PROMPTS[0], LONG)]))

    run(engine, work)
    assert "a step failed" in caplog.text


def test_draining_finishes_what_is_under_way_and_takes_no_more(endless) -> None:
    async def work(scheduler: Scheduler) -> None:
        tickets = [await scheduler.submit([Asked(PROMPTS[0], SHORT)]) for _ in range(5)]
        draining = asyncio.create_task(scheduler.drain(30))
        await asyncio.sleep(0)
        assert not scheduler.ready
        with pytest.raises(OverloadedError, match="about to stop"):
            await scheduler.submit([Asked(PROMPTS[0], SHORT)])
        await draining
        assert all([(await answers(ticket))[0].completion_tokens == 12 for ticket in tickets])
        scheduler.stop()

    run(endless, work, batch=2)


def test_stopping_fails_what_is_under_way(endless) -> None:
    async def work(scheduler: Scheduler) -> None:
        tickets = [await scheduler.submit([Asked(PROMPTS[0], LONG)]) for _ in range(3)]
        async for _ in tickets[0]:
            break
        await asyncio.to_thread(scheduler.stop)
        for ticket in tickets:
            with pytest.raises(EngineError, match="the server stopped"):
                await answers(ticket)

    run(endless, work, batch=1)


class Mortal:
    """An engine that works in other processes, and its batch; `dies` in the midst of a step, or at rest."""

    joins, padded = True, False

    def __init__(self, engine) -> None:
        self.row, self.gone, self.dies = engine.row, False, False
        self.dropped: list[object] = []

    def batch(self) -> Mortal:
        return self

    def admit(self, rows) -> int:
        return 0

    def step(self) -> int:
        if self.dies:
            self.gone = True
            raise EngineGoneError("they have ended")
        time.sleep(0.001)
        return 0

    def settle(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def drop(self, rows) -> None:
        self.dropped += rows
        if self.gone:
            raise EngineGoneError("they have ended")


def test_an_engine_whose_processes_end_fails_everything_at_once(engine) -> None:
    mortal = Mortal(engine)

    async def work(scheduler: Scheduler) -> None:
        tickets = [await scheduler.submit([Asked(prompt, LONG)]) for prompt in PROMPTS]  # one decodes, the others wait
        await until(lambda: len(scheduler._jobs) == 1)
        assert scheduler.alive
        mortal.dies = True
        for ticket in tickets:
            with pytest.raises(EngineGoneError, match="they have ended"):
                await answers(ticket)
        assert mortal.dropped == [tickets[0].rows[0]]
        assert not scheduler.alive
        assert not scheduler.ready
        await until(lambda: not scheduler._thread.is_alive())
        with pytest.raises(EngineGoneError, match="start the server again"):
            await scheduler.submit([Asked(PROMPTS[0], SHORT)])

    run(mortal, work, batch=1)


def test_an_engine_that_ends_while_nothing_is_asked_is_noticed(engine) -> None:
    mortal = Mortal(engine)

    async def work(scheduler: Scheduler) -> None:
        assert scheduler.ready
        mortal.gone = True
        assert not scheduler.alive
        assert not scheduler.ready
        with pytest.raises(EngineGoneError):
            await scheduler.submit([Asked(PROMPTS[0], SHORT)])

    run(mortal, work)


def test_models_whose_rows_cannot_join_are_served_in_waves(endless, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endless.loaded, "joinable", False)

    async def work(scheduler: Scheduler) -> None:
        tickets = [await scheduler.submit([Asked(prompt, SHORT)]) for prompt in PROMPTS]
        got = [(await answers(ticket))[0].response.text for ticket in tickets]
        assert got == [item.text for item in endless.generate(PROMPTS, [SHORT] * len(PROMPTS))]

    run(endless, work)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"timeout": math.inf}, {"queue": -1}, {"body": math.nan}])
def test_limits_are_above_zero(wrong) -> None:
    with pytest.raises(ArgumentError, match="expected a number above 0"):
        Limits(**wrong)
