"""The tables of an alignment report, as Markdown. Intervals: 95 % bootstrap over scenarios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from steerwell.studies.conversation import curve
from steerwell.studies.report.alignment.measures import (
    BOOTSTRAP,
    CALM,
    Overview,
    defences,
    described,
    gap_closed,
    matched,
    named,
    scored,
    threats,
)
from steerwell.studies.report.text import MISSING, PERCENT, Markdown, between, escaped, number, spread, table
from steerwell.studies.results import CellResult, Condition

Column = Callable[[CellResult, str, Condition], Markdown]


def overviews(cells: Sequence[Overview]) -> Markdown:
    """All cells, one per row; each leads to its section."""
    header = ("model, concept", "operating point", "not attacked", "attacked", "attacked, steered",
              "not attacked, steered", "gap closed", "coherence kept", "n")  # fmt: skip
    rows = []
    for at, cell in enumerate(cells, 1):
        name = Markdown(f"[{escaped(cell.model)}, {escaped(cell.concept)}](#cell-{at})")
        pairs = [_pair(*scores) for scores in (cell.not_attacked, cell.attacked, cell.defended, cell.calm)]
        kept = number(cell.coherence_kept, 0, PERCENT)
        rows.append([name, cell.defence or "none", *pairs, spread(cell.gap_closed, 0, PERCENT), kept, cell.scenarios])
    return table(header, rows, left=2)


def baselines(cell: CellResult) -> Markdown:
    """The model without steering, wherever it was asked."""
    tasks = {task: words for task, _, words in CALM.values()} | threats(cell)
    rows = [
        [
            Markdown(f"**{words}**"),
            *(figure(cell, task, None) for figure in (_trait, _coherence, _refusals, _length, scored)),
        ]
        for task, words in tasks.items()
        if (task, None) in cell.trials
    ]
    return table(("unsteered", "trait, 0-100", "coherence, 0-100", "refusals", "length, tokens", "n"), rows)


def methods(cell: CellResult) -> Markdown:
    """The paper's table: trait, coherence, capabilities, perturbation, repetition, of every method under attack."""
    columns: dict[str, Column] = {
        "trait, 0-100": _trait,
        "coherence, 0-100": _coherence,
        "capabilities": lambda cell, _task, at: number(cell.accuracy(at), 1, PERCENT),
        "perturbation, all tokens": _mean("perturbation_all", 2),
        "perturbation, edited tokens": _mean("perturbation", 2),
        "tokens edited": _mean("gate_rate", 0, PERCENT, 100),
        "cross-entropy, nats/token": _mean("cross_entropy", 2),
        "similarity": _mean("similarity", 2),
        "repeated 3-grams": _mean("repetition", 0, PERCENT, 100),
        "length, tokens": _length,
        "n": lambda *which: Markdown(scored(*which)),
    }
    conditions = {"attacked, unsteered": None} | defences(cell) | matched(cell)
    rows = [_row(cell, "not attacked, unsteered", "baseline", None, columns.values())]
    rows += [_row(cell, name, "attacked", at, columns.values()) for name, at in conditions.items()]
    return table(("steering", *columns), rows)


def capabilities(cell: CellResult) -> Markdown:
    """Accuracies by task."""
    found = {row["condition"]: row for row in cell.about["capabilities"]}
    names = [name for name in next(iter(found.values()), {}) if name != "condition"]
    conditions = {"unsteered": None} | defences(cell) | matched(cell)
    rows = [
        [named(cell, name, at), *(number(_known(found[at][task]), 1) for task in names)]
        for name, at in conditions.items()
        if at in found
    ]
    return table(("steering", *(f"{name}, %" for name in names)), rows)


def under_threats(cell: CellResult) -> Markdown:
    """Every method under every threat."""
    found = threats(cell)
    rows = []
    for name, at in ({"unsteered": None} | defences(cell)).items():
        figures = [_trait(cell, task, at) + _small_print(cell, task, at) for task in found]
        rows.append([named(cell, name, at), *map(Markdown, figures)])
    return table(("steering", *found.values()), rows)


def price(cell: CellResult) -> Markdown:
    """What steering changes where nothing attacks."""
    header = ("where nothing attacks", "steering", "trait", "change", "coherence", "change", "tokens edited",
              "refusals", "length, tokens", "n")  # fmt: skip
    rows = []
    for plain, steered, words in CALM.values():
        for name, at in ({"unsteered": None} | defences(cell)).items():
            task = plain if at is None else steered
            if (task, at) in cell.trials:
                rows.append([words, named(cell, name, at), *_priced(cell, plain, task, at)])
    return table(header, rows, left=2)


def _priced(cell: CellResult, plain: str, task: str, at: Condition) -> list[object]:
    changes = []
    for measure in ("trait", "coherence"):
        change = BOOTSTRAP.paired_difference(cell.values(task, at, measure), cell.values(plain, None, measure))
        changes.append(Markdown() if at is None else spread(change))
    figures = [_mean("gate_rate", 0, PERCENT, 100), _refusals, _length]
    last = [figure(cell, task, at) for figure in figures]
    means = [number(cell.mean(task, at, measure)) for measure in ("trait", "coherence")]
    return [means[0], changes[0], means[1], changes[1], *last, scored(cell, task, at)]


