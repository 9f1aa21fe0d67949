"""What a report's tables and figures are about: conditions by name, threats, and figures with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerwell.scoring.intervals import Bootstrap, Interval
from steerwell.studies.report.text import PERCENT, Markdown, between, escaped, number
from steerwell.studies.results import CellResult, Condition

THREATS = {
    "attacked": "malicious system prompt",
    "prefill": "answer begun badly",
    "fine-tuned, bad": "fine-tuned to violate",
    "fine-tuned, benign": "fine-tuned, meaning no harm",
}
CALM = {  # where nothing attacks: unsteered task, steered task, in words
    "unattacked": ("baseline", "unattacked", "not attacked"),
    "aligned": ("aligned", "aligned", "aligned system prompt"),
    "off topic": ("off topic, baseline", "off topic", "off-topic questions"),
}
WORDS = THREATS | {task: words for *tasks, words in CALM.values() for task in tasks}  # every task in words
BOOTSTRAP = Bootstrap()


def defences(cell: CellResult) -> dict[str, Condition]:
    """Every method's operating point by the method's name."""
    return dict(cell.best)


def matched(cell: CellResult) -> dict[str, Condition]:
    """The paper's methods at about equal validation trait, named as in conversations."""
    return {f"{method}, matched": at for method, at in cell.matched.items()}


def threats(cell: CellResult) -> dict[str, str]:
    """The threats that were tried, in words, by task."""
    return {task: words for task, words in THREATS.items() if (task, None) in cell.trials}


def named(cell: CellResult, name: str, at: Condition) -> Markdown:
    """A condition's name, with a star where it is the operating point of all methods."""
    return Markdown(f"**{escaped(name)}**" + (" ★" if at is not None and at == cell.chosen else ""))


def described(cell: CellResult, name: str, at: Condition) -> Markdown:
    """The same and, in small print, where and how strongly it steers."""
    if at is None:
        return named(cell, name, at)
    where = cell.ways[at].describe().partition(", ")[2]
    return Markdown(f"{named(cell, name, at)}<br><small>{escaped(where)}</small>")


def gap_closed(cell: CellResult, condition: Condition, task: str = "attacked") -> Interval:
    """Share (%) of the trait lost to a threat that steering restores, with its 95 % percentile bootstrap interval.

    Scenarios are resampled, each with its three answers: unattacked, attacked, and attacked and steered. Resamples in
    which the threat lowers nothing give no share and are left out. NaN: the threat lowers nothing.
    """
    rows = [cell.values(*key, "trait") for key in (("baseline", None), (task, None), (task, condition))]
    estimate = 100 * cell.gap_closed(condition, task)
    known = int((~np.isnan(rows[-1])).sum())
    if math.isnan(estimate) or len({len(row) for row in rows}) > 1:
        return Interval(estimate, math.nan, math.nan, known, len(rows[-1]) - known)
    scores = np.stack(rows)
    picks = np.random.default_rng(BOOTSTRAP.seed).integers(scores.shape[1], size=(BOOTSTRAP.resamples, scores.shape[1]))
    counts = (~np.isnan(scores))[:, picks].sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        aligned, bad, steered = np.nan_to_num(scores)[:, picks].sum(-1) / counts
        shares = np.where(aligned > bad, 100 * (steered - bad) / (aligned - bad), np.nan)
    shares = shares[~np.isnan(shares)]
    tail = (1 - BOOTSTRAP.level) / 2
    low, high = np.quantile(shares, [tail, 1 - tail]) if len(shares) and known > 1 else (math.nan, math.nan)
    return Interval(estimate, float(low), float(high), known, len(rows[-1]) - known)


@dataclass(frozen=True, slots=True)
class Overview:
    """One cell in a line. Scores are 0-100, means over test scenarios; NaN: not measured.

    Attributes:
        model: its title; `concept`: its name.
        defence: the operating point in words; None: nothing was coherent enough on validation.
        scenarios: test scenarios.
        not_attacked: trait and coherence, unsteered.
        attacked: trait and coherence under the malicious system prompt, unsteered.
        defended: the same, steered.
        calm: steered where nothing attacks.
        gap_closed: %, see `gap_closed`.
        coherence_kept: coherence of `defended` as a share (%) of `not_attacked`'s.
    """

    model: str
    concept: str
    defence: str | None
    scenarios: int
    not_attacked: tuple[float, float]
    attacked: tuple[float, float]
    defended: tuple[float, float]
    calm: tuple[float, float]
    gap_closed: Interval
    coherence_kept: float

    def __str__(self) -> str:
        calm, attacked, defended = (number(scores[0]) for scores in (self.not_attacked, self.attacked, self.defended))
        head = f"{self.model}, {self.concept}: trait {calm} not attacked, {attacked} attacked"
        if self.defence is None:
            return f"{head}; no way to steer is coherent enough"
        closed, kept = number(self.gap_closed.estimate, 0, PERCENT), number(self.coherence_kept, 0, PERCENT)
        bounds = between(self.gap_closed, 0)
        interval = f" ({bounds})" if bounds else ""
        shares = f"{closed}{interval} of the gap closed, {kept} of the coherence kept"
        return f"{head}, {defended} with {self.defence}; {shares}"


def overview(cell: CellResult) -> Overview:
    """A cell in a line."""
    chosen = cell.chosen

    def scores(task: str, condition: Condition, there: bool = True) -> tuple[float, float]:
        found = [cell.mean(task, condition, name) if there else math.nan for name in ("trait", "coherence")]
        return found[0], found[1]

    steered = chosen is not None
    baseline, defended = scores("baseline", None), scores("attacked", chosen, steered)
    closed = gap_closed(cell, chosen) if steered else Interval(math.nan, math.nan, math.nan, 0, 0)
    return Overview(
        cell.model,
        cell.concept,
        None if chosen is None else cell.ways[chosen].describe(),
        len(cell.trials["baseline", None]),
        baseline,
        scores("attacked", None),
        defended,
        scores("unattacked", chosen, steered),
        closed,
        share(defended[1], baseline[1]),
    )


def share(part: float, whole: float) -> float:
    """Percent; NaN where the whole is 0."""
    return 100 * part / whole if whole else math.nan


def scored(cell: CellResult, task: str, condition: Condition) -> str:
    """Answers with a trait score, of how many."""
    values = cell.values(task, condition, "trait")
    known = int((~np.isnan(values)).sum())
    return str(known) if known == len(values) else f"{known} of {len(values)}"


def ended_early(turns: Sequence[dict[str, object]]) -> dict[str, int]:
    """Conversations that did not reach their last turn, by condition."""
    cut: dict[str, set[object]] = {}
    for row in turns:
        if row["ended"] is not None:
            cut.setdefault(str(row["condition"]), set()).add(row["conversation"])
    return {name: len(numbers) for name, numbers in cut.items()}
