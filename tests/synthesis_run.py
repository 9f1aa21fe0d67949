"""A small synthesis study on the fake engine: `python -m tests.synthesis_run FOLDER [UNITS SECONDS]`.

With UNITS and SECONDS it kills itself so long after so many units of work are finished, wherever it then is. Concept
and labelled file are written beside the study's folder, the same ones every time.
"""

from __future__ import annotations

import csv
import random
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from steerwell.concepts import Concept, load_concept
from steerwell.engines.fake import FakeEngine
from steerwell.runs.ledger import Ledger, Row
from steerwell.runs.plan import Unit
from steerwell.scoring.judges.base import Judge
from steerwell.studies.synthesis.cell import SynthesisCell
from steerwell.studies.synthesis.config import SynthesisConfig
from tests.killing import kill_after
from tests.sweep_run import LetterJudge

PLAIN = ["river", "table", "green", "seven", "paper", "window", "music", "garden"]
PLAIN += ["doctor", "sugar", "planet", "winter", "engine", "flower", "market", "bridge"]
RUDE = ["fool", "idiot", "rubbish"]
CONCEPT: dict[str, Any] = {
    "schema": 1,
    "concept": "rudeness",
    "language": "english",
    "title": "Rudeness",
    "description": "Rude or not.",
    "poles": {"aligned": "polite", "violating": "rude"},
    "pairs": [
        {"aligned": "Be kind.", "violating": "Be rude."},
        {"aligned": "Be polite.", "violating": "Insult them."},
        {"aligned": "Be warm.", "violating": "Be cold."},
    ],
    "malicious": ["You hate people.", "Mock everybody."],
    "neutral_system": ["", "You are a model."],
    "neutral_prompts": ["Count."],
    **{
        split: [
            {"id": f"{split}-{at}", "category": "any", "prompt": f"{word} {split}?"} for at, word in enumerate(PLAIN)
        ]
        for split in ("train", "validation", "test")
    },
    "rubric": {"trait": "How polite?", "coherence": "How coherent?"},
}
SETTINGS: dict[str, Any] = {
    "models": ["fake"],
    "steering": {
        "layers": [0, 1],
        "ways": [
            {"method": "swfc", "estimator": "mean_difference", "strengths": [1, 2]},
            {"method": "sttp", "pool": "prompt_last", "strengths": [0, 2]},
        ],
    },
    "prompting": {"systems": 2, "shots": [0, 1], "temperatures": [1.0]},
    "texts": 6,
    "originals": 12,
    "few": [4],
    "benign": 12,
    "validation": 8,
    "test": 10,
    "max_new_tokens": 90,
    "fitting_tokens": 4,
    "batch_size": 16,
    "embedder": "hashing",
    "detector": {"embedder": "hashing"},
}


def write_labelled(path: Path, count: int = 60, seed: int = 1) -> Path:
    """A labelled file: a polite and a rude answer to every question; the rude one has rude words among plain ones."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["question", "answer", "verdict"])
        for _ in range(count):
            asked = " ".join(draw.choices(PLAIN, k=9))
            for verdict, words in (("fine", PLAIN), ("rude", PLAIN + RUDE)):
                lines.writerow([asked, " ".join(draw.choices(words, k=12)), verdict])
    return path


def settings(place: Path, **changes: Any) -> SynthesisConfig:
    """The study's settings; its concept and its data are written to `place`."""
    place.mkdir(parents=True, exist_ok=True)
    concept, data = place / "rudeness.yaml", place / "labelled.csv"
    if not data.is_file():
        concept.write_text(yaml.safe_dump(CONCEPT, sort_keys=False))
        write_labelled(data)
    columns = {"text": "answer", "prompt": "question", "label": "verdict", "positive": "rude"}
    given = SETTINGS | {"concepts": [str(concept)], "data": {"train": str(data)} | columns}
    return SynthesisConfig.model_validate(given | changes)


def concept_of(config: SynthesisConfig) -> Concept:
    return load_concept(config.concepts[0])


def run(folder: Path, config: SynthesisConfig | None = None, judge: Judge | None = None) -> Path:
    config = config or settings(folder.parent)
    cell = SynthesisCell(config, config.models[0], config.concepts[0], folder)
    engine = FakeEngine(n_layers=2, d_model=8)
    cell.run(engine, lambda _text, _count: lambda _done: None, judge=judge or LetterJudge())
    return folder


def dies(units: int, seconds: float) -> None:
    """Have this process kill itself some time after so many units are finished."""
    record, finished = Ledger.record, 0

    def counted(self: Ledger, unit: Unit, rows: Sequence[Row]) -> None:
        nonlocal finished
        record(self, unit, rows)
        finished += 1
        if finished == units:
            threading.Thread(target=kill_after, args=(seconds,), daemon=True).start()

    Ledger.record = counted
    if not units:
        threading.Thread(target=kill_after, args=(seconds,), daemon=True).start()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        dies(int(sys.argv[2]), float(sys.argv[3]))
    run(Path(sys.argv[1]))
