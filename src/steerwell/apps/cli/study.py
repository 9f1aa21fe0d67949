"""`steerwell study`: a whole study from one YAML file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerwell.apps.cli.common import err, out, tasks

if TYPE_CHECKING:
    from steerwell.core.records import Edit
    from steerwell.engines.base import Engine

app = typer.Typer(no_args_is_help=True, help="Run a study from one YAML file.")


@app.command("alignment")
def alignment(
    config: Annotated[
        str | None, typer.Argument(help="A .yaml file, or a preset's name; default: everything on the bundled model.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; run again on it to resume.")] = ...,  # type: ignore[assignment]
    quick: Annotated[bool, typer.Option("--quick", help="The preset 'quick': a look in under five minutes.")] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Cells (one model, one concept) at work at a time, each in its own process.")
    ] = 1,
) -> None:
    """Steering as a runtime defence, measured whole (arXiv 2604.08169): choose on validation, report on test.

    An interrupted study continues where it was when the same command is run again.
    """
    import os

    from steerwell.core.errors import ArgumentError
    from steerwell.studies.config import DEFAULT_PRESET, load_alignment
    from steerwell.studies.study import Worker, cells_of, run_study

    if quick and config is not None:
        raise ArgumentError(f"--quick: is a preset, and so is {config!r}; give one of them")
    settings = load_alignment("quick" if quick else config or DEFAULT_PRESET)
    began, threads = time.monotonic(), None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)
    cells = cells_of(settings, output)
    out.print(f"{len(cells)} cells: {'; '.join(cell.title for cell in cells)}", markup=False, soft_wrap=True)
    if workers == 1:
        with tasks() as say:
            run_study(settings, output, Worker(say, lm_eval_accuracies), workers)
    else:
        run_study(settings, output, Worker(say_line, lm_eval_accuracies, threads), workers)
    minutes = (time.monotonic() - began) / 60
    out.print(f"done in {minutes:.1f} minutes; next: steerwell report {output}", markup=False, soft_wrap=True)


def say_line(text: str, count: int) -> Callable[[int], None]:
    """Progress of several processes: a line when something begins."""
    err.print(f"{time.strftime('%H:%M:%S')} {text} ({count})", markup=False, soft_wrap=True)
    return lambda _done: None


def lm_eval_accuracies(engine: Engine, edit: Edit | None, tasks: Sequence[str]) -> Mapping[str, float]:
    """Accuracies (%) of a model under an edit on lm_eval's tasks."""
    from steerwell.core.errors import MissingDependencyError
    from steerwell.engines.hf import HFEngine

    try:
        from steerwell.apps.harnesses.lm_eval import accuracies
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "lm_eval", "lm-eval") from error
    assert isinstance(engine, HFEngine)  # noqa: S101 - this command loads no other
    return accuracies(engine, edit, tasks)
