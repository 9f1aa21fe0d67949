"""Directions of a study: fitted on one set of answers, kept in a folder, and read back instead of fitted again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steerwell.concepts import Concept
from steerwell.core.errors import UnknownNameError
from steerwell.core.records import Sampling
from steerwell.engines.fake import FakeEngine
from steerwell.studies.fitting import Reading, contrast, fitted, reading_name
from tests.synthesis_run import CONCEPT

KIND = Concept.model_validate(CONCEPT)
SHORT = Sampling(temperature=0.6, max_new_tokens=4)
READINGS: list[Reading] = [
    ("logistic", "prompt_last"), ("mean_difference", "response_mean"), ("logistic", "prompt_last"),
]  # fmt: skip


class Counting(FakeEngine):
    """Counts how often it was asked to write."""

    calls = 0

    def generate(self, *args, **kwargs):
        self.calls += 1
        return super().generate(*args, **kwargs)


def test_directions_are_those_of_one_contrast_and_are_fitted_once(tmp_path: Path) -> None:
    engine, said = Counting(2, 8), []

    def say(text: str, count: int):
        said.append((text, count))
        return lambda done: said.append(done)

    found = fitted(engine, KIND, READINGS, tmp_path, SHORT, say)
    assert list(found) == READINGS[:2]  # once each
    answers = contrast(FakeEngine(2, 8), KIND, SHORT)
    for reading, direction in found.items():
        np.testing.assert_array_equal(direction.vectors, answers.direction(*reading).vectors)
        assert (tmp_path / reading_name(reading)).is_dir()
    assert (engine.calls, said[0], sum(said[1:])) == (1, ("answers that 'rudeness' is learned from", 32), 32)
    again = fitted(engine, KIND, READINGS, tmp_path, SHORT, say)
    assert engine.calls == 1
    np.testing.assert_array_equal(again[READINGS[0]].vectors, found[READINGS[0]].vectors)


def test_what_an_interruption_left_out_is_fitted_and_the_rest_stays_the_same(tmp_path: Path) -> None:
    engine = Counting(2, 8)
    first = fitted(engine, KIND, READINGS[:1], tmp_path, SHORT, lambda *_: lambda _: None)
    both = fitted(engine, KIND, READINGS, tmp_path, SHORT, lambda *_: lambda _: None)
    assert engine.calls == 2
    np.testing.assert_array_equal(both[READINGS[0]].vectors, first[READINGS[0]].vectors)


def test_an_unknown_pool(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown pool 'middle'"):
        fitted(FakeEngine(2, 8), KIND, [("logistic", "middle")], tmp_path, SHORT, lambda *_: lambda _: None)
