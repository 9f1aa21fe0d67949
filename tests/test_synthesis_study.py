"""The synthesis study on the fake engine: what it measures, and that being killed changes nothing.

Figures are held against scikit-learn and against measuring directly.
"""

from __future__ import annotations

import json
import math
import random
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from steerwell.core.artifacts import load_direction
from steerwell.core.errors import ArgumentError
from steerwell.core.records import Prompt, Sampling
from steerwell.engines.fake import FakeEngine
from steerwell.scoring.quality import quality
from steerwell.steering.interventions import build
from steerwell.studies.defence import Configuration
from steerwell.studies.synthesis import cell as cell_module
from steerwell.studies.synthesis.arms import Arm, arms_of, roles_of
from steerwell.studies.synthesis.cell import SynthesisCell
from steerwell.studies.synthesis.config import SynthesisConfig
from steerwell.studies.synthesis.real import Real, real_examples
from steerwell.studies.synthesis.results import SynthesisResult
from steerwell.synthesis.detectors import train_detectors
from steerwell.synthesis.detectors._training import kept_rows
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example, labels
from tests.sweep_run import LetterJudge
from tests.synthesis_run import CONCEPT, concept_of, run, settings, write_labelled

ROOT = Path(__file__).parents[1]
FILES = ("configurations", "texts", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("study") / "cell")


@pytest.fixture(scope="module")
def config(folder: Path) -> SynthesisConfig:
    return settings(folder.parent)


@pytest.fixture(scope="module")
def real(config: SynthesisConfig) -> Real:
    return real_examples(config, concept_of(config))


@pytest.fixture(scope="module")
def cell(folder: Path) -> SynthesisResult:
    return SynthesisResult.load(folder)


def content(folder: Path) -> str:
    """Everything a cell leaves but time stamps, and but the data's place and what depends on it."""
    found: dict[str, object] = {"cell.json": (folder / "cell.json").read_text()}
    base = sqlite3.connect(folder / "ledger.sqlite")
    found["units"] = base.execute("SELECT phase, number, key, rows FROM units ORDER BY phase, number").fetchall()
    base.close()
    for name in FILES:
        found[name] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    found["scores"] = (folder / "scores.safetensors").read_bytes().hex()
    return json.dumps(found)


# What is measured ----------------------------------------------------------------------------------------------------


def test_every_way_is_an_arm_and_so_is_every_control(cell: SynthesisResult) -> None:
    assert {name: len(cell.of(name)) for name in ("steered", "prompted", "unsteered", "original")} == {
        "steered": 8, "prompted": 4, "unsteered": 2, "original": 2,
    }  # fmt: skip
    names = [row["arm"] for row in cell.arms]
    assert len(set(names)) == len(names) == len(cell.scores)
    assert {row["texts"] for row in cell.arms if row["source"] != "original"} == {6}
    assert {(row["arm"], row["texts"]) for row in cell.arms if row["source"] == "original"} == {
        ("original", 12), ("original, 4", 4),
    }  # fmt: skip
    assert cell.about["real"] == {
        "train": {"violating": 12, "benign": 12},
        "validation": {"violating": 8, "benign": 8},
        "test": {"violating": 10, "benign": 10},
    }
    assert (cell.named("original"), cell.named("nobody")) == (15, None)


def test_texts_are_what_generating_directly_gives(folder: Path, cell: SynthesisResult, real: Real) -> None:
    engine, sampling = FakeEngine(n_layers=2, d_model=8), Sampling(1.0, 1.0, 90)
    row = cell.arms[cell.of("steered")[3]]
    direction = load_direction(folder / "directions" / f"{row['estimator']}-{row['pool']}")
    edit = build(direction, row["method"], row["layer"], row["strength"], toward="violating")
    assert edit.id != build(direction, row["method"], row["layer"], row["strength"]).id
    found = cell.texts(row["arm"])
    assert [item.prompt for item in found] == list(real.asked[:6])
    assert [item.seed for item in found] == [42, 43, 44, 45, 46, 47]
    for at, item in enumerate(found):
        system = CONCEPT["neutral_system"][at % 2]
        prompt = Prompt.chat(item.prompt, system)
        (answer,) = engine.generate([prompt], replace(sampling, seed=42 + at), edit)
        assert (item.response, item.edit, item.tokens_edited) == (answer.text, edit.id, answer.receipt.gate_rate)
        assert (item.label, item.source, item.concept) == (VIOLATING, "steered", "rudeness")


