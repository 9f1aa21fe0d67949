"""A study's cells, one after another or side by side in processes, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import yaml

from steerwell.core.artifacts import write_atomic
from steerwell.core.errors import ArgumentError
from steerwell.core.settings import load_settings
from steerwell.engines.base import Engine
from steerwell.studies.alignment import CELL, Capability, Cell
from steerwell.studies.config import AlignmentConfig, Model
from steerwell.studies.sweep import Say

STUDY = "study.yaml"
SHARED = ("models", "concepts", "examples")  # may change between runs in one folder: cells are added, none is lost


@dataclass(frozen=True)
class Worker:
    """How a process does a cell.

    Attributes:
        say: as in `Cell.run`.
        capability: as in `Cell.run`.
        threads: of the processor; None: as many as there are.
    """

    say: Say
    capability: Capability | None = None
    threads: int | None = None

    def __call__(self, cell: Cell) -> str:
        """Load the model, run the cell, and return its title."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        load = partial(load_model, batch_size=cell.config.batch_size)
        cell.run(load(cell.model), load, self.say, self.capability)
        return cell.title


def load_model(model: Model, batch_size: int) -> Engine:
    """The engine of one model."""
    import transformers

    from steerwell.engines.hf import HFEngine

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    fields = model.model_dump(include={"dtype", "device_map", "gguf_file", "trust_remote_code", "chat_options"})
    return HFEngine.load(model.name, **fields, batch_size=batch_size)


def cells_of(config: AlignmentConfig, folder: Path) -> list[Cell]:
    """Every model with every concept, in folders `MODEL/CONCEPT`."""
    return [
        Cell(config, model, concept, folder / model.title / Path(concept).stem)
        for model in config.models
        for concept in config.concepts
    ]


def run_study(config: AlignmentConfig, folder: Path, worker: Worker, workers: int = 1) -> None:
    """Do what is not done yet of every cell.

    Args:
        config: the study.
        folder: where everything goes.
        worker: how to do a cell.
        workers: cells at work at a time, each in a process of its own.

    Raises:
        ArgumentError: the folder holds a study with other settings.
    """
    _claim(config, folder)
    cells = cells_of(config, folder)
    if workers == 1:
        for cell in cells:
            worker(cell)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(worker, cells):
            pass


def finished_cells(folder: Path) -> tuple[AlignmentConfig, Sequence[Cell]]:
    """A folder's study and its finished cells.

    Raises:
        ArgumentError: no study is there.
    """
    if not (folder / STUDY).is_file():
        raise ArgumentError(f"{folder}: holds no {STUDY}; give a folder that 'steerwell study' has written")
    config = load_settings(AlignmentConfig, folder / STUDY)
    return config, [cell for cell in cells_of(config, folder) if (cell.folder / CELL).is_file()]


def _claim(config: AlignmentConfig, folder: Path) -> None:
    """Write down the study; another one's folder is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STUDY
    if path.is_file():
        known = load_settings(AlignmentConfig, path)
        changed = [
            name
            for name in AlignmentConfig.model_fields
            if name not in SHARED and getattr(known, name) != getattr(config, name)
        ]
        if changed:
            raise ArgumentError(
                f"{folder} holds a study with another {', '.join(changed)}; resume with what it was started with, or "
                "give another folder"
            )
    write_atomic(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
