"""The report of a made-up synthesis study: its figures by hand, hostile texts, and what is missing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from scipy import stats

from steerwell.scoring.quality import harmonic_mean
from steerwell.studies.report import write_report
from steerwell.studies.report.synthesis.failures import failures
from steerwell.studies.report.synthesis.measures import Cell, overview
from steerwell.studies.synthesis import analysis
from steerwell.studies.synthesis.analysis import falsifier, selections
from steerwell.studies.synthesis.arms import BY_HM3, PROMPTED, STEERED
from steerwell.studies.synthesis.cell import ARMS, SCORES, TEST, TEXTS
from steerwell.studies.synthesis.claims import claims_of
from steerwell.studies.synthesis.results import SynthesisResult
from steerwell.studies.tables import write_table
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example
from steerwell.synthesis.export import write_examples
from tests.reading import HOSTILE, Tables, markdown_tables

NAN = math.nan
LABELS = np.repeat([VIOLATING, BENIGN], 20)
BEATEN = {"a": (11, 12, 13, 14), "b": (15, 16, 17, 12)}  # benign examples of 20 that every violating one scores above
SUCCESS = {"a": (0.1, 0.3, 0.5, 0.9), "b": (0.2, 0.6, 0.8, 0.7)}
COHERENCE = {"a": (0.9, 0.8, 0.6, 0.1), "b": (0.9, 0.8, 0.9, 0.5)}
DIVERSITY = {"a": (0.9, 0.8, 0.7, 0.6), "b": (0.9, 0.85, 0.8, 0.7)}
DETAILS = ("mattr", "vendi", "compression", "cosine_distance", "cosine_distance_within", "distinct", "self_bleu")


def scores(beaten: float) -> np.ndarray:
    """Scores [3, 40] with AUROC beaten / 20: every violating example is above so many benign ones. NaN: untrained."""
    if math.isnan(beaten):
        return np.full((3, 40), NAN)
    return np.tile(np.concatenate([np.full(20, (beaten - 0.5) / 20), np.arange(20) / 20]), (3, 1))


def arm(name: str, source: str, beaten: float, validation: float = 0.5, **changes: Any) -> dict[str, Any]:
    """A row of the arms' table, with its planted AUROC."""
    row = {"arm": name, "source": source, "texts": 4, "blank": 0} | dict.fromkeys(DETAILS, 0.4)
    row |= {"success": NAN, "coherence": NAN, "diversity": 0.5} | changes
    axes = [row[axis] for axis in ("success", "coherence", "diversity")]
    row |= {"hm3": float(harmonic_mean(*axes)), "hm2": float(harmonic_mean(*axes[:2]))}
    return row | {"auroc_validation": validation, "auroc": beaten / 20, "auroc_seeds": [beaten / 20] * 3}


def arms(judged: bool = True, original: float = 14) -> list[dict[str, Any]]:
    """Eight steered configurations, b 2 the best on validation and b 3 by HM3; two prompted ones; controls."""
    rows = []
    for way, method in (("a", "swfc"), ("b", "stmp")):
        for at in range(4):
            changes = {"success": SUCCESS[way][at], "coherence": COHERENCE[way][at]} if judged else {}
            fields = {"method": method, "layer": 1, "strength": at + 1.0, "position": "all", "estimator": "logistic",
                      "pool": "response_mean", "diversity": DIVERSITY[way][at]}  # fmt: skip
            validation = 0.9 if (way, at) == ("b", 1) else 0.5
            rows.append(arm(f"{way} {at + 1}", "steered", BEATEN[way][at], validation, **fields | changes))
    said = {"success": 1.0, "coherence": 0.9} if judged else {}
    rows.append(arm("system prompt 0", "prompted", 15, 0.8, **said))
    rows.append(arm("system prompt 1", "prompted", 13, 0.6, **said))
    rows.append(arm("unsteered", "unsteered", 10, **said | ({"success": 0.05} if judged else {})))
    rows.append(arm("original, 3", "original", 11, texts=3))
    rows.append(arm("original", "original", original))
    return rows


def texts(rows: Sequence[dict[str, Any]], said: Sequence[str]) -> list[Example]:
    """Four texts per written set."""
    return [
        Example(f"asked {at}", said[at], VIOLATING, "c", row["source"], row["arm"], success=1.0, coherence=0.5)
        for row in rows
        if row["source"] != "original"
        for at in range(4)
    ]


