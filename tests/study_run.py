"""A small alignment study on the fake engine."""

from __future__ import annotations

from pathlib import Path

from steerwell.engines.fake import FakeEngine
from steerwell.studies.alignment import Cell
from steerwell.studies.config import AlignmentConfig
from tests.sweep_run import LetterJudge

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
    engine = FakeEngine(n_layers=2, d_model=8, language="testbed")  # whose concepts are short
    cell.run(engine, lambda _place: engine, lambda _text, _count: lambda _done: None, judge=LetterJudge())
    return folder
