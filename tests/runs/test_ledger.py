"""A run's plan and its ledger: nothing lost, nothing repeated, nothing mixed up."""

from __future__ import annotations

import math
import sqlite3
import threading
from pathlib import Path

import pytest

from steerwell.core.errors import ArgumentError, ArtifactError
from steerwell.runs.ledger import Ledger, execute
from steerwell.runs.plan import plan

ABOUT = {"what": "test", "numbers": [1, 2.5]}


def doubled(items):
    return [{"item": item, "twice": 2 * item} for item in items]


def test_plan_covers_every_item_once_in_order_of_likeness() -> None:
    units = plan("a", [3, 1, 2, 5, 4], 2, order=lambda item: -item)
    assert [unit.items for unit in units] == [(5, 4), (3, 2), (1,)]
    assert [unit.number for unit in units] == [0, 1, 2]
    assert units == plan("a", [3, 1, 2, 5, 4], 2, order=lambda item: -item)
    keys = {unit.key for size in (1, 2) for phase in "ab" for unit in plan(phase, [1, 2], size)}
    assert len(keys) == 6


@pytest.mark.parametrize(("items", "size", "said"), [([1, 2], 0, "size: got 0"), ([1, [2], [2]], 2, "comes twice")])
def test_a_bad_plan_is_refused(items, size: int, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        plan("a", items, size)


def test_finished_units_are_not_done_again(tmp_path: Path) -> None:
    units, done, seen = plan("a", list(range(7)), 3), [], []

    def work(items):
        done.append(items)
        if len(done) == 2:
            raise KeyboardInterrupt
        return doubled(items)

    with Ledger(tmp_path / "deep" / "run.sqlite", ABOUT) as ledger, pytest.raises(KeyboardInterrupt):
        execute(ledger, units, work)
    with Ledger(tmp_path / "deep" / "run.sqlite", ABOUT) as ledger:
        execute(ledger, units, work, seen.append)
        assert done == [(0, 1, 2), (3, 4, 5), (3, 4, 5), (6,)]
        assert seen == [3, 3, 1]
        assert list(ledger.rows("a")) == doubled(range(7))
        assert list(ledger.rows("b")) == []


def test_rows_keep_nan_and_every_script(tmp_path: Path) -> None:
    with Ledger(tmp_path / "run.sqlite", ABOUT) as ledger:
        ledger.record(plan("a", ["x"], 1)[0], [{"score": math.nan, "text": "naïve 文"}])
        (row,) = ledger.rows("a")
    assert math.isnan(row["score"])
    assert row["text"] == "naïve 文"


def test_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    Ledger(tmp_path / "run.sqlite", ABOUT).__exit__()
    with pytest.raises(ArgumentError, match=r"another run: numbers differ.*another folder"):
        Ledger(tmp_path / "run.sqlite", ABOUT | {"numbers": [1, 3]})
    with Ledger(tmp_path / "run.sqlite", ABOUT) as ledger:
        ledger.record(plan("a", [1], 1)[0], doubled([1]))
        with pytest.raises(ArgumentError, match="not the one now planned"):
            execute(ledger, plan("a", [2], 1), doubled)


def test_a_unit_is_written_whole_and_once(tmp_path: Path) -> None:
    unit = plan("a", [1, 2], 2)[0]
    with Ledger(tmp_path / "run.sqlite", ABOUT) as ledger:
        with pytest.raises(ArgumentError, match="got 1 for the 2 items"):
            ledger.record(unit, doubled([1]))
        ledger.record(unit, doubled([1, 2]))
        with pytest.raises(ArgumentError, match="already in"):
            ledger.record(unit, doubled([1, 2]))


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing of the kind, and long enough to be read as a page" * 50)
    with pytest.raises(ArtifactError, match="no usable ledger"):
        Ledger(tmp_path / "notes.txt", ABOUT)


def test_it_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    with Ledger(tmp_path / "run.sqlite", ABOUT) as ledger:
        reader = sqlite3.connect(f"file:{tmp_path / 'run.sqlite'}?mode=ro", uri=True)
        for unit in plan("a", [1, 2, 3], 1):
            ledger.record(unit, doubled(unit.items))
            assert reader.execute("SELECT count(*) FROM units").fetchone() == (unit.number + 1,)
        reader.close()


# Several units in flight ----------------------------------------------------------------------------------------------


class Many:
    """An engine that many can ask at a time."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once


def content(path: Path) -> list[tuple[object, ...]]:
    """A ledger's units but for their time stamps."""
    base = sqlite3.connect(path)
    found = base.execute("SELECT phase, number, key, rows FROM units ORDER BY phase, number").fetchall()
    base.close()
    return found


def test_units_in_flight_are_done_together_and_leave_what_one_by_one_leaves(tmp_path: Path) -> None:
    units, meeting, last = plan("a", list(range(6)), 1), threading.Barrier(3, timeout=60), threading.Event()
    threads, seen = set(), []

    def work(items):
        threads.add(threading.get_ident())
        meeting.wait()  # never passed by fewer than three at a time
        if items == (5,):
            last.set()
        elif items == (0,):  # the first one is done last: written at its place all the same
            assert last.wait(60)
        return doubled(items)

    with Ledger(tmp_path / "one.sqlite", ABOUT) as ledger:
        execute(ledger, units, doubled)
    with Ledger(tmp_path / "many.sqlite", ABOUT) as ledger:
        execute(ledger, units, work, seen.append, Many(4))
        assert list(ledger.rows("a")) == doubled(range(6))
    assert content(tmp_path / "many.sqlite") == content(tmp_path / "one.sqlite")
    assert threading.get_ident() not in threads
    assert seen == [1] * 6


def test_an_error_ends_the_units_in_flight_and_keeps_those_written(tmp_path: Path) -> None:
    units, written, again = plan("a", list(range(8)), 1), threading.Event(), []

    def fails(items):
        if items == (1,):
            assert written.wait(60)
            raise ArgumentError("unit 1 cannot be done")
        return doubled(items)

    def works(items):
        again.append(items[0])
        return doubled(items)

    with Ledger(tmp_path / "run.sqlite", ABOUT) as ledger:
        with pytest.raises(ArgumentError, match="unit 1 cannot"):
            execute(ledger, units, fails, lambda _count: written.set(), Many(2))
        kept = ledger.finished("a")
        assert kept
        assert 1 not in kept
        execute(ledger, units, works, None, Many(2))
        assert sorted(again) == [number for number in range(8) if number not in kept]
        assert list(ledger.rows("a")) == doubled(range(8))
