"""Studies of either kind: their cells, one after another or side by side in processes, each in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import yaml

from steerwell.core.artifacts import write_atomic
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.settings import load_settings, read_mapping
from steerwell.engines.base import Engine
from steerwell.engines.ray import Actors, Cluster
from steerwell.studies.alignment import CELL, Capability, Cell
from steerwell.studies.config import AlignmentConfig, Model
from steerwell.studies.fitting import Say
from steerwell.studies.synthesis.cell import SynthesisCell
from steerwell.studies.synthesis.config import SynthesisConfig

STUDY = "study.yaml"
PRESETS = Path(__file__).parent / "presets"
KINDS: Mapping[str, type[AlignmentConfig] | type[SynthesisConfig]] = {
    "alignment": AlignmentConfig,
    "synthesis": SynthesisConfig,
}
AnyConfig = AlignmentConfig | SynthesisConfig
AnyCell = Cell | SynthesisCell
Load = Callable[[Model, int], Engine]
DEFAULT_PRESET = "pilot"
SHARED = ("models", "concepts", "examples")  # may grow between runs in one folder: cells are added, none is lost


def load_model(model: Model, batch_size: int) -> Engine:
    """The engine of one model, in this process or, vLLM's, in processes of its own; `close` ends it."""
    if model.engine == "vllm":
        from steerwell.engines.vllm import VLLMEngine

        shared = model.model_dump(include={"dtype", "trust_remote_code", "chat_options", "tensor_parallel"})
        return VLLMEngine.load(model.name, **shared, batch_size=batch_size, options=model.engine_args)
    import transformers

    from steerwell.engines.hf import HFEngine

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    fields = model.model_dump(include={"dtype", "device_map", "gguf_file", "trust_remote_code", "chat_options"})
    return HFEngine.load(model.name, **fields, batch_size=batch_size)


@contextmanager
def on_ray(cluster: Cluster, models: Iterable[Model]) -> Iterator[Load]:
    """A `Load` for `Worker`, whose engines are those of the actors of one cluster: units are answered side by side.

    Raises:
        ArgumentError: one of the models wants more GPUs than an actor has.
    """
    for model in models:
        cluster.require_gpus(model.tensor_parallel, repr(model.title))
    with Actors(cluster) as actors:
        yield lambda model, size: actors.engine(f"{size} {model.model_dump_json()}", partial(load_model, model, size))


@dataclass(frozen=True)
class Worker:
    """How a process does a cell.

    Attributes:
        say: as in `Cell.run`.
        capability: as in `Cell.run`, of an alignment study.
        threads: of the processor; None: as many as there are.
        load: gives the engine of a model, of so many rows per forward pass.
    """

    say: Say
    capability: Capability | None = None
    threads: int | None = None
    load: Load = load_model

    def __call__(self, cell: AnyCell) -> str:
        """Load the model, run the cell, close the model, and return the cell's title."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)

        def load(model: Model) -> Engine:
            return self.load(model, cell.config.batch_size)

        with closing(load(cell.model)) as engine:
            if isinstance(cell, SynthesisCell):
                cell.run(engine, self.say)
            else:
                cell.run(engine, load, self.say, self.capability)
        return cell.title


def load_study(kind: str, source: str | Path | None = None, *, quick: bool = False) -> AnyConfig:
    """Read a study's YAML file, or a preset by its name; by default the one that is called `pilot`.

    Args:
        kind: `alignment` or `synthesis`.
        source: a file that ends in .yaml, or the name of a preset.
        quick: the preset `quick`.

    Raises:
        UnknownNameError: no such preset.
        ArgumentError: both a source and `quick`, or see `steerwell.core.settings.load_settings`.
    """
    if quick and source is not None:
        raise ArgumentError(f"--quick: is a preset, and so is {str(source)!r}; give one of them")
    name = "quick" if quick else source or DEFAULT_PRESET
    if str(name).endswith((".yaml", ".yml")):
        return load_settings(KINDS[kind], Path(name))
    path = PRESETS / kind / f"{name}.yaml"
    if not path.is_file():
        raise UnknownNameError("preset", str(name), preset_names(kind), "A file of your own ends in .yaml.")
    return load_settings(KINDS[kind], path)


def preset_names(kind: str) -> list[str]:
    """The studies of one kind that come with the package."""
    return sorted(path.stem for path in (PRESETS / kind).glob("*.yaml"))


def cells_of(config: AnyConfig, folder: Path) -> list[AnyCell]:
    """Every model with every concept, in folders `MODEL/CONCEPT`."""
    places = [
        (model, concept, folder / model.title / Path(concept).stem)
        for model in config.models
        for concept in config.concepts
    ]
    if isinstance(config, SynthesisConfig):
        return [SynthesisCell(config, *place) for place in places]
    return [Cell(config, *place) for place in places]


def run_study(config: AnyConfig, folder: Path, worker: Worker, workers: int = 1) -> None:
    """Do what is not done yet of every cell.

    Args:
        config: the study.
        folder: where everything goes.
        worker: how to do a cell.
        workers: cells at work at a time, each in a process of its own.

    Raises:
        ArgumentError: the folder holds a study with other settings, or several workers would share vLLM's devices.
    """
    full = [model.title for model in config.models if model.engine == "vllm"]
    if workers > 1 and full:
        raise ArgumentError(
            f"workers: got {workers}, and {full[0]!r} has engine: vllm, which takes every device for itself; use 1, or "
            "actors with GPUs of their own (--executor ray --gpus-per-actor)"
        )
    _claim(config, folder)
    cells = cells_of(config, folder)
    if workers == 1:
        for cell in cells:
            worker(cell)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent) as pool:
        for _ in pool.map(worker, cells):
            pass


def _end_with_parent() -> None:
    """Stop this worker at once when the process that started it is gone: a resumed study would meet it at its cell."""

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


def finished_cells(folder: Path) -> tuple[AnyConfig, Sequence[AnyCell]]:
    """A folder's study and its finished cells.

    Raises:
        ArgumentError: no study is there.
    """
    if not (folder / STUDY).is_file():
        raise ArgumentError(f"{folder}: holds no {STUDY}; give a folder that 'steerwell study' has written")
    config = _known(folder / STUDY)
    return config, [cell for cell in cells_of(config, folder) if (cell.folder / CELL).is_file()]


def _known(path: Path) -> AnyConfig:
    """The study that a folder holds."""
    kind = str(read_mapping(path).get("study", "alignment"))
    if kind not in KINDS:
        raise UnknownNameError("study", kind, KINDS)
    return load_settings(KINDS[kind], path)


def _claim(config: AnyConfig, folder: Path) -> None:
    """Write down the study; another one's folder is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STUDY
    if path.is_file():
        known, fields = _known(path), type(config).model_fields
        changed = (
            ["study"]
            if type(known) is not type(config)
            else [name for name in fields if name not in SHARED and getattr(known, name) != getattr(config, name)]
            + _changed_models(known, config)
        )
        if changed:
            raise ArgumentError(
                f"{folder} holds a study with another {', '.join(changed)}; resume with what it was started with, or "
                "give another folder"
            )
    write_atomic(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _changed_models(known: AnyConfig, config: AnyConfig) -> list[str]:
    """What differs in models that both studies have."""
    before = {model.title: model.identity for model in known.models}
    return [
        f"{name} of model {model.title!r}"
        for model in config.models
        for name, value in model.identity.items()
        if before.get(model.title, model.identity)[name] != value
    ]