def test_quality_is_what_measuring_the_texts_gives(cell: SynthesisResult) -> None:
    for at in (0, 5, 12):
        texts = cell.texts(cell.arms[at]["arm"])
        direct = quality(
            [item.response for item in texts],
            success=[item.success for item in texts],
            coherence=[item.coherence for item in texts],
            embeddings="hashing",
            prompts=[item.prompt for item in texts],
            intervals=False,
        ).figures()
        assert {name: cell.value(at, name) for name in direct} == pytest.approx(direct, nan_ok=True)
        assert direct["hm3"] == pytest.approx(
            3 / (1 / direct["success"] + 1 / direct["coherence"] + 1 / direct["diversity"])
        )
    for at in cell.of("original"):  # nobody judged them
        assert np.isnan([cell.value(at, "success"), cell.value(at, "hm3")]).all()


def independent_scores(train: Sequence[Example], held_out: Sequence[Example], seed: int) -> np.ndarray:
    """P(violating) by scikit-learn alone: counts of the response beside those of the prompt, logistic regression."""
    read = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=4096)

    def vectors(examples: Sequence[Example]) -> np.ndarray:
        both = [read.transform([getattr(item, part) for item in examples]).toarray() for part in ("response", "prompt")]
        return np.hstack(both)

    prompts = [item.prompt for item in train]
    rows = kept_rows(labels(train), np.array([prompts.index(prompt) for prompt in prompts]), seed)
    chosen = [train[row] for row in rows]
    assert 0.8 * len(train) <= len(chosen) < len(train)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=10_000)
    return model.fit(vectors(chosen), labels(chosen)).predict_proba(vectors(held_out))[:, 1]


@pytest.mark.parametrize("arm", ["swfc, layer 1, strength 2, mean_difference at response_mean", "original, 4"])
def test_detectors_are_what_scikit_learn_gives(cell: SynthesisResult, real: Real, arm: str) -> None:
    at = cell.named(arm)
    violating = cell.texts(arm) or real.violating[:4]
    assert {item.label for item in violating} == {VIOLATING}
    areas = {"validation": [], "test": []}
    for seed in range(3):
        # groups are numbered by first appearance, so the order of the examples matters: benign ones first
        scores = independent_scores([*real.benign, *violating], [*real.validation, *real.test], seed)
        held, tested = np.split(scores, [len(real.validation)])
        np.testing.assert_allclose(cell.scores[at, seed], tested, atol=2e-4)
        areas["validation"].append(roc_auc_score(labels(real.validation), held))
        areas["test"].append(roc_auc_score(labels(real.test), tested))
    assert cell.auroc(at) == pytest.approx(np.mean(areas["test"]))
    assert list(cell.arms[at]["auroc_seeds"]) == pytest.approx(areas["test"])
    assert cell.value(at, "auroc_validation") == pytest.approx(np.mean(areas["validation"]))


def test_the_saved_test_set_is_the_real_one(cell: SynthesisResult, real: Real) -> None:
    assert [(item.prompt, item.response, item.label) for item in cell.test] == [
        (item.prompt, item.response, item.label) for item in real.test
    ]
    assert cell.labels.tolist() == labels(real.test).tolist()
    assert {item.source for item in cell.test} == {"original"}
    assert cell.scores.shape == (16, 3, 20)


def test_the_probe_is_the_direction_itself(folder: Path, cell: SynthesisResult, real: Real) -> None:
    found = cell.about["probe"]
    assert found["reading"] == "mean_difference-response_mean"  # read where a probe reads, whatever stands first
    (direct,) = train_detectors(
        "probe",
        [*real.violating, *real.benign],
        real.validation,
        engine=FakeEngine(n_layers=2, d_model=8),
        direction=load_direction(folder / "directions" / found["reading"]),
    )
    assert found["layer"] == direct.layer
    np.testing.assert_allclose(found["scores"], direct.scores(real.test))