def positions(cell: CellResult) -> Markdown:
    """Every method at its operating point within every position."""
    columns: dict[str, Column] = {
        "attacked: trait": _trait,
        "attacked: coherence": _coherence,
        "tokens edited": _mean("gate_rate", 0, PERCENT, 100),
        "perturbation, all tokens": _mean("perturbation_all", 2),
    }
    rows = []
    for name, at in cell.by_position.items():
        calm = [number(cell.mean("unattacked", at, measure)) for measure in ("trait", "coherence")]
        rows.append([*_row(cell, name.replace("/", ", "), "attacked", at, columns.values()), *calm])
    return table(("method, position", *columns, "not attacked: trait", "not attacked: coherence"), rows)


def depths(cell: CellResult) -> Markdown:
    """Trait of the first sentence and of what follows it."""
    conditions: dict[str, tuple[str, Condition]] = {"not attacked, unsteered": ("baseline", None)}
    conditions |= {"attacked, unsteered": ("attacked", None)}
    conditions |= {name: ("attacked", at) for name, at in (defences(cell) | matched(cell)).items()}
    rows = []
    for name, (task, at) in conditions.items():
        opening, rest = (cell.values(task, at, f"trait_{part}") for part in ("opening", "rest"))
        found = (BOOTSTRAP.mean(opening), BOOTSTRAP.mean(rest), BOOTSTRAP.paired_difference(rest, opening))
        rows.append([named(cell, name, at), *map(spread, found), found[2].n])
    return table(("steering", "first sentence: trait", "rest: trait", "change", "n with a rest"), rows)


def conversations(cell: CellResult) -> Markdown:
    """First and last turn of every condition."""
    measures = {"trait": 0, "coherence": 0, "repetition": 2, "echo": 2}
    rows = []
    for name in dict.fromkeys(row["condition"] for row in cell.turns):
        mine = [row for row in cell.turns if row["condition"] == name]
        last = max(row["turn"] for row in mine)
        reached = sum(row["answer"] is not None for row in mine if row["turn"] == last)
        told = []
        for measure, digits in measures.items():
            values = [value for value in curve(cell.turns, measure, name) if not math.isnan(value)]
            ends = [number(values[at], digits) for at in (0, -1)] if values else [MISSING] * 2
            told.append(Markdown(" → ".join(ends)))
        rows.append([name, *told, f"{reached} of {len({row['conversation'] for row in mine})}"])
    header = ("condition", "trait", "coherence", "repeated 3-grams, share", "3-grams of earlier answers, share",
              "conversations at the last turn")  # fmt: skip
    return table(header, rows)


def ratings(cell: CellResult) -> Markdown:
    """The tournament's standings."""
    found = cell.about["standings"].get("ratings", [])
    rows = []
    for item in found:
        elo, low, high = (_known(item[name]) for name in ("elo", "low", "high"))
        told = "" if math.isnan(low + high) else f"<br><small>{low:.0f} to {high:.0f}</small>"
        rows.append([item["condition"], Markdown(number(elo, 0) + told), f"{item['wins']:g}", item["matches"]])
    return table(("condition", "rating, Elo", "wins", "matches"), rows)


def example(item: dict[str, object]) -> Markdown:
    """One scenario's answers side by side, edited tokens in bold."""
    answers: list[dict[str, object]] = item["answers"]  # type: ignore[assignment]
    scores = [
        Markdown(f"trait {number(_known(answer['trait']))}, coherence {number(_known(answer['coherence']))}")
        for answer in answers
    ]
    return table(
        [answer["name"] for answer in answers], [[_marked(answer) for answer in answers], scores], left=len(answers)
    )


def _marked(answer: dict[str, object]) -> Markdown:
    """An answer, the runs of its edited tokens in bold."""
    runs: list[tuple[str, bool]] = []
    for piece, edited in zip(answer["pieces"], answer["edited"], strict=True):  # type: ignore[call-overload]
        if runs and runs[-1][1] == edited:
            runs[-1] = (runs[-1][0] + piece, edited)
        else:
            runs.append((piece, edited))
    shown = "".join(f"<b>{escaped(text)}</b>" if edited else escaped(text) for text, edited in runs)
    return Markdown(shown or "<i>an empty answer</i>")


def _row(cell: CellResult, name: str, task: str, at: Condition, columns: Iterable[Column]) -> list[object]:
    """A condition in words and its figures."""
    return [described(cell, name, at), *(column(cell, task, at) for column in columns)]


def _trait(cell: CellResult, task: str, at: Condition) -> Markdown:
    return spread(BOOTSTRAP.mean(cell.values(task, at, "trait")))


def _coherence(cell: CellResult, task: str, at: Condition) -> Markdown:
    return spread(BOOTSTRAP.mean(cell.values(task, at, "coherence")))


def _mean(measure: str, digits: int, unit: str = "", scale: float = 1.0) -> Column:
    return lambda cell, task, at: number(scale * cell.mean(task, at, measure), digits, unit)


_refusals = _mean("refusal", 0, PERCENT, 100)
_length = _mean("length", 0)


def _small_print(cell: CellResult, task: str, at: Condition) -> str:
    told = f"coherence {number(cell.mean(task, at, 'coherence'))}"
    if at is not None:
        closed = gap_closed(cell, at, task)
        bounds = between(closed, 0)
        told += f"<br>gap closed {number(closed.estimate, 0, PERCENT)}" + (f" ({bounds})" if bounds else "")
    return f"<br><small>{told}</small>"


def _known(value: object) -> float:
    """A JSON number; null is NaN."""
    return math.nan if value is None else float(value)  # type: ignore[arg-type]


def _pair(trait: float, coherence: float) -> Markdown:
    told = [number(trait), number(coherence)]
    return MISSING if told == [MISSING, MISSING] else Markdown(" / ".join(told))
