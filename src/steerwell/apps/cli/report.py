"""`steerwell report`: what a study found, as a page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from steerwell.apps.cli.common import Json, out, print_json
from steerwell.core.errors import MissingDependencyError


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What 'steerwell study' has written, finished or not.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to; default: into DIR.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a study found: report.html, one page that needs nothing else, and the same as report.md.

    Cells (one model, one concept) that are not finished are left out and named.
    """
    try:
        from steerwell.studies.report import write_report

        written = write_report(folder, output)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "jinja2", "studies") from error
    if as_json:
        print_json(asdict(written) | {"page": str(written.page), "text": str(written.text)})
        return
    for line in written.cells:
        out.print(str(line), markup=False, soft_wrap=True)
    for title in written.unfinished:
        out.print(f"{title}: not finished", markup=False, soft_wrap=True)
    out.print(f"{written.page}\n{written.text}", markup=False, soft_wrap=True)
