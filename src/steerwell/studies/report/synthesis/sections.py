"""What the report of a synthesis study holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from steerwell.studies.claims import Claim
from steerwell.studies.report.claims import claims, findings, tallied
from steerwell.studies.report.content import Album, Content
from steerwell.studies.report.synthesis import figures, tables
from steerwell.studies.report.synthesis.card import card
from steerwell.studies.report.synthesis.failures import failures
from steerwell.studies.report.synthesis.measures import DIGITS, Cell, by_concept, concept_correlations, overview
from steerwell.studies.report.text import Markdown, engines, number, table
from steerwell.studies.synthesis.arms import PROMPTED, STEERED
from steerwell.studies.synthesis.claims import claims_of
from steerwell.studies.synthesis.config import SynthesisConfig
from steerwell.studies.synthesis.results import SynthesisResult


def content(config: SynthesisConfig, folders: Sequence[Path]) -> Content:
    """Of the finished cells in these folders."""
    results = [SynthesisResult.load(folder) for folder in folders]
    cells = [Cell(result, config.kept) for result in results]
    found = claims_of(results)
    sections = [Section(cell, found, at, config.examples) for at, cell in enumerate(cells)]
    lines = [overview(cell) for cell in cells]
    followed = concept_correlations(cells)
    album = Album([figures.of_overview(lines), *figures.of_concepts(cells, followed)])
    fields = {
        "headline": _headline(cells, found),
        "facts": _facts(config, cells),
        "overviews": tables.overviews(lines),
        "encoders": tables.encoders(cells),
        "album": album,
        "claims": claims(found),
        "correlations": tables.correlations(followed, by_concept(cells, measurable=True)),
        "regrets": tables.regrets(cells),
        "falsifiers": tables.falsifiers(cells, found),
        "cells": sections,
    }
    albums = [album, *(section.album for section in sections)]
    return Content("Synthesis study", "synthesis.md.j2", fields, albums, lines)


@dataclass(frozen=True, eq=False)
class Section:
    """One cell's part of the report, as the template reads it.

    Attributes:
        cell: its figures.
        claims: of the whole study.
        at: its place among the study's cells, from 0.
        shown: examples of everything.
    """

    cell: Cell
    claims: Sequence[Claim]
    at: int
    shown: int

    @property
    def title(self) -> str:
        """Model and concept."""
        return self.cell.title

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
        made = (tables.detectors, tables.comparisons, tables.cell_correlations, tables.selections,
                tables.configurations, card)  # fmt: skip
        return {"findings": findings(self.claims, self.at)} | {make.__name__: make(self.cell) for make in made}

    @cached_property
    def album(self) -> Album:
        """All figures."""
        prefix = f"{self.at + 1}-{self.cell.result.model}-{self.cell.result.concept}-"
        return Album(list(figures.of_cell(self.cell)), prefix)

    @property
    def examples(self) -> list[tuple[str, Markdown]]:
        """User message and the table of answers."""
        return tables.examples(self.cell, self.shown)

    @property
    def violations(self) -> Markdown:
        """Real ones."""
        return tables.violations(self.cell, self.shown)


def _headline(cells: Sequence[Cell], found: Sequence[Claim]) -> str:
    """The result in two sentences."""
    known = [cell for cell in cells if cell.unmeasurable is None]
    if not known:
        return (
            f"Nothing can be told here: in none of {len(cells)} cells (one model, one concept) do detectors trained on "
            "originals do well enough and badly enough for data sets to differ."
        )
    better, worse = _sure(known, [PROMPTED] * len(known))
    told = (
        f"In {better} of {len(known)} measurable cells (one model, one concept) the best steered texts train surely "
        f"better detectors than the best prompted ones, in {worse} surely worse ones"
    )
    if known[0].kept:
        more, less = _sure(known, [cell.base for cell in known])
        told += f"; added to {known[0].kept} originals they surely help in {more}, surely harm in {less}"
    regret = [item.regret for cell in known for item in cell.selections if item.rule == "hm3"]
    if regret:
        given = number(float(np.mean(regret)), DIGITS)
        told += f". Picking by HM3, without any detector, gives away {given} AUROC against the best steered on average"
    return f"{told}; {tallied(found)}."


def _sure(cells: Sequence[Cell], others: Sequence[str]) -> tuple[int, int]:
    """Cells whose best steered texts are surely better, and surely worse, than another role's."""
    found = [cell.difference(STEERED, other) for cell, other in zip(cells, others, strict=True)]
    return sum(each.low > 0 for each in found), sum(each.high < 0 for each in found)


def _facts(config: SynthesisConfig, cells: Sequence[Cell]) -> Markdown:
    """What was studied, as a table."""
    about = [cell.result.about for cell in cells]
    models = {item["model"]: item["info"] for item in about}
    poles = {item["concept"]: item["poles"] for item in about}
    arms = [row for cell in cells for row in cell.result.arms]
    written = sum(row["texts"] for row in arms if row["source"] != "original")
    counts = ", ".join(f"{len(cells[0].arms(source))} {source}" for source in ("steered", "prompted", "unsteered"))
    encoders = sum(len({(row["arm"], row["seed"]) for row in item.get("encoders") or ()}) for item in about)
    rows = [
        ("models", "; ".join(f"{name} ({info['architecture']}, {info['n_layers']} layers, width {info['d_model']})"
                             for name, info in models.items())),
        ("engine", engines(about)),
        ("concepts", "; ".join(f"{name} (0: {pole['aligned']}, 1: {pole['violating']})"
                               for name, pole in poles.items())),
        ("judge", ", ".join(dict.fromkeys(str(item["judge"] or "none") for item in about))),
        ("sets of violating texts", f"{counts} per cell; {config.texts} texts each, {written} in all"),
        ("real examples", f"{'the bundled world' if config.data is None else config.data.train}; "
                          f"per cell (violating + benign): {_real(about[0]['real'])}"),
        ("a detector's training", f"{config.texts} violating texts"
                                  f"{f' and {config.kept} originals' if config.kept else ''}, {config.benign} benign "
                                  "originals, the same for all"),
        ("detectors", f"linear on {config.detector.embedder} embeddings of prompt and response, C = "
                      f"{config.detector.c:g}, {config.detector.seeds} seeds: "
                      f"{len(arms) * config.detector.seeds} trained; "
                      f"{f'{encoders} fine-tuned encoders ({_base(config)})' if encoders else 'no encoders'}"),
        ("diversity", f"{config.embedder} embeddings, first {config.words} words of a text"),
        ("sampling", f"at most {config.max_new_tokens} tokens, temperature {config.temperature:g} (prompted: its own)"),
        ("leaks", "none: the study refuses real training, validation and test examples that share a prompt, a template "
                  "or a near-duplicate, and texts written for a prompt of the other two"),
        ("versions", "; ".join(dict.fromkeys(
            ", ".join(f"{name} {value}" for name, value in item["versions"].items()) for item in about))),
    ]  # fmt: skip
    return table(("setting", "value"), rows, left=2)


def _real(real: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{part} {counts['violating']} + {counts['benign']}" for part, counts in real.items())


def _base(config: SynthesisConfig) -> str:
    return config.encoders.base if config.encoders else ""
