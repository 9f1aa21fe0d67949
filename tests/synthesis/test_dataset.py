"""From writers to a data set: filters count what they drop, splits hold what was kept, an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from steerwell.concepts import load_concept
from steerwell.core.errors import ArgumentError
from steerwell.core.records import Edit, EditTerm, Prompt, Sampling, Verdict
from steerwell.engines.fake import FakeEngine
from steerwell.synthesis.data import leaks
from steerwell.synthesis.dataset import Filters, Synthesis
from steerwell.synthesis.examples import BENIGN
from steerwell.synthesis.writers import Writer

CONCEPT = load_concept("hostility")
ASKED = tuple(Prompt.chat(f"question {word} about {word * 2} and {word * 3}?") for word in "abcdefghijklmnopqrst")
WIDTH = 8


class HashJudge:
    """Scores that depend on the answer alone, spread over 0 to 100."""

    name = "hash"

    def score_many(self, concept, items):
        found = [sum(map(ord, answer)) for _, answer in items]
        return [Verdict(trait=value % 101, coherence=(value * 7) % 101) for value in found]


def writers() -> tuple[Writer, ...]:
    direction = np.eye(WIDTH, dtype=np.float32)[0]
    edit = Edit((EditTerm(1, direction, np.inf, 3.0, 0.0, "all"),))
    drawn = Sampling(1.0, max_new_tokens=12)
    return (
        Writer("steered", "harder", ASKED, drawn, edit=edit),
        Writer("unsteered", "as it is", ASKED, drawn, BENIGN),
    )


def run(folder: Path, filters: Filters, judge=None, count: int = 20, engine: FakeEngine | None = None):
    work = Synthesis(CONCEPT, writers(), count, filters, embedder="hashing")
    engine = engine or FakeEngine(n_layers=3, d_model=WIDTH)
    return work.run(engine, judge, folder, size=8, say=lambda _text, _count: lambda _done: None)


PLAIN = Filters(None, None, (0, 1000), None, (0.5, 0.25, 0.25))


def test_what_is_kept_is_in_the_splits_and_what_is_not_is_counted(tmp_path: Path) -> None:
    made = run(tmp_path, Filters(0.5, 0.3, (1, 1000), None, (0.5, 0.25, 0.25)), HashJudge())
    kept = [example for part in made.splits.values() for example in part]
    assert made.written == 40
    assert len(kept) + sum(made.dropped.values()) == 40
    assert all(example.coherence >= 0.3 for example in kept)
    assert all(example.success >= 0.5 if example.label else example.success <= 0.5 for example in kept)
    assert {example.source for example in kept} == {"steered", "unsteered"}
    assert not leaks(*made.splits.values(), near=None)


def test_the_folder_is_a_data_set_with_a_card(tmp_path: Path) -> None:
    made = run(tmp_path, PLAIN)
    loaded = datasets.load_dataset(str(made.folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {name: len(part) for name, part in made.splits.items()}
    steered = [row for part in loaded.values() for row in part if row["source"] == "steered"]
    assert all(row["edit"] == writers()[0].edit.id and row["label"] == 1 for row in steered)
    assert {row["seed"] for row in steered} == set(range(42, 62))
    card = (made.folder / "README.md").read_text()
    assert "Misuse warning" in card
    assert "| steered | harder |" in card


def test_an_interrupted_run_goes_on_and_another_one_is_refused(tmp_path: Path, monkeypatch) -> None:
    whole = run(tmp_path / "whole", PLAIN)
    engine, calls = FakeEngine(n_layers=3, d_model=WIDTH), []
    generate = engine.generate

    def failing(*args, **kwargs):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(engine, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", PLAIN, engine=engine)
    again = run(tmp_path / "cut", PLAIN, engine=engine)
    assert sum(calls) == 40 + 8  # the unit in flight is the only one that is asked twice
    assert again.splits == whole.splits or str(again.splits) == str(whole.splits)
    with pytest.raises(ArgumentError, match="texts differ"):
        run(tmp_path / "cut", PLAIN, count=10)


def test_filters_that_need_a_judge_are_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="success and coherence: asked for, but nobody judges"):
        run(tmp_path, Filters())


def test_nothing_passes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="none of 40 texts passes"):
        run(tmp_path, Filters(None, None, (900, 1000), None))
