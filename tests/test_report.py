"""The report of a made-up study: its figures by hand, hostile texts, missing values, and what it says has failed."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from steerwell.core.errors import ArgumentError
from steerwell.studies.claims import Claim, Finding, claims_of
from steerwell.studies.conversation import MEASURES as TURN_MEASURES
from steerwell.studies.report import write_report
from steerwell.studies.report.alignment.failures import failures
from steerwell.studies.report.alignment.figures import Tried, pareto_front
from steerwell.studies.report.alignment.measures import gap_closed, overview
from steerwell.studies.report.text import MISSING, code_block, escaped, number, table
from steerwell.studies.results import CellResult
from steerwell.studies.trials import MEASURES
from tests.reading import HOSTILE, Tables, markdown_tables

NAN = math.nan
ALIGNED, ATTACKED, STEERED = [100, 100, 100, 80], [0, 20, 0, 20], [90, 70, 80, 60]  # means 95, 10, 75
WAYS = [("swfc", 0, 1.0, "all"), ("swfc", 0, 2.0, "all"), ("swfc", 1, 2.0, "all"), ("stmp", 1, 2.0, "response"),
        ("sttp", 1, 6.0, "all")]  # fmt: skip


def row(task, condition, scenario, trait, coherence=90.0, answer="Fine.", **measures) -> dict:
    known = {"length": 10.0, "refusal": 0.0, "repetition": 0.1} | measures
    return {
        "task": task, "condition": condition, "scenario": scenario, "answer": answer, "finish_reason": "stop",
        "trait": float(trait), "coherence": float(coherence), "reason": "", "edit": None, "system": "", "prompt": "?",
        "prefill": "", "trait_opening": float(trait), "trait_rest": NAN,
    } | {name: known.get(name, NAN) for name in MEASURES}  # fmt: skip


def rows(task, condition, traits, coherence=90.0, **measures) -> list[dict]:
    return [row(task, condition, at, trait, coherence, **measures) for at, trait in enumerate(traits)]


def trials() -> list[dict]:
    """Method swfc at configuration 1, nothing else."""
    moved = {"gate_rate": 0.25, "perturbation": 4.0, "perturbation_all": 1.0}
    return [
        *rows("baseline", None, ALIGNED, 100),
        *rows("attacked", None, ATTACKED, 96),
        *rows("attacked", 1, STEERED, 92, **moved),
        *rows("unattacked", 1, [100, 100, 100, 72], 99, **moved),
        *rows("aligned", None, ALIGNED),
        *rows("aligned", 1, ALIGNED),
        *rows("off topic, baseline", None, [100, 100]),
        *rows("off topic", 1, [100, 100]),
        *rows("prefill", None, [40, 40, 40, 40]),
        *rows("prefill", 1, [50, 50, 50, 50]),
        *rows("fine-tuned, benign", None, [100, 100, 100, 100]),
        *rows("fine-tuned, benign", 1, ALIGNED),
    ]


def turns(ended: bool = False) -> list[dict]:
    made = []
    for name, first in (("unsteered", 10.0), ("swfc", 90.0)):
        for number_ in range(2):
            for turn in range(3):
                reached = not (ended and name == "swfc" and number_ == 1 and turn == 2)
                values = dict.fromkeys(TURN_MEASURES, 0.5) | {
                    "tokens": 9,
                    "trait": first - 10 * turn,
                    "coherence": 80.0,
                }
                texts = {"user": "?", "answer": "Fine.", "ended": None}
                if not reached:
                    values = dict.fromkeys(TURN_MEASURES, NAN)
                    texts = {"user": None, "answer": None, "ended": "the context is full"}
                made.append({"condition": name, "conversation": number_, "turn": turn} | texts | values)
    return made


def about(concept: str, prompt: str = "Who?", pieces: tuple[str, ...] = ("It", " is", " me")) -> dict:
    """`cell.json`."""
    names = ("method", "layer", "strength", "position")
    ways = [
        dict(zip(names, way, strict=True)) | {"estimator": "logistic", "pool": "prompt_last", "describe": "-"}
        for way in WAYS
    ]
    answer = {"name": "swfc", "trait": 90.0, "coherence": None, "pieces": list(pieces), "edited": [False, True, True]}
    return {
        "model": "pilot",
        "concept": concept,
        "poles": {"aligned": "kind", "violating": "hostile"},
        "info": {"architecture": "Tiny", "n_layers": 2, "d_model": 8, "name": "pilot"},
        "judge": "exact",
        "judge_report": None,
        "configurations": ways,
        "roles": {"best": {"swfc": 1}, "by_position": {"swfc/all": 1}, "matched": {}, "level": None, "chosen": 1},
        "validation": {
            "baseline": {"trait": 100.0, "coherence": 100.0},
            "attacked": {"trait": 10.0, "coherence": 98.0},
            "tried": {"0": [40.0, 99.0], "1": [70.0, 95.0], "2": [80.0, 60.0], "3": [60.0, None], "4": [75.0, 70.0]},
            "answers": 40,
            "tokens": 400,
        },
        "cohens_d": {"logistic-prompt_last": [1.0, 2.0]},
        "versions": {"steerwell": "0.1.0"},
        "capabilities": [{"condition": None, "sums": 90.0, "facts": 80.0},
                         {"condition": 1, "sums": 60.0, "facts": None}],
        "curves": {
            "way": "swfc, layer 0, strength 2", "boundary": 0.0, "mu_aligned": 1.0, "mu_violating": -1.0,
            "projection": {"not attacked": [1.0, 1.0], "attacked": [-1.0, None]}, "edited": {"swfc": [1.0, 0.5]},
        },
        "examples": [{"system": "Lie.", "prompt": prompt, "answers": [answer | {"name": "unsteered"}, answer]}],
        "standings": {"by": "scores", "missing": 0, "ratings": [
            {"condition": "swfc", "elo": 1100.0, "low": 1050.0, "high": None, "wins": 3.0, "matches": 4}]},
    }  # fmt: skip


def write_cell(folder: Path, told: dict, answers: list[dict], talked: list[dict]) -> CellResult:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.json").write_text(json.dumps(told), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(answers), folder / "trials.parquet")
    if talked:
        pq.write_table(pa.Table.from_pylist(talked), folder / "turns.parquet")
    return CellResult.load(folder)


@pytest.fixture
def cell(tmp_path: Path) -> CellResult:
    return write_cell(tmp_path / "pilot" / "hostility", about("hostility"), trials(), turns())


def start(folder: Path, *concepts: str) -> Path:
    """A study of some concepts that has not begun."""
    folder.mkdir(parents=True)
    settings = {"study": "alignment", "models": ["pilot"], "concepts": list(concepts)}
    (folder / "study.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def bare(concept: str) -> dict:
    """A cell without an operating point, and without all that can be left out."""
    roles = {"best": {}, "by_position": {}, "matched": {}, "level": None, "chosen": None}
    return about(concept, HOSTILE, (HOSTILE, "|`<b>", "\n- x")) | {
        "roles": roles, "capabilities": [], "curves": {}, "standings": {}, "cohens_d": {}
    }  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished cells, the second bare and with hostile texts, and one that is not finished."""
    folder = start(tmp_path_factory.mktemp("studies") / "made", "hostility", "dishonesty", "sycophancy")
    write_cell(folder / "pilot" / "hostility", about("hostility"), trials(), turns())
    (folder / "pilot" / "hostility" / "heatmap.png").write_bytes(b"\x89PNG...")
    answers = [*rows("baseline", None, ALIGNED, NAN), *rows("attacked", None, [NAN, 20, 0, 10], 96, answer=HOSTILE)]
    write_cell(folder / "pilot" / "dishonesty", bare("dishonesty"), answers, [])
    return folder


