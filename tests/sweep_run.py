"""A small sweep on the fake engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steerwell.concepts import Concept, load_concept
from steerwell.core.records import POOLS, Sampling, Verdict
from steerwell.engines.base import Engine
from steerwell.engines.fake import FakeEngine
from steerwell.studies.defence import grid
from steerwell.studies.sweep import Search, Sweep, SweepResult, Threat

SHORT = Sampling(temperature=0.6, max_new_tokens=4)
WAYS = grid([1, 2], {"swfc": (1.0, 2.0), "sttp": (0.0, 2.0)}, estimators=["mean_difference"], pools=POOLS)
CONCEPT = load_concept("hostility", "testbed")  # short texts, which the fake engine reads byte by byte


class LetterJudge:
    """Trait: share of even bytes; coherence: 100 for every answer."""

    name = "letters"

    def score_many(self, concept: Concept, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        letters = [np.frombuffer(response.encode() or b"\x01", np.uint8) for _, response in items]
        return [Verdict(100 * float(np.mean(each % 2 == 0)), 100.0) for each in letters]


def run(folder: Path, search: Search = "grid", threat: Threat = "system", engine: Engine | None = None) -> SweepResult:
    sweep = Sweep(
        CONCEPT, tuple(WAYS), validation=3, test=4, threat=threat, search=search, sampling=SHORT, fitting=SHORT
    )
    engine = engine or FakeEngine()
    return sweep.run(engine, LetterJudge(), folder, rows_per_unit=2, say=lambda _text, _count: lambda _done: None)
