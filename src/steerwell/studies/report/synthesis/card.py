"""The data-quality card of a cell: what every source's texts are like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from steerwell.studies.report.synthesis.measures import Cell
from steerwell.studies.report.text import MISSING, Markdown, escaped, number, table
from steerwell.studies.synthesis.arms import BY_HM3, ORIGINAL, PROMPTED, STEERED, UNSTEERED
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example

MEASURED = {
    "S": "success",
    "C": "coherence",
    "MATTR": "mattr",
    "Vendi": "vendi",
    "cosine distance": "cosine_distance",
    "within a prompt": "cosine_distance_within",
    "1 − self-BLEU": "self_bleu",
    "distinct-2": "distinct",
    "compression": "compression",
}
Sets = Sequence[Sequence[Example]]


def card(cell: Cell) -> Markdown:
    """Every source's texts, those of the arms that are singled out, and the real ones that are tested on."""
    rows = [_row(cell, f"all {source}", cell.arms(source)) for source in ("steered", "prompted")]
    rows += [_row(cell, name, [cell.roles[name]]) for name in (STEERED, BY_HM3, PROMPTED, UNSTEERED, ORIGINAL)
             if name in cell.roles]  # fmt: skip
    for name, label in (("violating", VIOLATING), ("benign", BENIGN)):
        real = [example for example in cell.result.test if example.label == label]
        rows.append([Markdown(f"**real test, {name}**"), 1, *_counts([real]), *[""] * (2 + len(MEASURED))])
    header = ("texts", "sets", "n", "blank", "prompts in a set", "repeated exactly", "words, mean", "prompts in test",
              "texts in test", *MEASURED)  # fmt: skip
    return table(header, [row for row in rows if row[1]])


def _row(cell: Cell, name: str, arms: Sequence[int]) -> list[object]:
    """Some arms' texts together: counts added up, measures averaged, with the lowest and highest in small print."""
    rows = [cell.result.arms[at] for at in arms]
    sets = [cell.texts(at) for at in arms]
    counts: list[object] = [sum(row["texts"] for row in rows), sum(row["blank"] for row in rows), *[MISSING] * 5]
    if all(sets):
        counts = [*_counts(sets), *_shared(sets, cell.result.test)]
    measures = [_ranged(cell.result.values(arms, measure)) for measure in MEASURED.values()]
    return [Markdown(f"**{escaped(name)}**"), len(arms), *counts, *measures]


def _counts(sets: Sets) -> list[object]:
    """Texts, blank ones, prompts (mean over sets), exact repetitions within a set, and words (mean over texts)."""
    responses = [[example.response for example in each] for each in sets]
    flat = [text for each in responses for text in each]
    prompts = [len({example.prompt for example in each}) for each in sets]
    return [
        len(flat),
        sum(not text.strip() for text in flat),
        number(float(np.mean(prompts)), 0),
        sum(len(each) - len(set(each)) for each in responses),
        number(float(np.mean([len(text.split()) for text in flat])) if flat else math.nan, 1),
    ]


def _shared(sets: Sets, test: Sequence[Example]) -> list[object]:
    """Prompts that the test set has too, and texts that it has word for word."""
    prompts, responses = {_plain(example.prompt) for example in test}, {_plain(example.response) for example in test}
    written = [example for each in sets for example in each]
    asked = {_plain(example.prompt) for example in written}
    return [len(asked & prompts - {""}), sum(_plain(example.response) in responses - {""} for example in written)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _ranged(values: Iterable[float]) -> Markdown:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return number(math.nan)
    low, high = min(known), max(known)
    small = f"<br><small>{number(low, 2)} to {number(high, 2)}</small>" if len(known) > 1 else ""
    return Markdown(number(float(np.mean(known)), 2) + small)
