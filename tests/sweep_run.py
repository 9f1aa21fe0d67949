"""A small sweep on the fake engine, run as a process that may be killed.

`python -m tests.sweep_run FOLDER SEARCH [SECONDS]`: with SECONDS it kills itself that long after the sweep has begun,
wherever it then is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from steerwell.concepts import Concept, load_concept
from steerwell.core.records import POOLS, Sampling, Verdict
from steerwell.engines.base import Engine
from steerwell.engines.fake import FakeEngine
from steerwell.studies.defence import grid
from steerwell.studies.sweep import Search, Sweep, SweepResult, Threat

SHORT = Sampling(temperature=0.6, max_new_tokens=4)
WAYS = grid([1, 2], {"swfc": (1.0, 2.0), "sttp": (0.0, 2.0)}, estimators=["mean_difference"], pools=POOLS)


class LetterJudge:
    """Trait: share of even bytes; coherence: 100 for every answer."""

    name = "letters"

    def score_many(self, concept: Concept, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        letters = [np.frombuffer(response.encode() or b"\x01", np.uint8) for _, response in items]
        return [Verdict(100 * float(np.mean(each % 2 == 0)), 100.0) for each in letters]


def run(folder: Path, search: Search = "grid", threat: Threat = "system", engine: Engine | None = None) -> SweepResult:
    concept = load_concept("hostility")
    sweep = Sweep(
        concept, tuple(WAYS), validation=3, test=4, threat=threat, search=search, sampling=SHORT, fitting=SHORT
    )
    engine = engine or FakeEngine()
    return sweep.run(engine, LetterJudge(), folder, rows_per_unit=2, say=lambda _text, _count: lambda _done: None)


def kill_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        threading.Thread(target=kill_after, args=(float(sys.argv[3]),), daemon=True).start()
    run(Path(sys.argv[1]), cast(Search, sys.argv[2]))