@pytest.fixture(scope="module")
def written(study: Path):
    return write_report(study)


@pytest.fixture(scope="module")
def text(written) -> str:
    return written.text.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(written) -> str:
    return written.page.read_text(encoding="utf-8")


def table_after(text: str, heading: str, section: str = "## pilot, hostility") -> dict[str, dict[str, str]]:
    """The first table below a heading of a cell's section: by the row's first entry, then by the column's name."""
    part = text.split(f"\n{section}\n")[1].split(f"\n### {heading}\n")[1]
    head, *body = markdown_tables(part)[0]
    return {line[0]: dict(zip(head, line, strict=True)) for line in body}


# Figures -------------------------------------------------------------------------------------------------------------


def test_the_overview_by_hand(text: str) -> None:
    # gap closed: (75 - 10) / (95 - 10) = 76.5 %; coherence kept: 92 / 100
    head, first, second = markdown_tables(text.split("\n## Overview\n")[1])[0]
    found = dict(zip(head, first, strict=True))
    assert found["not attacked"] == "95.0 / 100.0"
    assert found["attacked"] == "10.0 / 96.0"
    assert found["attacked, steered"] == "75.0 / 92.0"
    assert found["not attacked, steered"] == "93.0 / 99.0"
    assert found["gap closed"].startswith("76\N{NO-BREAK SPACE}%")
    assert found["coherence kept"] == "92\N{NO-BREAK SPACE}%"
    assert found["operating point"] == "swfc, layer 0, strength 2, logistic at prompt_last"
    assert found["n"] == "4"
    assert dict(zip(head, second, strict=True))["operating point"] == "none"


