"""A small alignment study on the fake engine, to be killed or not: `python -m tests.study_run FOLDER [SECONDS]`.

With SECONDS it kills itself that long after the study has begun, wherever it then is.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from steerwell.engines.fake import FakeEngine
from steerwell.studies.alignment import Cell
from steerwell.studies.config import AlignmentConfig
from tests.sweep_run import LetterJudge, kill_after

CONFIG = AlignmentConfig.model_validate(
    {
        "models": [{"name": "fake", "tuned": {"bad": "bad"}}],
        "concepts": ["hostility"],
        "max_new_tokens": 5,
        "fitting_tokens": 4,
        "batch_size": 16,
        "sweep": {
            "layers": [0, 1],
            "strengths": {"swfc": [1, 2], "sttp": [0, 2], "stmp": [1]},
            "positions": ["all", "response"],
            "pools": ["prompt_last"],
            "validation": 3,
        },
        "test": 4,
        "conversations": {"count": 2, "turns": 3, "max_new_tokens": 4},
        "examples": 2,
    }
)


def run(folder: Path, config: AlignmentConfig = CONFIG) -> Path:
    cell = Cell(config, config.models[0], "hostility", folder)
    engine = FakeEngine(n_layers=2, d_model=8)
    cell.run(engine, lambda _place: engine, lambda _text, _count: lambda _done: None, judge=LetterJudge())
    return folder


if __name__ == "__main__":
    if len(sys.argv) > 2:
        threading.Thread(target=kill_after, args=(float(sys.argv[2]),), daemon=True).start()
    run(Path(sys.argv[1]))
