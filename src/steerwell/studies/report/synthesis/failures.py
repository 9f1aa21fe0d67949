"""What failed in a cell, found by rule and not by eye."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from steerwell.studies.claims import Claim
from steerwell.studies.report.synthesis.measures import DIGITS, Cell, signed
from steerwell.studies.report.text import number
from steerwell.studies.synthesis.arms import BROKEN, PROMPTED, STEERED, UNSTEERED

GIVEN_AWAY = 0.02  # AUROC from which a regret is listed
REPEATED = 0.5  # share of a set's texts from which repetition is listed
BLANK = 0.1  # share of a set's texts from which emptiness is listed


def failures(cell: Cell, claims: Sequence[Claim], at: int) -> list[str]:
    """One sentence each; `at` is the cell's place among the claims' findings."""
    found = [sentence for rule in _RULES for sentence in rule(cell)]
    broken = [claim.name for claim in claims if claim.findings[at].holds is False]
    return found + ([f"Claims that fail: {', '.join(broken)}."] if broken else [])


def _not_measurable(cell: Cell) -> Iterator[str]:
    """A test set on which sets of training data cannot be told apart."""
    if cell.unmeasurable:
        yield f"Not measurable: {cell.unmeasurable}. No comparison of training data here says anything."


def _without_judge(cell: Cell) -> Iterator[str]:
    """Missing success and coherence."""
    if cell.result.about["judge"] is None:
        yield "No judge: success and coherence are missing, and HM3 with them."
        return
    texts = [text for at in cell.arms("steered") for text in cell.texts(at)]
    missing = sum(math.isnan(text.success) or math.isnan(text.coherence) for text in texts)
    if missing:
        yield f"The judge gave no success or no coherence for {missing} of {len(texts)} steered texts."


def _untrained(cell: Cell) -> Iterator[str]:
    """Arms without detectors, or with few texts."""
    for source in ("steered", "prompted", "unsteered"):
        arms = cell.arms(source)
        lost = [at for at in arms if math.isnan(cell.result.auroc(at))]
        if lost:
            yield f"No detector learns from {len(lost)} of {len(arms)} {source} sets: they hold fewer than two texts."
        rows = [cell.result.arms[at] for at in arms if at not in lost]
        blank = [row for row in rows if row["blank"] >= BLANK * row["texts"]]
        if blank:
            yield f"{len(blank)} of {len(arms)} {source} sets are blank for {BLANK:.0%} of their texts or more."


def _repeating(cell: Cell) -> Iterator[str]:
    """Sets that hold few different texts."""
    for source in ("steered", "prompted", "unsteered"):
        arms = cell.arms(source)
        sets = [[text.response for text in cell.texts(at)] for at in arms]
        poor = [each for each in sets if len(each) - len(set(each)) >= REPEATED * len(each) > 0]
        if poor:
            fewest = min(poor, key=lambda each: len(set(each)))
            words = f"{len(poor)} of {len(arms)} {source} sets repeat themselves in half of their texts or more"
            yield f"{words}, at worst {len(set(fewest))} different texts of {len(fewest)}."


def _not_better(cell: Cell) -> Iterator[str]:
    """Comparisons that steering loses, or does not win."""
    if cell.unmeasurable:
        return
    for other, words in ((PROMPTED, "the best prompted ones"), (cell.base, "real examples alone")):
        found = cell.difference(STEERED, other)
        if found.high < 0:
            yield f"The best steered texts train worse detectors than {words}: AUROC difference {signed(found)}."
    real = cell.difference(BROKEN, cell.base)
    if real.estimate >= 0:
        yield (
            "Text that broke without any steering trains detectors as good as real examples do (AUROC difference "
            f"{signed(real)}): much of what they find is that a text is unlike benign ones, not the concept."
        )
    plain, added = cell.difference(STEERED, UNSTEERED), cell.difference(STEERED, cell.base)
    if plain.low <= 0:
        yield f"The best steered texts are not surely better than unsteered ones: AUROC difference {signed(plain)}."
    if cell.kept and added.low <= 0 <= added.high:
        yield f"Adding the best steered texts to {cell.kept} originals gains nothing sure: {signed(added)}."


def _selector(cell: Cell) -> Iterator[str]:
    """A selector that gives much away, or is no better than chance."""
    found = {item.rule: item for item in cell.selections}
    if (mine := found.get("hm3")) is None or cell.unmeasurable:
        return
    if mine.regret >= GIVEN_AWAY:
        yield f"HM3 picks a configuration {number(mine.regret, DIGITS)} AUROC below the best one."
    if mine.auroc <= found["at random"].auroc:
        yield "What HM3 picks is no better than the mean configuration."


_RULES: tuple[Callable[[Cell], Iterator[str]], ...] = (
    _not_measurable,
    _without_judge,
    _untrained,
    _repeating,
    _not_better,
    _selector,
)
