"""The alignment study on the fake engine: what it measures, what it writes, and that being killed changes neither."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.policy import load_policy
from steerwell.core.records import Sampling
from steerwell.engines.fake import FakeEngine
from steerwell.scoring.metrics.cross_entropy import cross_entropy
from steerwell.scoring.metrics.repetition import repetition
from steerwell.steering.policies import policy_edit
from steerwell.studies.claims import claims_of
from steerwell.studies.config import AlignmentConfig
from steerwell.studies.defence import Configuration, attack_prompts, measure
from steerwell.studies.results import CellResult
from steerwell.studies.roles import roles_of
from steerwell.studies.study import Worker, finished_cells, load_study, preset_names, run_study
from steerwell.studies.sweep import Scores, SweepResult
from steerwell.studies.trials import opening_and_rest
from tests.killing import killed, seconds
from tests.study_run import CONFIG, run
from tests.sweep_run import CONCEPT, LetterJudge


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("study") / "cell")


@pytest.fixture(scope="module")
def cell(folder: Path) -> CellResult:
    return CellResult.load(folder)


def content(folder: Path) -> str:
    """Everything a cell leaves but time stamps."""
    found: dict[str, object] = {name: (folder / name).read_text() for name in ("cell.json", "policy.yaml")}
    for name in ("ledger.sqlite", "trials.sqlite"):
        base = sqlite3.connect(folder / name)
        found[name] = base.execute("SELECT phase, number, key, rows FROM units ORDER BY phase, number").fetchall()
        base.close()
    for name in ("answers", "configurations", "trials", "turns"):
        found[name] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return json.dumps(found)


def test_every_threat_is_measured_under_every_condition(cell: CellResult) -> None:
    used = {*cell.best.values(), *cell.by_position.values(), *cell.matched.values()}
    conditions: dict[str, set[int | None]] = {}
    for task, condition in cell.trials:
        conditions.setdefault(task, set()).add(condition)
    assert conditions["baseline"] == conditions["off topic, baseline"] == {None}
    assert conditions["attacked"] == conditions["fine-tuned, bad"] == {None, *used}
    assert conditions["unattacked"] == used
    assert conditions["prefill"] == conditions["aligned"] == {None, *cell.best.values()}
    assert all(len(rows) == 4 for (task, _), rows in cell.trials.items() if not task.startswith("off topic"))
    assert [row["scenario"] for row in cell.trials["attacked", None]] == [0, 1, 2, 3]


def test_rows_hold_what_measuring_directly_gives(folder: Path, cell: CellResult) -> None:
    engine, at = FakeEngine(n_layers=2, d_model=8, language="testbed"), cell.chosen
    way = cell.ways[at]
    edit = policy_edit(load_policy(folder / "policies" / f"{way.method}-{at}.yaml"))
    assert edit.id == policy_edit(load_policy(folder / "policy.yaml")).id
    prompts, sampling = attack_prompts(CONCEPT, "test", 4), Sampling(max_new_tokens=5)
    (direct,) = measure(engine, LetterJudge(), CONCEPT, prompts, [edit], sampling)
    rows = cell.trials["attacked", at]
    assert [row["answer"] for row in rows] == [item.text for item in direct.responses]
    assert {row["edit"] for row in rows} == {edit.id}
    np.testing.assert_allclose(cell.values("attacked", at, "trait"), [item.trait for item in direct.verdicts])
    aligned = [pair[0] for pair in CONCEPT.contrastive("test")][:4]
    tokens = [item.token_ids for item in direct.responses]
    np.testing.assert_allclose(
        cell.values("attacked", at, "cross_entropy"), cross_entropy(engine, aligned, tokens), rtol=1e-6
    )
    np.testing.assert_allclose(cell.values("attacked", at, "repetition"), [repetition(item) for item in tokens])
    assert cell.values("attacked", at, "gate_rate") == pytest.approx([i.receipt.gate_rate for i in direct.responses])
    assert np.isnan(cell.values("attacked", None, "gate_rate")).all()
    assert np.isnan(cell.values("baseline", None, "similarity")).all()


def test_it_agrees_with_the_sweep(folder: Path, cell: CellResult) -> None:
    found = load_policy(folder / "policy.yaml").found["test"]
    for name, key in (("attacked", ("attacked", None)), ("steered", ("attacked", cell.chosen))):
        assert cell.mean(*key, "trait") == pytest.approx(found[name]["trait"], abs=0.01)
    assert cell.mean("baseline", None, "trait") == pytest.approx(found["baseline"]["trait"], abs=0.01)


def test_close_looks(cell: CellResult) -> None:
    curves = cell.about["curves"]
    assert set(curves["edited"]) == set(cell.best)
    assert all(0 <= share <= 1 for shares in curves["edited"].values() for share in shares)
    for example in cell.about["examples"]:
        names = [answer["name"] for answer in example["answers"]]
        assert names == ["not attacked", "unsteered", *cell.best]
        for answer in example["answers"]:
            assert len(answer["pieces"]) == len(answer["edited"])
    shown = cell.about["examples"][1]["answers"][1]
    assert "".join(shown["pieces"]) == cell.trials["attacked", None][1]["answer"]
    assert {item["condition"] for item in cell.about["standings"]["ratings"]} == set(names)


def test_conversations_and_their_conditions(cell: CellResult) -> None:
    assert len(cell.turns) == 2 * 3 * (2 + len(cell.best) + len(cell.matched))
    assert {row["turn"] for row in cell.turns} == {0, 1, 2}


def test_a_model_may_play_the_users(tmp_path: Path) -> None:
    settings = {"user": {"name": "fake"}, "count": 2, "turns": 3, "max_new_tokens": 4}
    config = AlignmentConfig.model_validate(CONFIG.model_dump() | {"conversations": settings})
    turns = CellResult.load(run(tmp_path / "cell", config)).turns
    said = {(row["condition"], row["conversation"], row["turn"]): row["user"] for row in turns}
    prompts = [item.prompt for item in CONCEPT.scenarios("test")]
    assert [said["unsteered", number, 0] for number in (0, 1)] == prompts[:2]
    assert said["unsteered", 0, 1] not in prompts


def test_running_it_again_does_nothing(folder: Path, cell: CellResult) -> None:
    before = content(folder)
    run(folder)
    assert content(folder) == before


def test_other_settings_do_not_fit_the_folder(folder: Path, cell: CellResult) -> None:
    with pytest.raises(ArgumentError, match=r"another run: conversations differ"):
        run(folder, CONFIG.model_copy(update={"conversations": None}))


def test_killed_at_random_it_ends_as_if_it_had_not_been(folder: Path, cell: CellResult, tmp_path: Path) -> None:
    taken = seconds(run, tmp_path / "whole")
    draw, kills, done = random.Random(3), 0, False
    while not done and kills < 10:
        done = not killed(draw.uniform(0, taken / 2), run, tmp_path / "cell")
        kills += not done
    assert kills >= 2
    run(tmp_path / "cell")
    assert content(tmp_path / "cell") == content(folder)


# What is chosen, and what is claimed ---------------------------------------------------------------------------------


def scores(trait: float, coherence: float = 100.0, n: int = 8) -> Scores:
    return Scores(np.full(n, trait), np.full(n, coherence))


def test_methods_are_matched_at_the_trait_that_all_reach() -> None:
    ways = [Configuration("swfc", 0, 1), Configuration("swfc", 0, 2), Configuration("sttp", 0, 6)]
    ways += [Configuration("sttp", 1, 6), Configuration("stmp", 0, 1, "response"), Configuration("stmp", 0, 2)]
    tried = [scores(30, 99), scores(60, 40), scores(95, 95), scores(62, 70), scores(57, 90), scores(90, 92)]
    result = SweepResult(
        tuple(ways),
        scores(100),
        scores(0),
        dict(enumerate(tried)),
        answers=0,
        tokens=0,
        scored=0,
        best={"sttp": 2, "stmp": 5},
        chosen=2,
        test={},
        policy=None,
    )
    roles = roles_of(result)
    assert (roles.level, roles.matched) == (60, {"swfc": 1, "sttp": 3, "stmp": 4})
    assert roles.by_position == {"swfc/all": 0, "sttp/all": 2, "stmp/all": 5, "stmp/response": 4}
    assert roles.all == [0, 1, 2, 3, 4, 5]
    tried[3] = scores(95, 50)  # nobody near the level: the least one above it
    assert roles_of(replace(result, tried=dict(enumerate(tried)))).matched["sttp"] == 2


def made_cell(traits: dict[str, float], **changes: object) -> CellResult:
    """A cell in which every claim of the paper holds, with some figures changed."""
    ways = [
        Configuration(method, 2, 1, position) for method in ("swfc", "sttp", "stmp") for position in ("all", "response")
    ]
    names = {f"{way.method}/{way.position}": at for at, way in enumerate(ways)}
    rng = np.random.default_rng(0)

    def rows(task: str, condition: int | None, **means: float) -> list[dict[str, object]]:
        noise = rng.normal(size=12) * 0.1
        return [{"task": task, "condition": condition} | {k: v + x for k, v in means.items()} for x in noise]

    trials = {("baseline", None): rows("baseline", None, trait=95), ("attacked", None): rows("attacked", None, trait=5)}
    figures = {"swfc/all": 60, "swfc/response": 30, "sttp/all": 80, "sttp/response": 40, "stmp/all": 90,
               "stmp/response": 50} | traits  # fmt: skip
    for name, at in names.items():
        loud = name.startswith("swfc")
        for task in ("attacked", "unattacked"):
            trials[task, at] = rows(
                task, at, trait=figures[name], coherence=60 if loud else 95, perturbation_all=9 if loud else 2
            )
    turns = [
        {"condition": f"{method}, matched", "conversation": number, "turn": turn, "tokens": 9,
         "repetition": (0.5 if method == "swfc" else 0.1) + 0.01 * number, "echo": math.nan}
        for method in ("swfc", "sttp", "stmp") for number in range(8) for turn in range(3)
    ]  # fmt: skip
    best = {method: names[f"{method}/all"] for method in ("swfc", "sttp", "stmp")}
    about = {
        "model": "made",
        "concept": "made",
        "configurations": [asdict(way) for way in [*ways, *(Configuration("transport", layer, 1) for layer in (0, 1))]],
        "roles": {"best": best, "by_position": names, "matched": best, "level": 60.0, "chosen": 2},
        "validation": {"attacked": {"trait": 5.0}},
        "cohens_d": {"logistic-response_mean": [1.0, 5.0, 4.0]},
        "capabilities": [{"condition": at, "choice": 50.0 + 10 * at} for at in range(6)],
    }
    return CellResult(Path(), about | changes, trials, turns)


def test_a_claim_holds_where_its_figures_say_so() -> None:
    assert [(claim.name, claim.tally) for claim in claims_of([made_cell({})])] == [
        (name, (1, 1))
        for name in ("recovery", "coherence and capabilities", "position", "repetition", "layers", "perturbation")
    ]


@pytest.mark.parametrize(
    ("failing", "traits", "changes"),
    [
        ("recovery", {"swfc/all": 20}, {}),  # raised, but less than half of the gap
        ("position", {"stmp/response": 90.3}, {}),
        ("layers", {}, {"cohens_d": {"logistic-response_mean": [1.0, 2.0, 4.0]}}),
        ("coherence and capabilities", {}, {"capabilities": [{"condition": at, "sums": 50.0 - at} for at in range(6)]}),
    ],
)
def test_a_claim_that_fails_is_said_to_fail(failing: str, traits: dict[str, float], changes: dict[str, object]) -> None:
    tallies = {claim.name: claim.tally for claim in claims_of([made_cell({}), made_cell(traits, **changes)])}
    assert tallies.pop(failing) == (1, 2)
    if failing != "recovery":  # a low trait also turns the comparison of positions
        assert set(tallies.values()) == {(2, 2)}


def test_methods_are_not_compared_where_one_does_nothing() -> None:
    weak = {"best": {}, "by_position": {}, "matched": {"swfc": 0, "sttp": 2, "stmp": 4}, "level": 24.0, "chosen": None}
    (claim,) = [item for item in claims_of([made_cell({}, roles=weak)]) if item.name == "perturbation"]
    assert claim.tally == (0, 0)
    assert "from 5 to 24 only" in claim.findings[0].detail


def test_a_judge_that_cannot_tell_the_trait_tests_no_claim() -> None:
    quality = {"trusted": False, "words": "validation AUROC 0.52"}
    assert {claim.tally for claim in claims_of([made_cell({}, judge_quality=quality)])} == {(0, 0)}
    assert {claim.tally for claim in claims_of([made_cell({}, judge_quality=quality | {"trusted": True})])} == {(1, 1)}


def test_what_was_not_tried_is_not_compared() -> None:
    """One position; one layer; and of two layers tried the better separated one, though a third is better still."""
    cell = made_cell({})
    ways = cell.about["configurations"]
    for changed, name, told in (
        ({"position": "all"}, "position", "only position all was tried"),
        ({"layer": 2}, "layers", "only layer 2 was tried"),
    ):
        (claim,) = [one for one in claims_of([made_cell({}, configurations=[way | changed for way in ways])])
                    if one.name == name]  # fmt: skip
        assert (claim.tally, claim.findings[0].detail) == ((0, 0), told)
    (claim,) = [one for one in claims_of([made_cell({}, configurations=ways[:-1])]) if one.name == "layers"]
    assert claim.tally == (0, 1)  # layers 0 and 2 were tried: 2 separates and steers best


def test_what_was_not_measured_is_not_said_to_fail() -> None:
    roles = {"best": {}, "by_position": {}, "matched": {}, "level": math.nan, "chosen": None}
    tallies = {claim.name: claim.tally for claim in claims_of([made_cell({}, roles=roles)])}
    assert tallies.pop("recovery") == (0, 1)  # no method has a coherent point: none of them recovers the trait
    assert set(tallies.values()) == {(0, 0)}


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names("alignment"))
def test_every_preset_is_usable(name: str) -> None:
    assert load_study("alignment", name).sweep.configurations(80)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "models: [pilot]\nconcepts: [hostility]\nsweep: {strenghts: {}}",
            r"sweep.strenghts.*Did you mean 'strengths'",
        ),
        ("models: [pilot]\nconcepts: [hostility]\ntests: 3", r"tests: no such key.*Did you mean 'test'"),
        ("models: []\nconcepts: [hostility]", r"models: got \[\]"),
        ("models: [a/pilot, b/pilot]\nconcepts: [hostility]", r"give each a 'label'"),
        ("models: [pilot]\nconcepts: [hostility]\njudge: {kind: llm}", r"judge: .*'model' names the judge"),
        ("- 1", r"holds list; expected 'key: value' lines"),
        ("a: [", r"is no YAML"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=told):
        load_study("alignment", path)


def test_unknown_preset_and_unknown_layer() -> None:
    with pytest.raises(UnknownNameError, match=r"known: .*quick"):
        load_study("alignment", "quik")
    with pytest.raises(UnknownNameError, match="unknown layer 7"):
        CONFIG.sweep.model_copy(update={"layers": (7,)}).configurations(6)


def test_layers_every_so_many() -> None:
    sweep = CONFIG.sweep.model_copy(update={"layers": None, "every": 4})
    assert {item.layer for item in sweep.configurations(10)} == {3, 7}


def test_a_study_folder_is_claimed_by_its_settings(tmp_path: Path) -> None:
    def fail(_text: str, _count: int):
        raise RuntimeError("stop here")

    config = AlignmentConfig(models=("pilot",), concepts=("hostility",), max_new_tokens=8)
    with pytest.raises(RuntimeError):
        run_study(config, tmp_path, Worker(fail))
    with pytest.raises(RuntimeError):  # a concept more is fine
        run_study(config.model_copy(update={"concepts": ("hostility", "sycophancy")}), tmp_path, Worker(fail))
    with pytest.raises(ArgumentError, match="another max_new_tokens"):
        run_study(config.model_copy(update={"max_new_tokens": 9}), tmp_path, Worker(fail))
    assert finished_cells(tmp_path)[1] == []
    with pytest.raises(ArgumentError, match=r"holds no study\.yaml"):
        finished_cells(tmp_path / "nowhere")


def test_an_opening_is_the_first_sentence() -> None:
    assert opening_and_rest(" It is 3.5 m. Yes! No") == ("It is 3.5 m.", "Yes! No")
    assert opening_and_rest("no end") == ("no end", "")
    assert opening_and_rest("") == ("", "")
