"""Put a study's report together and write it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steerwell.core.artifacts import write_atomic
from steerwell.core.errors import ArgumentError
from steerwell.studies.report import alignment, synthesis
from steerwell.studies.report.content import PICTURES, Line
from steerwell.studies.report.page import fill, page
from steerwell.studies.report.text import code_block
from steerwell.studies.study import STUDY, cells_of, finished_cells
from steerwell.studies.synthesis.config import SynthesisConfig


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
    cells: tuple[Line, ...]
    unfinished: tuple[str, ...]


def write_report(folder: Path, output: Path | None = None) -> Report:
    """Write `report.html`, `report.md` and `figures/` of a study, all of whose cells need not be finished.

    Args:
        folder: the study's, of either kind.
        output: where to; default: into the study's folder.

    Raises:
        ArgumentError: no study is there, or none of its cells is finished.
    """
    config, cells = finished_cells(folder)
    if not cells:
        raise ArgumentError(f"{folder}: no cell of this study is finished; run 'steerwell study' on it first")
    done = [cell.folder for cell in cells]
    unfinished = tuple(cell.title for cell in cells_of(config, folder) if cell.folder not in done)
    if isinstance(config, SynthesisConfig):
        content = synthesis.content(config, done)
    else:
        content = alignment.content(config, done)
    images = {address: data for album in content.albums for address, data in album.images.items()}
    name = folder.resolve().name
    text = fill(
        content.template,
        **content.fields,
        name=name,
        settings=code_block((folder / STUDY).read_text(encoding="utf-8"), "yaml"),
        command=code_block(f"steerwell study {config.study} {STUDY} -o {name}\nsteerwell report {name}", "sh"),
        unfinished=unfinished,
    )
    place = folder if output is None else output
    (place / PICTURES).mkdir(parents=True, exist_ok=True)
    for address, data in images.items():
        (place / address).write_bytes(data)
    write_atomic(place / "report.md", text)
    write_atomic(place / "report.html", page(text, f"{content.title}: {name}", images))
    return Report(place / "report.html", place / "report.md", tuple(content.lines), unfinished)