def test_kept_originals_stay_beside_generated_texts_only(config: SynthesisConfig, real: Real) -> None:
    made = tuple(replace(real.violating[0], response=f"made {at}", source="steered") for at in range(6))
    arm, control = Arm("a", "steered", made, {}), Arm("original", "original", real.violating, {})
    assert arm.training(real, 0) == list(made)
    assert arm.training(real, 5) == [*made, *real.violating[:5]]
    assert control.training(real, 5) == list(real.violating)
    way = Configuration("swfc", 0, 1.0)

    def controls(**changes: object) -> dict[str, int]:
        found = arms_of(config.model_copy(update=changes), real, [way], [made])
        return {arm.name: len(arm.examples) for arm in found if arm.source == "original"}

    assert controls() == {"original, 4": 4, "original": 12}
    assert controls(kept=5) == {"original, 4": 4, "original, 5": 5, "original": 12}
    assert controls(kept=4) == {"original, 4": 4, "original": 12}  # not twice
    assert controls(kept=12) == {"original, 4": 4, "original": 12}
    assert controls(few=()) == {"original": 12}


def test_a_cell_whose_originals_are_topped_up(folder: Path, cell: SynthesisResult, real: Real, tmp_path: Path) -> None:
    config = settings(tmp_path, kept=3)
    again = SynthesisResult.load(run(tmp_path / "cell", config))
    arm = cell.arms[2]["arm"]
    assert [item.response for item in again.texts(arm)] == [item.response for item in cell.texts(arm)]
    scores = independent_scores([*real.benign, *cell.texts(arm), *real.violating[:3]], real.test, 1)
    np.testing.assert_allclose(again.scores[2, 1], scores, atol=2e-4)
    assert again.named("original, 3") is not None
    original = again.named("original")
    np.testing.assert_array_equal(again.scores[original], cell.scores[cell.named("original")])


def test_without_a_judge_success_and_hm3_are_missing_and_diversity_is_not(tmp_path: Path) -> None:
    class Silent(LetterJudge):
        def score_many(self, concept, items):
            return [
                replace(verdict, trait=math.nan, coherence=math.nan) for verdict in super().score_many(concept, items)
            ]

    config = settings(tmp_path, judge=None, prompting={"systems": 1, "shots": [0], "temperatures": [1.0]})
    cell = SynthesisCell(config, config.models[0], config.concepts[0], tmp_path / "cell")
    cell.run(FakeEngine(n_layers=2, d_model=8), lambda _text, _count: lambda _done: None)
    found = SynthesisResult.load(tmp_path / "cell")
    assert found.about["judge"] is None
    for name in ("success", "coherence", "hm3", "hm2"):
        assert np.isnan(found.values(found.of("steered"), name)).all()
    assert not np.isnan(found.values(found.of("steered"), "diversity")).all()
    assert not np.isnan(found.values(found.of("steered"), "auroc")).any()


def test_blank_texts_are_left_out_and_counted(real: Real) -> None:
    from steerwell.scoring.embeddings import load_embedder
    from steerwell.studies.synthesis.bench import Bench

    bench = Bench(real.benign, real.validation, real.test, load_embedder("hashing"), 10.0, 3)
    blank = replace(real.violating[0], response=" \n", source="steered")
    mixed = [*real.violating[:6], blank, blank]
    np.testing.assert_array_equal(bench.run(mixed).scores, bench.run(real.violating[:6]).scores)
    nothing = bench.run([blank, blank, real.violating[0]])
    for values, shape in ((nothing.validation, (3,)), (nothing.test, (3,)), (nothing.scores, (3, 20))):
        assert (values.shape, np.isnan(values).all()) == (shape, True)
    assert Arm("a", "steered", tuple(mixed), {}).fields()["blank"] == 2