def about(concept: str, **changes: Any) -> dict[str, Any]:
    """`cell.json`."""
    counts = {"violating": 20, "benign": 20}
    return {
        "model": "pilot",
        "concept": concept,
        "poles": {"aligned": "kind", "violating": "hostile"},
        "info": {"name": "pilot", "architecture": "Tiny", "n_layers": 2, "d_model": 8},
        "judge": "exact",
        "real": {"train": counts, "validation": counts, "test": counts},
        "prompts": {"asked": 4, "test": 40},
        "versions": {"steerwell": "0.1.0"},
        "probe": {"reading": "logistic-response_mean", "layer": 1, "scores": scores(18)[0].tolist()},
        "encoders": [],
    } | changes


def write_cell(folder: Path, told: dict[str, Any], rows: list[dict[str, Any]], said: Sequence[str]) -> SynthesisResult:
    """A finished cell."""
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(told), encoding="utf-8")
    write_table(folder / ARMS, rows)
    write_examples(folder / TEXTS, texts(rows, said))
    test = [Example(f"real {at}", f"{said[0]} {at}", int(label), "c") for at, label in enumerate(LABELS)]
    write_examples(folder / TEST, test)
    table = np.array([scores(20 * row["auroc"]) for row in rows], np.float32)
    save_file({"test": table, "labels": LABELS}, folder / SCORES)
    return SynthesisResult.load(folder)


SAID = ("You fool.", "You fool.", "Go away now.", "Fine.")


def encoders() -> list[dict[str, Any]]:
    """Three seeds of the best steered and the best prompted."""
    worth = {STEERED: (5, 19), PROMPTED: (8, 17)}
    return [
        {"role": role, "arm": at, "seed": seed, "scores": scores(beaten)[0].tolist()}
        for role, (at, beaten) in worth.items()
        for seed in range(3)
    ]


