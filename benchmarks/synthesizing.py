"""What mixed batches gain when a study's texts are written: `python -m benchmarks.synthesizing`.

The same texts (16 ways to steer the bundled model, 60 texts each) are written with all ways in shared batches, as a
study does, and one way at a time at several batch sizes. Rounds are interleaved; the ratio is of medians of CPU time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from steerwell.concepts import load_concept
from steerwell.core.records import Sampling
from steerwell.engines.hf import HFEngine
from steerwell.runs.ledger import Ledger
from steerwell.scoring.judges.exact import ExactJudge
from steerwell.steering.interventions import build
from steerwell.studies.fitting import fit
from steerwell.studies.synthesis.config import Steering
from steerwell.synthesis.writers import Writer, steered, write

TEXTS, ROUNDS, MIXED = 60, 3, 192
ALONE = (60, 30, 15)  # texts of one way in a batch
DRAWN = Sampling(1.0, max_new_tokens=96)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    engine = HFEngine.load("pilot", batch_size=MIXED)
    concept = load_concept("hostility", "testbed")
    direction = fit(engine, concept)
    ways = Steering(layers=(1,)).configurations(engine.info.n_layers)
    asked = [scenario.prompt for scenario in concept.train]
    writers = [
        steered(concept, asked, way.describe(),
                build(direction, way.method, way.layer, way.strength, toward="violating"), DRAWN)
        for way in ways
    ]  # fmt: skip
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        times.setdefault(f"mixed, {MIXED} rows", []).append(_cost(engine, concept, [writers], MIXED))
        for size in ALONE:
            alone = [[writer] for writer in writers]
            times.setdefault(f"one way at a time, {size} rows", []).append(_cost(engine, concept, alone, size))
    medians = {name: statistics.median(found) for name, found in times.items()}
    first, *others = medians.items()
    for name, seconds in medians.items():
        sys.stdout.write(f"{name}: {seconds:.1f} s for {len(writers) * TEXTS} texts, {seconds / first[1]:.2f}\n")
    sys.stdout.write(f"ratio to one way at a time at its best: {min(value for _, value in others) / first[1]:.2f}\n")


def _cost(engine: HFEngine, concept, groups: list[list[Writer]], size: int) -> float:
    """Processor seconds to write all texts, group by group."""
    began = time.process_time()
    for group in groups:
        with tempfile.TemporaryDirectory() as place, Ledger(Path(place) / "ledger.sqlite", {"what": "speed"}) as ledger:
            write(group, TEXTS, engine=engine, concept=concept, judge=ExactJudge(), ledger=ledger, size=size)
    return time.process_time() - began


if __name__ == "__main__":
    main()