def test_encoders_are_trained_for_every_role_once(
    tmp_path: Path, monkeypatch, cell: SynthesisResult, real: Real
) -> None:
    trained: list[tuple[int, tuple[str, ...]]] = []

    def fake(kind, train, validation, seeds=(0,), **options):
        if kind == "probe":
            yield from train_detectors(kind, train, validation, seeds, **options)
            return
        assert (options, list(validation)) == ({"base": "tiny", "epochs": 2}, list(real.validation))
        assert [item for item in train if item.label == BENIGN] == list(real.benign)
        trained.append((seeds[0], tuple(item.response for item in train if item.label)))
        yield SimpleNamespace(scores=lambda examples: np.full(len(examples), 0.1 * seeds[0]))

    monkeypatch.setattr(cell_module, "train_detectors", fake)
    encoders = {"base": "tiny", "concepts": ["rudeness"], "epochs": 2, "seeds": 3}
    found = SynthesisResult.load(run(tmp_path / "cell", settings(tmp_path, encoders=encoders)))
    rows = found.about["encoders"]
    roles = {row["role"]: row["arm"] for row in rows}
    assert set(roles) == {
        "original", "original, 4", "unsteered", "unsteered, broken", "prompted, best on validation",
        "steered, best on validation", "steered by HM3",
    }  # fmt: skip
    assert roles["steered, best on validation"] == found.best("steered")
    assert roles["prompted, best on validation"] == found.best("prompted")
    hm3 = found.values(found.of("steered"), "hm3")
    assert roles["steered by HM3"] == found.of("steered")[int(np.nanargmax(hm3))]
    assert [(row["seed"], row["scores"][0]) for row in rows if row["role"] == "original"] == [
        (0, 0),
        (1, 0.1),
        (2, 0.2),
    ]
    assert len(trained) == len(set(trained)) == 3 * len(set(roles.values()))  # one that has two roles: once
    assert (0, tuple(item.response for item in real.violating[:4])) in trained
    assert content_but(found.folder, "encoders") == content_but(cell.folder, "encoders")


def content_but(folder: Path, phase: str) -> list[object]:
    """A ledger's units without one phase."""
    base = sqlite3.connect(folder / "ledger.sqlite")
    found = base.execute(
        "SELECT phase, number, key, rows FROM units WHERE phase != ? ORDER BY 1, 2", (phase,)
    ).fetchall()
    base.close()
    return found


def test_an_arm_without_detectors_is_never_singled_out() -> None:
    nan = math.nan
    rows = [
        {"arm": name, "source": source, "auroc_validation": area, "hm3": hm3}
        for name, source, area, hm3 in (
            ("a", "steered", nan, 0.9),
            ("b", "steered", 0.6, 0.8),
            ("c", "steered", 0.7, 0.1),
            ("d", "prompted", nan, 0.5),
            ("original", "original", 0.9, nan),
            ("unsteered", "unsteered", 0.5, 0.2),
        )
    ]
    assert roles_of(rows) == {"original": 4, "unsteered": 5, "steered, best on validation": 2, "steered by HM3": 1}
    unjudged = [row | {"hm3": None, "auroc_validation": 0.7} for row in rows]
    assert roles_of(unjudged) == {
        "original": 4, "unsteered": 5, "prompted, best on validation": 3, "steered, best on validation": 0,
    }  # fmt: skip


# Resuming ------------------------------------------------------------------------------------------------------------


def test_running_it_again_does_nothing(folder: Path, cell: SynthesisResult) -> None:
    before = content(folder)
    run(folder)
    assert content(folder) == before


def test_killed_at_random_it_ends_as_if_it_had_not_been(folder: Path, cell: SynthesisResult, tmp_path: Path) -> None:
    draw, ends = random.Random(3), []
    for units in (0, draw.randint(3, 4), draw.randint(4, 5)):  # of 14: while fitting, among the texts, the detectors
        command = [sys.executable, "-m", "tests.synthesis_run", str(tmp_path / "cell"), str(units)]
        ended = subprocess.run([*command, str(draw.uniform(0, 0.1))], cwd=ROOT, capture_output=True, check=False)
        assert ended.returncode in (0, -9), ended.stderr.decode()
        ends.append(ended.returncode)
    assert ends[:2] == [-9, -9]
    run(tmp_path / "cell")
    assert content(tmp_path / "cell") == content(folder)


def test_other_settings_and_other_data_do_not_fit_the_folder(folder: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, prompting={"systems": 1, "shots": [0], "temperatures": [1.0]}, texts=4)
    run(tmp_path / "cell", config)
    judge = LetterJudge()
    judge.name = "others"
    with pytest.raises(ArgumentError, match=r"another run: judge_name, temperature differ"):
        run(tmp_path / "cell", config.model_copy(update={"temperature": 0.5}), judge)
    run(tmp_path / "cell", config.model_copy(update={"examples": 9}))  # only what a report shows
    write_labelled(tmp_path / "labelled.csv", seed=2)
    with pytest.raises(ArgumentError, match=r"another run: files hold differ"):
        run(tmp_path / "cell", config)
