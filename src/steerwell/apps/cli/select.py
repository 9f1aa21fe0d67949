"""`steerwell select`: which configurations of a synthesis study are worth using, without training a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from steerwell.apps.cli.common import Json, out, print_json
from steerwell.core.errors import ArgumentError


def select(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What 'steerwell study synthesis' has written.")],
    by: Annotated[
        Literal["hm3", "hm2", "success", "coherence", "diversity"], typer.Option(help="The measure that picks.")
    ] = "hm3",
    top: Annotated[int, typer.Option(min=1, help="Configurations per model and concept.")] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the policies; default: DIR/policies.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pick steered configurations by the harmonic mean of success, coherence and diversity, and write their policies.

    Nothing is trained, and test figures are not looked at. The study did train detectors, so the table also says what
    the picks turned out to be worth: their test AUROC, and how far it is from that of the best (regret).
    """
    from steerwell.studies.study import finished_cells
    from steerwell.studies.synthesis.cell import SynthesisCell
    from steerwell.studies.synthesis.results import SynthesisResult
    from steerwell.studies.synthesis.select import select as picks_of

    _, cells = finished_cells(folder)
    finished = [SynthesisResult.load(cell.folder) for cell in cells if isinstance(cell, SynthesisCell)]
    if not finished:
        raise ArgumentError(f"{folder}: holds no finished cell of a synthesis study; run 'steerwell study synthesis'")
    picks = picks_of(finished, by, top)
    places = [pick.write(output or folder / "policies") for pick in picks]
    measures = ("success", "coherence", "diversity", "hm3")
    rows = [
        {
            "model": pick.cell.model,
            "concept": pick.cell.concept,
            "configuration": pick.cell.arms[pick.at]["arm"],
            **{name: pick.cell.value(pick.at, name) for name in measures},
            "auroc": pick.cell.auroc(pick.at),
            "regret": pick.regret,
            "measurable": pick.cell.measurable,
            "policy": str(place),
        }
        for pick, place in zip(picks, places, strict=True)
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("for", "steering", "S", "C", "D", "HM3", "AUROC", "regret", box=SIMPLE_HEAD, pad_edge=False)
    for pick, row in zip(picks, rows, strict=True):
        way, mark = pick.way, "" if row["measurable"] else " *"
        steering = f"{way.method} {way.strength:g}, layer {way.layer}\n[dim]{way.estimator}, {way.pool}[/]"
        numbers = (f"{row[name]:.3f}" for name in (*measures, "auroc", "regret"))
        table.add_row(f"{row['concept']}{mark}\n[dim]{row['model']}[/]", steering, *numbers)
    out.print(table)
    if not all(row["measurable"] for row in rows):
        out.print("*: not measurable here, detectors trained on originals do too badly or too well", markup=False)
    for place in places:
        out.print(str(place), markup=False, soft_wrap=True)
