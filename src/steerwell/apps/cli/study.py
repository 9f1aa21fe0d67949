"""`steerwell study`: a whole study from one YAML file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerwell.apps.cli.cluster import Address, Count, Cpus, Executor, Gpus, cluster_of
from steerwell.apps.cli.common import err, out, tasks

if TYPE_CHECKING:
    from steerwell.core.records import Edit
    from steerwell.engines.base import Engine
    from steerwell.engines.ray import Cluster

app = typer.Typer(no_args_is_help=True, help="Run a study from one YAML file.")


Config = Annotated[
    str | None, typer.Argument(help="A .yaml file, or a preset's name; default: everything on the bundled models.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder; run again on it to resume.")]
Quick = Annotated[bool, typer.Option("--quick", help="The preset 'quick': a look in a few minutes.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Cells (one model, one concept) at work at a time, each in its own process.")
]


@app.command("alignment")
def alignment(
    output: Output,
    config: Config = None,
    quick: Quick = False,
    workers: Workers = 1,
    executor: Executor = "local",
    address: Address = None,
    actors: Count = None,
    cpus_per_actor: Cpus = 1,
    gpus_per_actor: Gpus = 0,
) -> None:
    """Steering as a runtime defence, measured whole (arXiv 2604.08169): choose on validation, report on test.

    An interrupted study continues where it was when the same command is run again.
    """
    cluster = cluster_of(executor, address, actors, cpus_per_actor, gpus_per_actor)
    _run("alignment", output, config, quick, workers, cluster)


@app.command("synthesis")
def synthesis(
    output: Output,
    config: Config = None,
    quick: Quick = False,
    workers: Workers = 1,
    executor: Executor = "local",
    address: Address = None,
    actors: Count = None,
    cpus_per_actor: Cpus = 1,
    gpus_per_actor: Gpus = 0,
) -> None:
    """Steering as a generator of training data for detectors of violations (in the design of arXiv 2605.28664).

    An interrupted study continues where it was when the same command is run again.
    """
    cluster = cluster_of(executor, address, actors, cpus_per_actor, gpus_per_actor)
    _run("synthesis", output, config, quick, workers, cluster)


def _run(kind: str, output: Path, config: str | None, quick: bool, workers: int, cluster: Cluster | None) -> None:
    import os
    from contextlib import nullcontext

    from steerwell.core.errors import ArgumentError
    from steerwell.studies.study import Worker, cells_of, load_model, load_study, on_ray, run_study

    if cluster is not None and workers > 1:
        raise ArgumentError(f"--workers: got {workers} with --executor ray; its parallel work is set by --actors")
    settings = load_study(kind, config, quick=quick)
    began, threads = time.monotonic(), None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)
    cells = cells_of(settings, output)
    out.print(f"{len(cells)} cells: {'; '.join(cell.title for cell in cells)}", markup=False, soft_wrap=True)
    if workers == 1:
        with nullcontext(load_model) if cluster is None else on_ray(cluster, settings.models) as load, tasks() as say:
            run_study(settings, output, Worker(say, lm_eval_accuracies, load=load), workers)
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
    from steerwell.engines.ray import RayEngine

    try:
        from steerwell.apps.harnesses.lm_eval import accuracies
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "lm_eval", "lm-eval") from error
    if isinstance(engine, RayEngine):
        return engine.run(accuracies, edit, tasks)
    assert isinstance(engine, HFEngine)  # noqa: S101 - AlignmentConfig refuses others
    return accuracies(engine, edit, tasks)
