"""The synthesis study's settings, presets and folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from steerwell.concepts import load_concept
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.studies.config import AlignmentConfig
from steerwell.studies.study import KINDS, cells_of, finished_cells, load_study, preset_names, run_study
from steerwell.studies.synthesis.cell import SynthesisCell
from steerwell.studies.synthesis.config import Steering, SynthesisConfig
from tests.synthesis_run import settings


@pytest.mark.parametrize("name", preset_names("synthesis"))
def test_every_preset_is_usable_and_gives_prompting_the_same_budget(name: str) -> None:
    config = load_study("synthesis", name)
    steering = config.steering.configurations(6 if config.data is None else 96)  # blocks of the model
    names = [way.describe() for way in steering]
    assert len(set(names)) == len(names)
    if config.data is None:
        known = min(len({pair.violating for pair in load_concept(c, "testbed").pairs}) for c in config.concepts)
        assert len(config.prompting.configurations(known)) == len(steering)
        assert (config.texts, config.kept) == (config.originals, 0)  # equal counts: replaced, not topped up
    assert len({way.describe() for way in config.prompting.configurations(99)}) == len(
        config.prompting.configurations(99)
    )
    assert [cell.config for cell in cells_of(config, Path("x"))] == [config] * len(config.models) * len(config.concepts)


def test_kinds_have_presets_and_do_not_read_each_others_files(tmp_path: Path) -> None:
    assert set(KINDS) == {"alignment", "synthesis"}
    for kind in KINDS:
        assert {"pilot", "quick"} <= set(preset_names(kind))
        assert load_study(kind, quick=True).study == load_study(kind).study == kind
    path = tmp_path / "study.yaml"
    path.write_text("study: alignment\nmodels: [pilot]\nconcepts: [hostility]\n")
    with pytest.raises(ArgumentError, match=r"study: got 'alignment'"):
        load_study("synthesis", path)
    with pytest.raises(UnknownNameError, match=r"known: .*quick"):
        load_study("synthesis", "qwen3-32b")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("steering: {layer: [1]}", r"steering.layer: no such key.*Did you mean 'layers'"),
        ("prompting: {shot: [1]}", r"prompting.shot: no such key.*Did you mean 'shots'"),
        ("few: [50, 10]", "rising numbers"),
        ("few: [10, 10]", "rising numbers"),
        ("originals: 40", "few: 50 is more than the 40 'originals'"),
        ("{few: [], originals: 4, kept: 9}", "kept: 9 is more than the 4 'originals'"),
        ("{few: [], originals: 4, prompting: {shots: [6]}}", "prompting.shots: more than the 4"),
        ("detector: {seeds: 2}", "detector.seeds: got 2"),
        ("texts: 2", "texts: got 2"),
        ("temperature: 0", "temperature: got 0"),
        ("encoders: {concepts: [honesty]}", "encoders.concepts: honesty is none of this study's concepts"),
        ("encoders: {concepts: [hostility], models: [pilt]}", "encoders.models: pilt is none of this study's models"),
        ("data: {train: a.csv, test: b.csv}", "'validation' and 'test' go together"),
        ("{concepts: [hostility, mine/hostility.yaml]}", "a concept is named twice"),
        ("{models: [a/pilot, b/pilot]}", "give each a 'label'"),
        ("judge: {kind: llm}", "judge: .*'model' names the judge"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, more: str, told: str) -> None:
    given = {"models": ["pilot"], "concepts": ["hostility"]} | yaml.safe_load(more)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(ArgumentError, match=told):
        load_study("synthesis", path)


def test_the_steering_grid() -> None:
    ways = [{"method": "swfc", "strengths": [1, 2]}, {"method": "stmp", "strengths": [1], "pool": "prompt_last"}]
    steering = Steering.model_validate({"ways": ways, "layers": [0, 2]})
    found = [(item.method, item.layer, item.strength, item.reading) for item in steering.configurations(3)]
    one, other = ("logistic", "response_mean"), ("logistic", "prompt_last")
    assert found == [
        ("swfc", 0, 1, one), ("swfc", 0, 2, one), ("swfc", 2, 1, one), ("swfc", 2, 2, one),
        ("stmp", 0, 1, other), ("stmp", 2, 1, other),
    ]  # fmt: skip
    assert {item.layer for item in Steering(every=3).configurations(9)} == {2, 5, 8}
    with pytest.raises(UnknownNameError, match="unknown layer 2"):
        steering.configurations(2)
    with pytest.raises(ArgumentError, match=r"steering\.layers: got none of the model's 1"):
        Steering().configurations(1)
    with pytest.raises(UnknownNameError, match="swfk"):
        Steering.model_validate({"ways": [{"method": "swfk", "strengths": [1]}]}).configurations(6)


def test_a_study_folder_is_claimed_by_its_settings_and_kind(tmp_path: Path) -> None:
    def skip(cell: object) -> str:
        return ""

    config = SynthesisConfig(models=("pilot",), concepts=("hostility",), texts=8)
    run_study(config, tmp_path, skip)
    run_study(config.model_copy(update={"concepts": ("hostility", "sycophancy"), "examples": 1}), tmp_path, skip)
    with pytest.raises(ArgumentError, match="another texts; resume"):
        run_study(config.model_copy(update={"texts": 9}), tmp_path, skip)
    detector = config.detector.model_copy(update={"seeds": 5})
    with pytest.raises(ArgumentError, match="another kept, detector; resume"):
        run_study(config.model_copy(update={"detector": detector, "kept": 4}), tmp_path, skip)
    alignment = AlignmentConfig(models=("pilot",), concepts=("hostility",))
    with pytest.raises(ArgumentError, match="another study; resume"):
        run_study(alignment, tmp_path, skip)
    known, cells = finished_cells(tmp_path)
    assert (known.concepts, cells) == (("hostility", "sycophancy"), [])
    run_study(alignment, tmp_path / "other", skip)
    with pytest.raises(ArgumentError, match="another study; resume"):
        run_study(config, tmp_path / "other", skip)
    (tmp_path / "other" / "study.yaml").write_text("study: poetry\n")
    with pytest.raises(UnknownNameError, match="poetry"):
        finished_cells(tmp_path / "other")


def test_finished_cells_are_those_that_were_written(tmp_path: Path) -> None:
    config = settings(tmp_path)

    def work(cell: SynthesisCell) -> str:
        assert cell.folder == tmp_path / "out" / "fake" / "rudeness"
        cell.folder.mkdir(parents=True)
        (cell.folder / "cell.json").write_text("{}")
        return cell.title

    run_study(config, tmp_path / "out", work)
    known, cells = finished_cells(tmp_path / "out")
    assert known == config
    assert [cell.title for cell in cells] == ["fake, rudeness"]
