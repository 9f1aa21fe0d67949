"""Put a study's report together and write it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from steerwell.core.artifacts import write_atomic
from steerwell.core.errors import ArgumentError
from steerwell.studies.claims import Claim, claims_of
from steerwell.studies.config import AlignmentConfig
from steerwell.studies.report import figures, tables
from steerwell.studies.report.failures import REPAIRED, failures
from steerwell.studies.report.figures import Picture
from steerwell.studies.report.measures import Overview, overview
from steerwell.studies.report.page import fill, page
from steerwell.studies.report.text import Markdown, code_block, escaped, table
from steerwell.studies.results import CellResult
from steerwell.studies.study import STUDY, cells_of, finished_cells

PICTURES = "figures"


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        text: the Markdown file; its figures lie beside it in `figures/`.
        cells: every finished cell in a line.
        unfinished: titles of the other cells.
    """

    page: Path
    text: Path
    cells: tuple[Overview, ...]
    unfinished: tuple[str, ...]


def write_report(folder: Path, output: Path | None = None) -> Report:
    """Write `report.html`, `report.md` and `figures/` of a study, all of whose cells need not be finished.

    Args:
        folder: the study's.
        output: where to; default: into the study's folder.

    Raises:
        ArgumentError: no study is there, or none of its cells is finished.
    """
    config, cells = finished_cells(folder)
    if not cells:
        raise ArgumentError(f"{folder}: no cell of this study is finished; run 'steerwell study' on it first")
    done = {cell.folder for cell in cells}
    unfinished = tuple(cell.title for cell in cells_of(config, folder) if cell.folder not in done)
    results = [CellResult.load(cell.folder) for cell in cells]
    claims = claims_of(results)
    sections = [Section(cell, claims, at) for at, cell in enumerate(results)]
    lines = tuple(overview(cell) for cell in results)
    first = figures.of_overview(lines)
    images = {_address(first.name): first.data}
    for section in sections:
        images |= {section.address(item): item.data for item in section.pictures}
    name = folder.resolve().name
    text = fill(
        "report.md.j2",
        name=name,
        headline=_headline(lines, claims),
        facts=_facts(config, results),
        settings=code_block((folder / STUDY).read_text(encoding="utf-8"), "yaml"),
        command=code_block(f"steerwell study alignment {STUDY} -o {name}\nsteerwell report {name}", "sh"),
        unfinished=unfinished,
        overviews=tables.overviews(lines),
        picture=_shown([(_address(first.name), first.alt)]),
        claims=tables.claims(claims),
        cells=sections,
    )
    place = folder if output is None else output
    (place / PICTURES).mkdir(parents=True, exist_ok=True)
    for address, data in images.items():
        (place / address).write_bytes(data)
    write_atomic(place / "report.md", text)
    write_atomic(place / "report.html", page(text, f"Alignment study: {name}", images))
    return Report(place / "report.html", place / "report.md", lines, unfinished)


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
        findings = tables.findings(self.claims, self.at)
        return {"findings": findings} | {make.__name__: make(self.cell) for make in made}

    @cached_property
    def pictures(self) -> list[Picture]:
        """All figures."""
        return list(figures.of_cell(self.cell))

    @property
    def examples(self) -> list[tuple[str, str, Markdown]]:
        """System prompt, user message and the table of answers."""
        return [(item["system"], item["prompt"], tables.example(item)) for item in self.cell.about["examples"]]

    def address(self, picture: Picture) -> str:
        """Where a figure lies, beside the text."""
        return _address(f"{self.at + 1}-{self.cell.model}-{self.cell.concept}-{picture.name}")

    def drawn(self, *names: str) -> Markdown:
        """The figures whose names begin so."""
        return _shown([(self.address(item), item.alt) for item in self.pictures if item.name.startswith(names)])


def _address(name: str) -> str:
    return f"{PICTURES}/{re.sub('[^A-Za-z0-9.-]+', '-', name)}"


def _shown(pictures: Sequence[tuple[str, str]]) -> Markdown:
    """Images beside each other."""
    listed = "\n".join(f"![{escaped(alt)}]({address})" for address, alt in pictures)
    return Markdown(f'<div class="figures">\n\n{listed}\n\n</div>' if listed else "")


def _headline(cells: Sequence[Overview], claims: Sequence[Claim]) -> str:
    """The result in a sentence."""
    closed = sum(cell.gap_closed.estimate >= 100 * REPAIRED for cell in cells)
    measured = [claim.tally for claim in claims if claim.tally[1]]
    whole = sum(holds == known for holds, known in measured)
    return (
        f"In {closed} of {len(cells)} cells (one model, one concept) steering closes at least half of the gap that the "
        f"attack opens; {whole} of {len(measured)} claims of the paper hold wherever they were measured."
    )


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
