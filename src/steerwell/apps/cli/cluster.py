"""What the subcommands share that can run on a Ray cluster: its options, and an engine that is here or there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from steerwell.core.errors import ArgumentError

if TYPE_CHECKING:
    from steerwell.engines.base import Engine
    from steerwell.engines.ray import Cluster

RAY = "With --executor ray"
Executor = Annotated[
    Literal["local", "ray"], typer.Option(help="Where models run: in this process, or in the actors of a Ray cluster.")
]
Address = Annotated[
    str | None,
    typer.Option(help="Of a running cluster, or 'auto'; default: one on this machine.", rich_help_panel=RAY),
]
Count = Annotated[int | None, typer.Option(help="Copies of the model; default: as many as fit.", rich_help_panel=RAY)]
Cpus = Annotated[float, typer.Option(help="CPU cores, and threads, of each.", rich_help_panel=RAY)]
Gpus = Annotated[float, typer.Option(help="GPUs of each; 0.5 lets two share one.", rich_help_panel=RAY)]


def cluster_of(executor: str, address: str | None, actors: int | None, cpus: float, gpus: float) -> Cluster | None:
    """What is asked of Ray, by the options of a command; None: nothing, everything is done here."""
    from steerwell.engines.ray import Cluster

    asked = Cluster(address, actors, cpus, gpus)
    if executor == "ray":
        return asked
    if asked != Cluster():
        raise ArgumentError(
            "--address, --actors, --cpus-per-actor, --gpus-per-actor: are about a Ray cluster; add --executor ray"
        )
    return None


@contextmanager
def engine_on(cluster: Cluster | None, load: Callable[[], Engine], tensor_parallel: int) -> Iterator[Engine]:
    """An engine, loaded here or by every actor of a cluster, and closed afterwards."""
    if cluster is None:
        with closing(load()) as engine:
            yield engine
        return
    from steerwell.engines.ray import Actors

    cluster.require_gpus(tensor_parallel, "the model")
    with Actors(cluster) as actors:
        yield actors.engine("the model", load)