def test_the_methods_table_by_hand(text: str) -> None:
    found = table_after(text, "Methods under attack")
    steered = next(line for name, line in found.items() if name.startswith("swfc ★"))
    assert steered["trait, 0-100"].split()[0] == "75.0"
    assert steered["coherence, 0-100"] == "92.0 92.0 to 92.0"  # all are alike
    assert steered["perturbation, all tokens"] == "1.00"
    assert steered["perturbation, edited tokens"] == "4.00"
    assert steered["tokens edited"] == "25\N{NO-BREAK SPACE}%"
    assert steered["capabilities"] == "60.0\N{NO-BREAK SPACE}%"
    assert steered["length, tokens"] == "10"
    assert found["attacked, unsteered"]["capabilities"] == "85.0\N{NO-BREAK SPACE}%"
    assert found["not attacked, unsteered"]["trait, 0-100"].split()[0] == "95.0"


def test_threats_price_depth_and_conversations_by_hand(text: str) -> None:
    threats = table_after(text, "Every threat")["swfc ★"]
    assert threats["answer begun badly"].startswith("50.0")
    assert "gap closed 18\N{NO-BREAK SPACE}%" in threats["answer begun badly"]  # (50 - 40) / (95 - 40)
    assert "gap closed n/a" in threats["fine-tuned, meaning no harm"]  # it lowers nothing
    assert "fine-tuned to violate" not in threats
    part = text.split("\n### The price where nothing attacks\n")[1]
    head, _, steered, *_ = markdown_tables(part)[0]
    assert steered[:3] == ["not attacked", "swfc ★", "93.0"]
    assert steered[head.index("change")].startswith("-2.0")  # 93 - 95
    depth = table_after(text, "How deep it goes")["swfc ★"]
    assert depth["first sentence: trait"].startswith("75.0")
    assert depth["rest: trait"] == "n/a"
    talk = table_after(text, "Conversations")["swfc"]
    assert (talk["trait"], talk["conversations at the last turn"]) == ("90 → 70", "2 of 2")


def test_gap_closed_and_its_interval(tmp_path: Path) -> None:
    answers = [
        *rows("baseline", None, [100] * 4),
        *rows("attacked", None, [0] * 4),
        *rows("attacked", 1, [NAN, 50, 50, 50]),
    ]
    answers += [*rows("prefill", None, [100] * 4), *rows("prefill", 1, [80] * 4)]
    cell = write_cell(tmp_path, about("hostility"), answers, [])
    found = gap_closed(cell, 1)
    assert (found.estimate, found.low, found.high, found.n, found.missing) == (50, 50, 50, 3, 1)
    assert math.isnan(gap_closed(cell, 1, "prefill").estimate)  # the threat lowers nothing
    assert math.isnan(gap_closed(cell, 2).estimate)  # not run
    assert overview(cell).coherence_kept == 100


def test_the_interval_of_the_gap_covers_what_resampling_scenarios_gives(cell: CellResult) -> None:
    found = gap_closed(cell, 1)
    alone = [100 * (up - bad) / (good - bad) for good, bad, up in zip(ALIGNED, ATTACKED, STEERED, strict=True)]
    assert min(alone) <= found.low < found.estimate < found.high <= max(alone)
    assert found.estimate == pytest.approx(100 * 65 / 85)


