"""The ledger: the finished units of a run in one SQLite file.

A unit's rows are written in one transaction after its work is done, so a run killed at any moment has lost at most the
units in flight, and resuming neither repeats a finished unit nor changes what it gave.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from steerwell.core.errors import ArgumentError, ArtifactError
from steerwell.engines.base import Engine
from steerwell.runs.plan import Unit

_SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS units (
    phase TEXT, number INTEGER, key TEXT NOT NULL, rows TEXT NOT NULL, finished TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (phase, number)
) WITHOUT ROWID;
"""
Row = dict[str, Any]
Work = Callable[[Sequence[Any]], Sequence[Row]]


class Ledger:
    """One run's finished units. One process writes; any number may read.

    Args:
        path: the SQLite file; it is made where it is missing.
        about: what the run is, as JSON values. A ledger of another run is refused.

    Raises:
        ArgumentError: the file belongs to a run with another `about`; the message names what differs.
        ArtifactError: the file is no ledger, or of an unknown schema.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._base = sqlite3.connect(self.path, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.executescript(_TABLES)
            self._introduce({"schema": _SCHEMA} | json.loads(json.dumps(about)))
        except sqlite3.DatabaseError as error:
            raise ArtifactError(f"{self.path} is no usable ledger ({error}); give another folder") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()

    def finished(self, phase: str) -> dict[int, str]:
        """Number and key of the phase's finished units."""
        return dict(self._base.execute("SELECT number, key FROM units WHERE phase = ? ORDER BY number", (phase,)))

    def record(self, unit: Unit, rows: Sequence[Row]) -> None:
        """Write a finished unit: one row per item, JSON values (NaN is kept).

        Raises:
            ArgumentError: another number of rows than items, or the unit is already there.
        """
        if len(rows) != len(unit.items):
            raise ArgumentError(f"rows: got {len(rows)} for the {len(unit.items)} items of unit {unit.number}")
        try:
            self._base.execute(
                "INSERT INTO units (phase, number, key, rows) VALUES (?, ?, ?, ?)",
                (unit.phase, unit.number, unit.key, json.dumps(list(rows), ensure_ascii=False)),
            )
        except sqlite3.IntegrityError as error:
            raise ArgumentError(f"unit {unit.number} of {unit.phase!r} is already in {self.path}") from error

    def rows(self, phase: str) -> Iterator[Row]:
        """The rows of a phase's finished units, in the order of the plan."""
        with closing(self._base.execute("SELECT rows FROM units WHERE phase = ? ORDER BY number", (phase,))) as found:
            for (text,) in found:
                yield from json.loads(text)

    def _introduce(self, about: Mapping[str, Any]) -> None:
        known = {name: json.loads(value) for name, value in self._base.execute("SELECT name, value FROM about")}
        if not known:
            values = [(name, json.dumps(value, ensure_ascii=False)) for name, value in about.items()]
            self._base.execute("BEGIN IMMEDIATE")
            self._base.executemany("INSERT INTO about (name, value) VALUES (?, ?)", values)
            self._base.execute("COMMIT")
            return
        changed = sorted(name for name in known.keys() | about.keys() if known.get(name) != about.get(name))
        if changed:
            self._base.close()
            raise ArgumentError(
                f"{self.path} belongs to another run: {', '.join(changed)} differ; resume with what the run was "
                "started with, or give another folder"
            )


def execute(
    ledger: Ledger,
    units: Sequence[Unit],
    work: Work,
    progress: Callable[[int], None] | None = None,
    engine: Engine | None = None,
) -> None:
    """Do the units that are not finished yet, and write each down as soon as it is done.

    Args:
        ledger: where finished units are, and go; this thread alone writes.
        units: the plan of one phase.
        work: items of one unit -> one row per item.
        progress: called with the number of items done since the last call; finished units count at once.
        engine: whom the work asks; where several actors answer for it (`RayEngine`), several units are in flight, each
            in a thread. Without it, units are done one after another.

    Raises:
        ArgumentError: the ledger holds a unit that differs from the plan's.
    """
    finished = ledger.finished(units[0].phase) if units else {}
    done = progress or (lambda _count: None)
    for unit in units:
        if finished.get(unit.number, unit.key) != unit.key:
            raise ArgumentError(
                f"unit {unit.number} of {unit.phase!r} in {ledger.path} is not the one now planned; the run was "
                "started with other settings or another version: give another folder"
            )
        if unit.number in finished:
            done(len(unit.items))
    left = [unit for unit in units if unit.number not in finished]
    for unit, rows in _done(left, work, getattr(engine, "at_once", 1)):
        ledger.record(unit, rows)
        done(len(unit.items))


def _done(units: Sequence[Unit], work: Work, at_once: int) -> Iterator[tuple[Unit, Sequence[Row]]]:
    """Units and their rows: in the order given, or, with several in flight, as they are done."""
    if at_once == 1:
        yield from ((unit, work(unit.items)) for unit in units)
        return
    pool = ThreadPoolExecutor(at_once)
    try:
        begun = {pool.submit(work, unit.items): unit for unit in units}
        for future in as_completed(begun):
            yield begun.pop(future), future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody wants what is still in flight
