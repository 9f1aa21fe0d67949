"""`steerwell quality`: how good and how diverse the texts of a file are."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from steerwell.apps.cli.common import Json, err, out, print_json, progress
from steerwell.core.errors import ArgumentError

if TYPE_CHECKING:
    from steerwell.scoring.intervals import Interval
    from steerwell.scoring.quality import Quality
    from steerwell.synthesis.files import Row

AXES = {
    "hm3": "HM3 of S, C, D",
    "hm2": "HM of S, C",
    "success": "success S",
    "coherence": "coherence C",
    "diversity": "diversity D",
}
SHORT = {"hm3": "HM3", "hm2": "HM(S, C)", "success": "S", "coherence": "C", "diversity": "D"}
BESIDE = {"mattr": "MATTR", "vendi": "Vendi"}  # the parts of D


def quality(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, JSON, CSV or Parquet.", dir_okay=False)],
    text_col: Annotated[str, typer.Option(help="Column of the texts.")] = "response",
    prompt_col: Annotated[
        str | None, typer.Option(help="Column of what they answer; default: 'prompt' if there is one.")
    ] = None,
    success_col: Annotated[
        str | None, typer.Option(help="Column of their success, 0 to 1; default: 'success' if there is one.")
    ] = None,
    coherence_col: Annotated[
        str | None, typer.Option(help="Column of their coherence, 0 to 1; default: 'coherence' if there is one.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Column: one row of figures for each of its values.")] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Texts looked at; default: all, with --by as many as the fewest.")
    ] = None,
    words: Annotated[int, typer.Option(min=1, help="Words of every text that count, from its start.")] = 50,
    window: Annotated[int, typer.Option(min=1, help="Words that the moving average (MATTR) looks at.")] = 15,
    embedder: Annotated[
        str, typer.Option(help="minilm, hashing (spelling, no model), a sentence-transformers hub id or folder.")
    ] = "minilm",
    limit: Annotated[int | None, typer.Option(min=1, help="Read this many rows only, from the start.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of texts and of the intervals' groups.")] = 42,
    as_json: Json = False,
) -> None:
    """Success, coherence and diversity of texts, their harmonic mean (HM3), and 95 % intervals.

    Success and coherence are what a judge wrote into the file; without them HM3 is missing, never guessed. Figures
    compare at the same number of texts and words, embedder and language only.
    """
    from steerwell.scoring.embeddings import load_embedder
    from steerwell.scoring.quality import quality as measured
    from steerwell.synthesis.files import column, read_table

    rows = read_table(file)[:limit]
    columns: dict[str, Any] = {
        "texts": [_text(value) for value in column(rows, text_col, str(file))],
        "prompts": _optional(rows, prompt_col, "prompt", file),
        "success": _numbers(rows, success_col, "success", file),
        "coherence": _numbers(rows, coherence_col, "coherence", file),
    }
    parts = _parts([_text(value) for value in column(rows, by, str(file))] if by else [""] * len(rows))
    fewest = min(parts, key=lambda name: len(parts[name]))
    if n and n > len(parts[fewest]):
        where = f"{by} {fewest!r}" if by else "the file"
        raise ArgumentError(f"--n: got {n}; {where} has {len(parts[fewest])} texts; give a number up to that")
    settings: dict[str, Any] = {"size": n or len(parts[fewest]), "words": words, "window": window, "seed": seed}
    embed = load_embedder(embedder)
    found: dict[str, Quality] = {}
    with progress("measuring", len(parts)) as advance:
        for name, part in parts.items():
            mine: dict[str, Any] = {key: each and [each[row] for row in part] for key, each in columns.items()}
            found[name] = measured(mine.pop("texts"), embeddings=embed, **mine, **settings)
            advance(1)
    made = {"file": str(file), "embedder": embedder}
    if as_json:
        listed = [made | ({by: name} if by else {}) | _summary(each) for name, each in found.items()]
        print_json(listed if by else listed[0])
        return
    out.print(_by_table(by, found) if by else _table(found[""]))
    _notes(found, embedder)


def _optional(rows: list[Row], name: str | None, default: str, file: Path) -> list[Any] | None:
    """A column that was asked for, or one that is used where there is one."""
    from steerwell.synthesis.files import column

    if name is None and not any(default in row for row in rows):
        return None
    return [_text(value) if default == "prompt" else value for value in column(rows, name or default, str(file))]


def _numbers(rows: list[Row], name: str | None, default: str, file: Path) -> list[float] | None:
    values = _optional(rows, name, default, file)
    if values is None:
        return None
    try:
        return [math.nan if value is None or value == "" else float(value) for value in values]
    except (TypeError, ValueError) as error:
        fix = "give numbers from 0 to 1; an empty cell is one that was not judged"
        raise ArgumentError(f"{file}: column {name or default!r}: {error}; {fix}") from error


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _parts(names: list[str]) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        parts.setdefault(name, []).append(row)
    return parts


def _summary(each: Quality) -> dict[str, Any]:
    counts = {name: getattr(each, name) for name in ("n", "words", "window", "seed", "groups", "empty", "short")}
    return counts | {"measures": {name: asdict(interval) for name, interval in each.intervals().items()}}


def _table(each: Quality) -> Table:
    from steerwell.scoring.diversity import DIVERSITY

    table = Table(title=f"quality of {each.n} texts, first {each.words} words of each")
    table.add_column("measure", no_wrap=True)
    for name in ("value", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("better", no_wrap=True)
    for name, interval in each.intervals().items():
        measure = None if name in AXES else DIVERSITY.get(name)
        better = "lower" if measure and not measure.more_is_diverse else "higher"
        title = measure.title if measure else AXES[name]
        ends = name in ("diversity", "vendi")
        table.add_row(title, _number(interval.estimate), _bounds(interval), better, end_section=ends)
    return table


def _by_table(by: str, found: dict[str, Quality]) -> Table:
    first = next(iter(found.values()))
    caption = "in brackets: 95 % interval; higher is better; the other measures: --json"
    title = f"quality of {first.n} texts each, first {first.words} words of each"
    table = Table(title=title, caption=caption)
    table.add_column(escape(by), overflow="fold")
    for name in (SHORT | BESIDE).values():
        table.add_column(name, justify="right", no_wrap=True)
    for name, each in found.items():
        intervals = each.intervals()
        cells = [_number(intervals[key].estimate) for key in (SHORT | BESIDE)]
        table.add_row(escape(name), f"{cells[0]}\n[dim]{_bounds(each.hm3)}[/]", *cells[1:])
    return table


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _bounds(interval: Interval) -> str:
    return "" if math.isnan(interval.low) else f"({interval.low:.3f} to {interval.high:.3f})"


def _notes(found: dict[str, Quality], embedder: str) -> None:
    first = next(iter(found.values()))
    empty, short = (sum(getattr(each, name) for each in found.values()) for name in ("empty", "short"))
    out.print(f"MATTR over {first.window} words; embedder {embedder}; seed {first.seed}", markup=False, soft_wrap=True)
    if short:
        told = f"{short} texts have fewer than {first.window} words: MATTR leaves them out; {empty} have none"
        err.print(told, markup=False, soft_wrap=True)
    if any(math.isnan(each.hm3.estimate) for each in found.values()):
        lacking = [
            AXES[name]
            for name in ("success", "coherence", "diversity")
            if any(math.isnan(getattr(each, name).estimate) for each in found.values())
        ]
        err.print(f"HM3 is missing where there is no {', no '.join(lacking)}", markup=False, soft_wrap=True)