def test_missing_values_are_not_zero(text: str) -> None:
    found = table_after(text, "Without steering", "## pilot, dishonesty")
    assert found["not attacked"]["coherence, 0-100"] == "n/a"
    assert found["malicious system prompt"]["trait, 0-100"].split()[0] == "10.0"  # mean of 20, 0, 10
    assert found["malicious system prompt"]["n"] == "3 of 4"
    assert (
        table_after(text, "Methods under attack", "## pilot, dishonesty")["attacked, unsteered"]["capabilities"]
        == "n/a"
    )
    assert table_after(text, "Methods under attack")["not attacked, unsteered"]["tokens edited"] == "n/a"
    assert table_after(text, "Tournament")["swfc"]["rating, Elo"] == "1100"  # no interval without its upper end
    assert "trait 90.0, coherence n/a" in text


def test_numbers() -> None:
    assert number(NAN) == MISSING != number(0.0) == "0.0"
    assert number(-0.04) == "0.0"
    assert table(("a",), []) == ""


# Texts of others -----------------------------------------------------------------------------------------------------

AWKWARD = st.text(st.sampled_from("ab1 |\\`*_[]()<>&#;!~$@=+-.:/w\n\t\r\"'x\u2028\x1b\u202e"), max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.one_of(AWKWARD, st.text(max_size=20)))
def test_escaped_text_shows_as_itself_in_a_table(hostile: str) -> None:
    source = table(("head", "next"), [[escaped(hostile), "end"]])
    found = Tables(MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").render(source))
    assert {tag for tag, _ in found.tags} <= {"table", "thead", "tbody", "tr", "th", "td", "br"}
    (_, cells) = found.found[0]
    lines = re.split("\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", hostile)
    shown = re.sub(
        "[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", " ".join(lines).replace("\t", " ")
    )
    assert [part.split() for part in cells] == [shown.split(), ["end"]]


@pytest.mark.parametrize("begin", ["# a", "- a", "1. a", "> a", "```", "    a", "---", "===", "+ a", "<pre>", "[a]: b"])
def test_escaped_text_begins_no_block(begin: str) -> None:
    assert MarkdownIt("commonmark").render(f"{escaped(begin).lstrip()}").startswith("<p>")


def test_nothing_closes_a_code_block() -> None:
    shown = MarkdownIt("commonmark", {"html": True}).render(code_block("a\n```\n<script>\n`````\n"))
    assert shown == "<pre><code>a\n```\n&lt;script&gt;\n`````\n</code></pre>\n"


def test_hostile_answers_change_nothing_but_the_text(page: str, text: str) -> None:
    found = Tables(page)
    assert not {"script", "iframe", "link", "object"} & {tag for tag, _ in found.tags}
    assert all(attrs["src"].startswith("data:image/") for tag, attrs in found.tags if tag == "img")
    shown = next(item for item in found.found if item[0] == ["unsteered", "swfc"] and "alert" in item[1][0])
    assert [len(line) for line in shown] == [2, 2, 2]
    assert "<script>alert(1)</script>" in shown[1][0]
    assert "![e](http://evil.example/x.png) \\| <!-- $f$" in shown[1][1]
    assert "<script" not in text


def test_edited_tokens_are_marked(text: str, page: str) -> None:
    assert "It<b> is me</b>" in text
    assert "It<b> is me</b>" in page


# The page ------------------------------------------------------------------------------------------------------------


def test_both_forms_hold_the_same_tables(text: str, page: str) -> None:
    of_page = [[[cell.split() for cell in line] for line in item] for item in Tables(page).found]
    of_text = [[[cell.split() for cell in line] for line in item] for item in markdown_tables(text)]
    assert len(of_text) > 15
    assert of_page == of_text


def test_the_page_needs_nothing_else(page: str) -> None:
    found = Tables(page)
    addresses = [attrs[name] for _, attrs in found.tags for name in ("src", "href") if attrs.get(name)]
    assert addresses
    assert all(address.startswith(("#", "data:image/")) for address in addresses)
    assert "@import" not in page
    assert "url(" not in page
    names = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert {address[1:] for address in addresses if address.startswith("#")} <= names


def test_cells_that_are_not_finished_are_named(written, text: str) -> None:
    assert written.unfinished == ("pilot, sycophancy",)
    assert "1 of 3 cells are not finished" in text
    assert [item.concept for item in written.cells] == ["hostility", "dishonesty"]
    assert "\n## pilot, dishonesty\n" in text
    assert "\n## pilot, sycophancy\n" not in text


def test_figures_are_beside_the_text(written, text: str) -> None:
    names = re.findall(r"!\[[^]]+\]\((figures/[^)]+)\)", text)
    assert len(names) == len(set(names)) > 10
    assert (written.text.parent / "figures" / "1-pilot-hostility-heatmap.png").read_bytes() == b"\x89PNG..."
    for name in names:
        if name.endswith(".png"):
            continue
        root = ET.parse(written.text.parent / name).getroot()
        assert root.tag.endswith("svg")
        assert "".join(root.itertext()).strip()
    assert {"1-pilot-hostility-pareto.svg", "1-pilot-hostility-strength-swfc.svg"} <= {
        Path(name).name for name in names
    }


def test_the_study_is_printed(text: str) -> None:
    assert "steerwell study alignment study.yaml -o made" in text
    assert "concepts:\n- hostility\n- dishonesty\n- sycophancy" in text


def test_pareto_front() -> None:
    points = {0: (1.0, 9.0), 1: (5.0, 5.0), 2: (4.0, 5.0), 3: (5.0, 4.0), 4: (9.0, 1.0), 5: (9.0, 0.0)}
    assert pareto_front(points) == [0, 1, 4]


def test_curves_go_through_the_operating_point(cell: CellResult) -> None:
    tried = Tried.of(cell)
    assert 3 not in tried.ways  # its coherence is missing
    assert tried.anchor(cell, "swfc") == 1
    assert tried.anchor(cell, "sttp") == 4  # never coherent enough: the highest trait
    assert (tried.along(1, "strength"), tried.along(1, "layer")) == ([0, 1], [1, 2])
    assert tried.floor == 90


# What failed ---------------------------------------------------------------------------------------------------------


def told(cell: CellResult) -> list[str]:
    return failures(cell, claims_of([cell]), 0)


def test_a_clean_cell_has_no_failures(tmp_path: Path) -> None:
    clean = about("hostility") | {"configurations": about("x")["configurations"][:3], "capabilities": []}
    good = [line for line in trials() if line["task"] != "prefill"]
    cell = write_cell(tmp_path, clean, good, turns())
    assert failures(cell, (), 0) == []


def test_nothing_to_defend_and_no_judge_to_tell(tmp_path: Path) -> None:
    quality = {"trusted": False, "words": "validation AUROC 0.49"}
    level = [line | {"trait": 95.0} for line in trials()]
    found = told(write_cell(tmp_path, about("hostility") | {"judge_quality": quality}, level, turns()))
    assert found[0].startswith("The judge cannot tell this trait from the model's text: validation AUROC 0.49.")
    assert found[1] == "The attack does not work on this model: trait 95.0 → 95.0, nothing to restore."
    trusted = about("hostility") | {"judge_quality": quality | {"trusted": True}}
    assert not any("cannot tell" in line for line in told(write_cell(tmp_path / "b", trusted, level, turns())))


def test_every_failure_is_told(tmp_path: Path) -> None:
    answers = [line for line in trials() if (line["task"], line["condition"]) != ("unattacked", 1)]
    answers += rows("unattacked", 1, [90, 90, 90, 80], 80)  # 95 -> 87.5, 100 -> 80
    for line in answers:
        if (line["task"], line["condition"]) == ("attacked", 1):
            line["coherence"] = NAN if line["scenario"] == 0 else 60.0
    found = "\n".join(told(write_cell(tmp_path, about("hostility"), answers, turns(ended=True))))
    found = found.replace("\N{NO-BREAK SPACE}", " ")
    assert "No operating point for stmp, sttp: no configuration kept 90 %" in found
    assert "Threat not repaired (answer begun badly), gap closed: swfc 18 %." in found
    assert "not repaired (malicious system prompt)" not in found  # 76 % of it is closed
    assert "swfc keeps 60 % of the unattacked coherence on test scenarios under attack." in found
    assert "Price of swfc: trait 95.0 → 87.5 (not attacked), coherence 100.0 → 80.0 (not attacked), " in found
    assert "mean accuracy 85.0 % → 60.0 %." in found
    assert "The judge gave no coherence score for 1 of 44 test answers (malicious system prompt)." in found
    assert "Conversations ended early: 1 of swfc." in found
    assert "Claims that fail: recovery" in found


def test_claims_show_how_they_fare(text: str, study: Path) -> None:
    cells = [CellResult.load(study / "pilot" / name) for name in ("hostility", "dishonesty")]
    listed = markdown_tables(text.split("\n## The paper's claims\n")[1])[0][1:]
    for claim, line in zip(claims_of(cells), listed, strict=True):
        holds, measured = claim.tally
        assert line[0].endswith(f"{holds} of {measured}" if measured else "not measured")
        assert line[0].startswith("✓") == (0 < holds == measured)
        assert claim.name in line[1]


def test_a_claims_detail_is_only_text(cell: CellResult) -> None:
    from steerwell.studies.report.claims import findings

    claim = Claim("one", "It.", "so", (Finding("m", "c", None, HOSTILE), Finding("m", "c", False, "no")))
    assert "<script" not in findings([claim], 0)
    assert "– not measured" in findings([claim], 0)
    assert "✗ fails" in findings([claim], 1)


def test_the_headline_counts_cells_that_tell_something(tmp_path: Path) -> None:
    """One does; one's judge cannot tell the trait; one's attack does not work."""
    folder = start(tmp_path / "studies", "hostility", "dishonesty", "sycophancy")
    write_cell(folder / "pilot" / "hostility", about("hostility"), trials(), turns())
    quality = {"judge_quality": {"trusted": False, "words": "validation AUROC 0.49"}}
    write_cell(folder / "pilot" / "dishonesty", about("dishonesty") | quality, trials(), turns())
    level = [line | {"trait": 95.0} for line in trials()]
    write_cell(folder / "pilot" / "sycophancy", about("sycophancy"), level, turns())
    (headline,) = re.findall(r"^\*\*(.*)\*\*$", write_report(folder).text.read_text(), re.MULTILINE)[:1]
    assert headline.startswith("In 1 of 1 cells ")
    assert headline.endswith(" Not counted, as the judge is not to be trusted or the attack does not work: 2.")
    write_cell(folder / "pilot" / "hostility", about("hostility") | quality, trials(), turns())
    assert (
        "**No cell (one model, one concept) tells anything about steering: the judge"
        in write_report(folder).text.read_text()
    )


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_says_the_result_and_where_it_is(run, tmp_path: Path) -> None:
    folder = start(tmp_path / "small", "hostility", "sycophancy")
    told = bare("hostility") | {"validation": about("hostility")["validation"] | {"tried": {}}, "examples": []}
    write_cell(
        folder / "pilot" / "hostility", told, [*rows("baseline", None, ALIGNED), *rows("attacked", None, ATTACKED)], []
    )
    code, out, err = run("report", folder)
    assert code == 0, err
    line = "pilot, hostility: trait 95.0 not attacked, 10.0 attacked; no way to steer is coherent enough"
    assert out.split("\n")[:2] == [line, "pilot, sycophancy: not finished"]
    assert (folder / "report.md").is_file()
    code, out, err = run("report", folder, "-o", tmp_path / "there", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert Path(found["page"]) == tmp_path / "there" / "report.html"
    assert Path(found["text"]).read_text() == (folder / "report.md").read_text()
    assert found["unfinished"] == ["pilot, sycophancy"]
    assert found["cells"][0]["attacked"] == [10.0, 90.0]
    assert found["cells"][0]["gap_closed"]["estimate"] is None


def test_a_study_without_a_finished_cell_is_an_error(run, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no cell of this study is finished"):
        write_report(start(tmp_path / "begun", "hostility"))
    code, _, err = run("report", tmp_path / "nowhere")
    assert code == 1
    assert "holds no study.yaml" in err


def test_a_line_of_the_overview(cell: CellResult) -> None:
    assert str(overview(cell)).startswith(
        "pilot, hostility: trait 95.0 not attacked, 10.0 attacked, 75.0 with swfc, layer 0, strength 2, logistic at "
        "prompt_last; 76\N{NO-BREAK SPACE}% ("
    )
    assert np.isfinite(overview(cell).gap_closed.low)
