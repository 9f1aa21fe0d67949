"""The sweep on the fake engine: what it chooses, what it writes, and that being killed changes neither."""

from __future__ import annotations

import math
import random
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from steerwell.core.artifacts import load_direction
from steerwell.core.errors import ArgumentError, EngineError
from steerwell.core.policy import load_policy
from steerwell.engines.fake import FakeEngine
from steerwell.runs.ledger import Row
from steerwell.steering.policies import policy_edit
from steerwell.studies.defence import attack_prompts, baseline_prompts, edits_of, grouped, measure
from steerwell.studies.sweep import Sweep
from steerwell.studies.tables import Asked, write_summaries
from tests.killing import killed, seconds
from tests.sweep_run import CONCEPT, SHORT, WAYS, LetterJudge, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def result(folder):
    return run(folder)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Folder and result of the same sweep with automatic search."""
    folder = tmp_path_factory.mktemp("search")
    return folder, run(folder, search="auto")


def content(folder: Path) -> dict[str, object]:
    """Everything a sweep leaves but time stamps."""
    base = sqlite3.connect(folder / "ledger.sqlite")
    units = base.execute("SELECT phase, number, key, rows FROM units ORDER BY phase, number").fetchall()
    about = base.execute("SELECT name, value FROM about ORDER BY name").fetchall()
    base.close()
    tables = {name: repr(pq.read_table(folder / f"{name}.parquet").to_pylist())  # text: NaN is not itself
              for name in ("answers", "configurations")}  # fmt: skip
    return {"units": units, "about": about, "policy": (folder / "policy.yaml").read_text()} | tables


def test_it_scores_what_measuring_directly_scores(folder, result) -> None:
    engine = FakeEngine()
    edit = policy_edit(load_policy(result.policy))
    (direct,) = measure(engine, LetterJudge(), CONCEPT, attack_prompts(CONCEPT, "test", 4), [edit], SHORT)
    assert direct.trait == pytest.approx(result.test[result.chosen, True].trait)
    assert len(result.tried) == len(WAYS) == 16
    assert {key for key in result.test if key[0] is None} == {(None, False), (None, True)}


def test_the_operating_point_is_the_best_on_validation(result) -> None:
    assert result.tried[result.chosen].trait == max(item.trait for item in result.tried.values())
    for method, index in result.best.items():
        mine = [item.trait for at, item in result.tried.items() if WAYS[at].method == method]
        assert result.tried[index].trait == max(mine)
    assert (result.policy.parent / "heatmap.png").stat().st_size > 1000
    found = load_policy(result.policy).found
    assert found["test"]["steered"]["trait"] == pytest.approx(result.test[result.chosen, True].trait, abs=0.01)


def test_the_table_holds_every_answer_with_its_configuration(folder, result) -> None:
    rows = pq.read_table(folder / "answers.parquet").to_pylist()
    validation = [row for row in rows if row["split"] == "validation"]
    assert len(validation) == 3 * (len(WAYS) + 2)
    assert len(rows) - len(validation) == 4 * len(result.test)
    for row in rows:
        assert (row["edit"] is None) == (row["configuration"] is None) == (row["method"] is None)
        if row["configuration"] is not None:
            assert {name: row[name] for name in asdict(WAYS[0])} == asdict(WAYS[row["configuration"]])
    traits = {row["scenario"]: row["trait"] for row in validation if row["configuration"] == 5}
    np.testing.assert_allclose([traits[scenario] for scenario in range(3)], result.tried[5].traits)


def test_the_summary_holds_the_means_of_every_condition(folder, result) -> None:
    answers = pq.read_table(folder / "answers.parquet").to_pylist()
    rows = pq.read_table(folder / "configurations.parquet").to_pylist()
    place = ("split", "attacked", "configuration")
    assert len(rows) == len({tuple(row[name] for name in place) for row in rows}) == len(WAYS) + 2 + len(result.test)
    edited = 0
    for row in rows:
        mine = [item for item in answers if all(item[name] == row[name] for name in place)]
        assert (row["n"], row["missing"]) == (len(mine), 0)
        assert row["tokens"] == sum(item["tokens"] for item in mine)
        for name in ("trait", "coherence", "gate_rate"):
            assert row[name] == pytest.approx(np.mean([item[name] for item in mine]))
        moved = [item["perturbation"] for item in mine if item["gate_rate"] > 0]
        assert row["perturbation"] == pytest.approx(np.mean(moved) if moved else np.nan, nan_ok=True)
        edited += bool(moved)
        if row["configuration"] is None:
            assert not moved
            assert all(row[name] is None for name in asdict(WAYS[0]))
        else:
            assert {name: row[name] for name in asdict(WAYS[0])} == asdict(WAYS[row["configuration"]])
    assert edited > len(WAYS)


def test_missing_scores_are_counted_and_left_out_of_the_means(tmp_path: Path) -> None:
    told = {"coherence": 80.0, "gate_rate": 0.5, "perturbation": 3.0, "tokens": 4}
    rows: dict[Asked, Row] = {
        ("test", 0, True, 0): told | {"trait": 10.0},
        ("test", 0, True, 1): told | {"trait": math.nan, "coherence": math.nan, "gate_rate": 0.0, "perturbation": 0.0},
        ("validation", None, True, 0): told | {"trait": math.nan, "gate_rate": 0.0, "perturbation": 0.0},
    }
    write_summaries(tmp_path / "means.parquet", WAYS, rows)
    unsteered, steered = pq.read_table(tmp_path / "means.parquet").to_pylist()
    assert (steered["n"], steered["missing"], steered["trait"], steered["coherence"]) == (1, 1, 10, 80)
    assert (steered["gate_rate"], steered["perturbation"], steered["tokens"]) == (0.25, 3, 8)
    assert (unsteered["n"], unsteered["missing"], unsteered["method"]) == (0, 1, None)
    assert math.isnan(unsteered["trait"])
    assert math.isnan(unsteered["perturbation"])


def test_running_it_again_does_nothing_and_finds_the_same(folder, result) -> None:
    before = content(folder)
    again = run(folder)
    assert content(folder) == before
    assert (again.chosen, again.best) == (result.chosen, result.best)


def test_another_sweep_does_not_fit_the_folder(folder, result) -> None:
    other = Sweep(CONCEPT, tuple(WAYS[:3]), validation=3, test=4, sampling=SHORT, fitting=SHORT)
    with pytest.raises(ArgumentError, match=r"another run: configurations differ"):
        other.run(FakeEngine(), LetterJudge(), folder, rows_per_unit=2, say=lambda _text, _count: lambda _done: None)


def test_the_search_measures_what_the_grid_measures(result, searched) -> None:
    _, found = searched
    assert set(found.tried) < set(result.tried)
    for index, scores in found.tried.items():
        np.testing.assert_array_equal(scores.traits, result.tried[index].traits)
    assert found.answers < result.answers
    assert (found.baseline.trait, found.attacked.trait) == (result.baseline.trait, result.attacked.trait)
    assert set(found.best) == set(result.best)
    assert result.scored == 0


def test_the_search_begins_where_the_unattacked_answers_are_likely(searched) -> None:
    """Computed once more with `engine.score`: of 8 configurations of each method the likeliest one is answered with."""
    folder, found = searched
    engine = FakeEngine()
    answers = engine.generate(baseline_prompts(CONCEPT, "validation", 3), SHORT)
    kept = [(prompt, answer.token_ids) for prompt, answer in
            zip(attack_prompts(CONCEPT, "validation", 3), answers, strict=True) if answer.token_ids]  # fmt: skip
    edits = edits_of({way.reading: load_direction(folder / "directions" / "-".join(way.reading)) for way in WAYS}, WAYS)
    likely = [
        np.mean([score.logprobs.mean() for score in engine.score(*zip(*kept, strict=True), edit)]) for edit in edits
    ]
    for method, group in grouped(range(len(WAYS)), lambda index: WAYS[index].method).items():
        assert [index for index in group if index in found.tried] == [max(group, key=likely.__getitem__)], method
    assert found.scored == len(WAYS) * sum(len(tokens) for _, tokens in kept)
    assert found.answers == 3 * (2 + len(found.tried))
    again = run(folder, search="auto")
    assert (again.answers, again.scored, again.chosen) == (found.answers, found.scored, found.chosen)
    with pytest.raises(ArgumentError, match="another run: schedule, search differ"):
        run(folder)


def test_without_an_unattacked_answer_there_is_nothing_to_search_by(tmp_path: Path) -> None:
    class Silent(FakeEngine):
        def generate(self, prompts, *args, **options):
            found = super().generate(prompts, *args, **options)
            calm = {prompt.messages for prompt in baseline_prompts(CONCEPT, "validation", 3)}
            return [replace(item, token_ids=(), text="") if item.prompt.messages in calm else item for item in found]

    with pytest.raises(EngineError, match="left the first 3 validation scenarios without an answer"):
        run(tmp_path, search="auto", engine=Silent())


def test_a_begun_answer_is_a_threat_of_its_own(result, tmp_path: Path) -> None:
    found = run(tmp_path, threat="prefill")
    engine = FakeEngine()
    rows = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    said = engine.generate(attack_prompts(CONCEPT, "test", 4), SHORT)
    for row in rows:
        assert row["system"] in CONCEPT.neutral_system
        assert row["attacked"] or not row["prefill"]
        if row["split"] == "test" and row["attacked"]:
            assert row["prefill"] == " ".join(said[row["scenario"]].text.split()[:8])
    assert found.baseline.trait == result.baseline.trait
    assert run(tmp_path, threat="prefill").chosen == found.chosen


def test_a_direction_cut_short_is_fitted_again(folder, result, tmp_path: Path) -> None:
    (tmp_path / "directions" / "mean_difference-prompt_last").mkdir(parents=True)
    run(tmp_path)
    assert content(tmp_path) == content(folder)


@pytest.mark.parametrize("search", ["grid", "auto"])
def test_killed_ten_times_it_ends_as_if_it_had_not_been(search, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    taken = seconds(run, whole, search)
    draw, place, kills = random.Random(1), 0, 0
    while kills < 10:
        was_killed = killed(draw.uniform(0, taken / 2), run, tmp_path / str(place), search)
        kills += was_killed
        place += not was_killed
    run(tmp_path / str(place), search)
    for finished in range(place + 1):
        assert content(tmp_path / str(finished)) == content(whole)
