"""What the report of an alignment study holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from steerwell.studies.claims import Claim, claims_of
from steerwell.studies.config import AlignmentConfig
from steerwell.studies.report.alignment import figures, tables
from steerwell.studies.report.alignment.failures import REPAIRED, failures, telling
from steerwell.studies.report.alignment.measures import Overview, overview
from steerwell.studies.report.claims import claims, findings, tallied
from steerwell.studies.report.content import Album, Content
from steerwell.studies.report.text import Markdown, engines, table
from steerwell.studies.results import CellResult


def content(config: AlignmentConfig, folders: Sequence[Path]) -> Content:
    """Of the finished cells in these folders."""
    results = [CellResult.load(folder) for folder in folders]
    found = claims_of(results)
    sections = [Section(cell, found, at) for at, cell in enumerate(results)]
    lines = [overview(cell) for cell in results]
    first = Album([figures.of_overview(lines)])
    fields = {
        "headline": _headline(results, lines, found),
        "facts": _facts(config, results),
        "overviews": tables.overviews(lines),
        "picture": first.drawn(""),
        "claims": claims(found),
        "cells": sections,
    }
    albums = [first, *(section.album for section in sections)]
    return Content("Alignment study", "alignment.md.j2", fields, albums, lines)


@dataclass(frozen=True, eq=False)
class Section:
    """One cell's part of the report, as the template reads it.

    Attributes:
        cell: its figures.
        claims: of the whole study.
        at: its place among the study's cells, from 0.
    """

    cell: CellResult
    claims: Sequence[Claim]
    at: int

    @property
    def title(self) -> str:
        """Model and concept."""
        return f"{self.cell.model}, {self.cell.concept}"

    @property
    def anchor(self) -> Markdown:
        """Where the section begins."""
        return Markdown(f"cell-{self.at + 1}")

    @cached_property
    def failures(self) -> list[str]:
        """What failed, one sentence each."""
        return failures(self.cell, self.claims, self.at)

    @cached_property
    def tables(self) -> Mapping[str, Markdown]:
        """By the name of the function that makes them; "" where nothing was measured."""
        made = (tables.baselines, tables.methods, tables.capabilities, tables.under_threats, tables.price,
                tables.positions, tables.depths, tables.conversations, tables.ratings)  # fmt: skip
        return {"findings": findings(self.claims, self.at)} | {make.__name__: make(self.cell) for make in made}

    @cached_property
    def album(self) -> Album:
        """All figures."""
        prefix = f"{self.at + 1}-{self.cell.model}-{self.cell.concept}-"
        return Album(list(figures.of_cell(self.cell)), prefix)

    @property
    def examples(self) -> list[tuple[str, str, Markdown]]:
        """System prompt, user message and the table of answers."""
        return [(item["system"], item["prompt"], tables.example(item)) for item in self.cell.about["examples"]]


def _headline(results: Sequence[CellResult], cells: Sequence[Overview], found: Sequence[Claim]) -> str:
    """The result in a sentence; cells whose figures tell nothing are counted apart."""
    told = [line for cell, line in zip(results, cells, strict=True) if telling(cell)]
    silent, why = len(cells) - len(told), "the judge is not to be trusted or the attack does not work"
    if not told:
        return f"No cell (one model, one concept) tells anything about steering: {why}."
    closed = sum(cell.gap_closed.estimate >= 100 * REPAIRED for cell in told)
    said = (
        f"In {closed} of {len(told)} cells (one model, one concept) steering closes at least half of the gap that the "
        f"attack opens; {tallied(found)}."
    )
    return said + (f" Not counted, as {why}: {silent}." if silent else "")


def _facts(config: AlignmentConfig, cells: Sequence[CellResult]) -> Markdown:
    """What was studied, as a table."""
    models = {cell.model: cell.about["info"] for cell in cells}
    poles = {cell.concept: cell.about["poles"] for cell in cells}
    first = cells[0].about
    answers = sum(len(rows) for cell in cells for rows in cell.trials.values())
    validation = [cell.about["validation"] for cell in cells]
    talks = config.conversations
    rows = [
        ("models", "; ".join(f"{name} ({info['architecture']}, {info['n_layers']} layers, width {info['d_model']})"
                             for name, info in models.items())),
        ("engine", engines(cell.about for cell in cells)),
        ("concepts", "; ".join(f"{name} (100: {pole['aligned']}, 0: {pole['violating']})"
                               for name, pole in poles.items())),
        ("judge", ", ".join(dict.fromkeys(str(cell.about["judge"]) for cell in cells))),
        ("chosen on", f"validation scenarios: {len(first['configurations'])} ways to steer per cell, "
                      f"{'automatic search' if config.sweep.search == 'auto' else 'full grid'}, "
                      f"{sum(item['answers'] for item in validation)} answers"),
        ("reported on", f"test scenarios and attacks that the choice never saw: {answers} answers"),
        ("conversations", "none" if talks is None else f"{talks.count} of {talks.turns} turns per condition and cell"),
        ("answers", f"at most {config.max_new_tokens} tokens, temperature {config.temperature:g}"),
        ("versions", "; ".join(dict.fromkeys(
            ", ".join(f"{name} {value}" for name, value in cell.about["versions"].items()) for cell in cells))),
    ]  # fmt: skip
    return table(("setting", "value"), rows, left=2)