@pytest.fixture(autouse=True, scope="module")
def _few_resamples() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(analysis, "RESAMPLES", 200)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished cells, the second without judge, probe and encoders, and unmeasurable; a third is not finished."""
    folder = tmp_path_factory.mktemp("studies") / "made"
    folder.mkdir()
    concepts = ["hostility", "dishonesty", "sycophancy"]
    settings = {"study": "synthesis", "models": ["pilot"], "concepts": concepts, "texts": 4, "originals": 4, "few": [3],
                "encoders": {"concepts": ["hostility"]}, "prompting": {"shots": [0]}}  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    write_cell(folder / "pilot" / "hostility", about("hostility", encoders=encoders()), arms(), SAID)
    bare = arms(judged=False, original=11)
    bare[0] = bare[0] | {"auroc": NAN, "auroc_validation": NAN, "auroc_seeds": [NAN] * 3, "blank": 3}
    told = about("dishonesty", judge=None, probe=None)
    write_cell(folder / "pilot" / "dishonesty", told, bare, (HOSTILE, " ", "- x", "|`<b>"))
    return folder


@pytest.fixture(scope="module")
def written(study: Path) -> Any:
    return write_report(study)


@pytest.fixture(scope="module")
def text(written: Any) -> str:
    return written.text.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(written: Any) -> str:
    return written.page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cell(study: Path) -> Cell:
    return Cell(SynthesisResult.load(study / "pilot" / "hostility"))


def tables_after(text: str, *headings: str) -> list[dict[str, dict[str, str]]]:
    """Every table below these headings, one after the other: by the row's first entry, then by the column's name."""
    for heading in headings:
        text = text.split(f"\n{heading}\n", 1)[1]
    return [
        {line[0]: dict(zip(head, line, strict=True)) for line in body} for head, *body in markdown_tables(text) if head
    ]


# Figures -------------------------------------------------------------------------------------------------------------


def test_the_overview_by_hand(text: str) -> None:
    found = tables_after(text, "## Overview")[0]["pilot, hostility"]
    shown = {name: value.split()[0] for name, value in found.items()}
    assert shown["originals"] == "0.700"
    assert found["few originals"] == "3: 0.550"
    assert shown["unsteered"] == "0.500"
    assert shown["best prompted"] == "0.750"
    assert shown["best steered"] == "0.800"
    assert shown["steered by HM3"] == "0.850"
    assert shown["steered less prompted"] == "0.050"
    assert found["beat prompting"] == "2 of 8"  # 16 and 17 of 20, prompting has 15
    assert shown["probe"] == "0.900"


def test_the_detectors_by_hand(text: str) -> None:
    found, compared = tables_after(text, "## pilot, hostility", "### Detectors")[:2]
    steered = found["steered, best on validation b 2"]
    assert steered["AUROC, test"].split()[0] == "0.800"
    assert steered["by seed"] == "0.800 to 0.800"
    assert [steered[name] for name in ("S", "C", "D", "HM3", "texts")] == ["0.60", "0.80", "0.85", "0.73", "4"]
    assert steered["AUROC, validation"] == "0.900"
    assert steered["encoder: AUROC, test"].split()[0] == "0.950"
    assert found["original"]["S"] == found["original"]["HM3"] == "n/a"
    assert found["probe logistic-response_mean, layer 1"]["AUROC, test"].split()[0] == "0.900"
    assert compared["best steered less best prompted"]["difference"].split()[0] == "0.050"
    assert compared["steered by HM3 less best prompted"]["difference"].split()[0] == "0.100"
    assert compared["best steered less unsteered"]["difference"].split()[0] == "0.300"
    assert compared["best steered less originals"]["difference"].split()[0] == "0.100"
    encoded = compared["best steered less best prompted, fine-tuned encoders"]
    assert encoded["difference"].split()[0] == "0.100"


def test_encoders_have_a_table_where_they_were_trained(text: str) -> None:
    found = tables_after(text, "## Overview")[1]
    assert list(found) == ["pilot, hostility"]
    assert found["pilot, hostility"][STEERED].split()[0] == "0.950"
    assert found["pilot, hostility"]["best steered less best prompted"].split()[0] == "0.100"


def test_roles_and_figures_are_those_of_the_analysis(cell: Cell, text: str) -> None:
    assert [cell.result.arms[cell.roles[role]]["arm"] for role in (STEERED, BY_HM3, PROMPTED)] == [
        "b 2",
        "b 3",
        "system prompt 0",
    ]
    regrets = tables_after(text, "## What foretells AUROC")[1]["pilot, hostility"]
    found = {item.rule: item.regret for item in selections(cell.result)}
    assert found["at random"] == pytest.approx(0.85 - np.mean([*BEATEN["a"], *BEATEN["b"]]) / 20)
    assert regrets["HM3"] == f"{found['hm3']:.3f}" == "0.000"
    assert regrets["validation AUROC"] == f"{found['validation AUROC']:.3f}" == "0.050"
    assert regrets["at random"] == f"{found['at random']:.3f}"
    picks = tables_after(text, "## pilot, hostility", "### The best configurations")[1]
    assert picks["HM3"]["configuration"] == "b 3"
    diverse = tables_after(text, "## Does diversity help?")[0]["pilot, hostility"]
    told = falsifier(cell.result)
    assert diverse["pairs"] == str(len(told.pairs))
    assert diverse["D and AUROC, S and C held fixed"].split()[0] == f"{told.partial.estimate:.2f}"


def test_correlations_by_another_way(text: str) -> None:
    found = tables_after(text, "## What foretells AUROC")[0]["hostility"]
    beaten = [*BEATEN["a"], *BEATEN["b"]]
    for name, planted in (("S", SUCCESS), ("C", COHERENCE), ("D", DIVERSITY)):
        rho = stats.spearmanr([*planted["a"], *planted["b"]], beaten).statistic
        assert found[name].split()[0] == f"{rho:.2f}"
    assert (found["models"], found["configurations"]) == ("1", "8")


def test_the_best_configurations_in_their_order(text: str) -> None:
    found = tables_after(text, "## pilot, hostility", "### The best configurations")[0]
    assert found["steered by validation, 1"]["configuration"] == "b 2"
    assert found["steered by HM3, 1"]["configuration"] == "b 3"
    assert [found[f"prompted by validation, {at}"]["AUROC, test"] for at in (1, 2)] == ["0.750", "0.650"]


def test_the_card_by_hand(text: str) -> None:
    found = tables_after(text, "## pilot, hostility", "### Data quality")[0]
    steered = found["all steered"]
    counted = ("sets", "n", "blank", "prompts in a set", "repeated exactly", "words, mean")
    assert [steered[name] for name in counted] == ["8", "32", "0", "4", "8", "2.0"]  # 2, 2, 3 and 1 words
    assert steered["S"] == "0.51 0.10 to 0.90"
    assert (steered["prompts in test"], steered["texts in test"]) == ("0", "0")
    assert found["original"]["words, mean"] == "n/a"  # originals are not kept
    assert found["real test, violating"]["n"] == "20"


def test_what_the_test_set_has_too_is_counted(tmp_path: Path) -> None:
    from steerwell.studies.report.synthesis.card import card

    result = write_cell(tmp_path / "c", about("c"), arms(), SAID)
    test = [Example("ASKED  1", "go away  NOW.", VIOLATING), Example("real", "Fine", BENIGN)]
    write_examples(tmp_path / "c" / TEST, test)
    found = {line[0]: line for line in markdown_tables(card(Cell(result)))[0]}
    assert found["unsteered"][7:9] == ["1", "1"]


# What is missing -----------------------------------------------------------------------------------------------------


def test_missing_values_are_not_zero(text: str) -> None:
    found = tables_after(text, "## pilot, dishonesty", "### Detectors")[0]
    assert [found[f"{STEERED} b 2"][name] for name in ("S", "C", "HM3")] == ["n/a"] * 3
    assert BY_HM3 not in found
    assert not any(name.startswith("probe") for name in found)
    assert "encoder: AUROC, test" not in found["unsteered"]
    first = next(line for name, line in tables_after(text, "## Overview")[0].items() if "dishonesty" in name)
    assert first["steered by HM3"] == first["probe"] == "n/a"
    assert first["beat prompting"] == "2 of 7"  # one was not trained
    assert "hm3.svg" not in text.split("\n## pilot, dishonesty\n")[1]
    assert "tradeoff-1.svg" in text.split("\n## pilot, dishonesty\n")[1]


def test_what_is_not_measurable_is_marked_and_left_out(text: str, written: Any) -> None:
    why = "detectors trained on originals have AUROC 0.550, outside 0.60 to 0.97"
    assert [item.unmeasurable for item in written.cells] == [None, why]
    assert f"**Not measurable:** {why}." in text
    names = list(tables_after(text, "## Overview")[0])
    assert names == ["pilot, hostility", "pilot, dishonesty – not measurable"]
    correlated, regrets = tables_after(text, "## What foretells AUROC")[:2]
    assert list(correlated) == ["hostility"]
    assert list(regrets) == ["pilot, hostility"]
    assert tables_after(text, "## Does diversity help?")[0]["pilot, dishonesty"]["verdict"] == "– not measurable"


def test_cells_that_are_not_finished_are_named(written: Any, text: str) -> None:
    assert written.unfinished == ("pilot, sycophancy",)
    assert "1 of 3 cells are not finished" in text
    assert "\n## pilot, sycophancy\n" not in text


def test_failures_are_told(study: Path, tmp_path: Path) -> None:
    cells = [Cell(SynthesisResult.load(study / "pilot" / name)) for name in ("hostility", "dishonesty")]
    found = [failures(cell, (), at) for at, cell in enumerate(cells)]
    assert found[0] == []
    assert found[1][0].startswith("Not measurable: detectors trained on originals have AUROC 0.550")
    assert found[1][1:] == [
        "No judge: success and coherence are missing, and HM3 with them.",
        "No detector learns from 1 of 8 steered sets: they hold fewer than two texts.",
    ]
    rows = arms()
    for row in rows:
        if row["source"] == "prompted":
            row |= {"auroc": 1.0, "auroc_seeds": [1.0] * 3}
        if row["arm"] == "b 3":
            row |= {"auroc": 0.4, "auroc_seeds": [0.4] * 3}
        if row["arm"] == "a 1":
            row["blank"] = 2
    told = "\n".join(failures(Cell(write_cell(tmp_path / "c", about("c"), rows, ("x", "x", "x", "y"))), (), 0))
    assert "1 of 8 steered sets are blank for 10% of their texts or more." in told
    assert "8 of 8 steered sets repeat themselves in half of their texts or more, at worst 2 different texts" in told
    assert "train worse detectors than the best prompted ones: AUROC difference -0.200" in told
    assert "HM3 picks a configuration 0.400 AUROC below the best one." in told
    assert "What HM3 picks is no better than the mean configuration." in told
    broken = claims_of([cells[0].result])
    failing = [claim.name for claim in broken if claim.findings[0].holds is False]
    assert failing
    assert failures(cells[0], broken, 0)[-1] == f"Claims that fail: {', '.join(failing)}."


def test_texts_added_to_originals_are_compared_with_these_alone(cell: Cell) -> None:
    added = Cell(cell.result, kept=3)
    assert added.base == "original, 3"
    assert added.difference(STEERED, added.base).estimate == pytest.approx(0.25)
    assert added.difference(PROMPTED, added.base).estimate == pytest.approx(0.2)
    assert cell.base == "original"
    assert Cell(cell.result, kept=4).base == "original"  # all of them are kept


# The page ------------------------------------------------------------------------------------------------------------


def test_hostile_texts_change_nothing_but_the_text(page: str, text: str) -> None:
    found = Tables(page)
    assert not {"script", "iframe", "link", "object"} & {tag for tag, _ in found.tags}
    assert all(attrs["src"].startswith("data:image/") for tag, attrs in found.tags if tag == "img")
    answers = next(item for item in found.found if "alert" in item[1][0] and STEERED in item[0][0])
    assert [len(line) for line in answers] == [3, 3, 3]  # steered, prompted, unsteered
    assert "<script>alert(1)</script>" in answers[1][0]
    real = next(item for item in found.found if item[0] == ["prompt", "response"] and "alert" in item[1][1])
    assert len(real) == 5
    assert "<script" not in text
    assert "an empty answer" in page


def test_both_forms_hold_the_same_tables(text: str, page: str) -> None:
    of_page = [[[cell.split() for cell in line] for line in item] for item in Tables(page).found]
    of_text = [[[cell.split() for cell in line] for line in item] for item in markdown_tables(text)]
    assert len(of_text) > 20
    assert of_page == of_text


def test_the_page_needs_nothing_else(page: str) -> None:
    found = Tables(page)
    addresses = [attrs[name] for _, attrs in found.tags for name in ("src", "href") if attrs.get(name)]
    assert all(address.startswith(("#", "data:image/")) for address in addresses)
    names = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert {address[1:] for address in addresses if address.startswith("#")} <= names


def test_figures_are_beside_the_text(written: Any, text: str) -> None:
    names = re.findall(r"!\[[^]]+\]\((figures/[^)]+)\)", text)
    assert len(names) == len(set(names))
    assert {Path(name).name for name in names} == {path.name for path in (written.text.parent / "figures").iterdir()}
    own = {Path(name).name for name in names if "1-pilot-hostility" in name}
    kinds = ("tradeoff-1", "tradeoff-2", "cloud-success-coherence", "cloud-success-diversity", "hm3")
    assert own == {f"1-pilot-hostility-{kind}.svg" for kind in kinds}
    assert {"figures/overview.svg", "figures/hm3-hostility.svg"} <= set(names)


def test_claims_and_headline_are_the_analysis_own(study: Path, text: str) -> None:
    cells = [SynthesisResult.load(study / "pilot" / name) for name in ("hostility", "dishonesty")]
    claims = claims_of(cells)
    listed = markdown_tables(text.split("\n## The paper's claims\n")[1])[0][1:]
    for claim, line in zip(claims, listed, strict=True):
        holds, measured = claim.tally
        assert line[0].endswith(f"{holds} of {measured}" if measured else "not measured")
    surely = int(overview(Cell(cells[0])).difference.low > 0)
    assert f"**In {surely} of 1 measurable cells" in text
    assert "Picking by HM3, without any detector, gives away 0.000 AUROC" in text


def test_the_command_says_the_result(run, study: Path, tmp_path: Path) -> None:
    code, out, err = run("report", study, "-o", tmp_path / "there")
    assert code == 0, err
    assert out.startswith("pilot, hostility: AUROC 0.700 originals, 0.500 unsteered, 0.750 prompted, 0.800 steered")
    assert "not measurable: detectors trained on originals" in out
    assert "pilot, sycophancy: not finished" in out
    code, out, err = run("report", study, "-o", tmp_path / "there", "--json")
    assert code == 0, err
    found = json.loads(out)["cells"]
    assert found[0]["steered"]["estimate"] == pytest.approx(0.8)
    assert found[1]["by_hm3"]["estimate"] is None
