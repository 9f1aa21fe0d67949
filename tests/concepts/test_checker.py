"""Every fault of a concept file is told with its line, its field and a fix; nothing crashes the check."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerwell.concepts import Concept, Fault, check_concept, load_concept
from steerwell.core.errors import ConceptError

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Line numbers of this text are asserted below.
GOOD = """\
schema: 1
concept: made
language: english
title: Made up
description: Whether a test is served.
poles: {aligned: good, violating: bad}
pairs:
  - aligned: Be good.
    violating: Be bad.
  - aligned: Act well.
    violating: Act badly.
malicious:
  - Ruin it.
neutral_system:
  - ""
neutral_prompts:
  - Name a colour.
train:
  - {id: t1, category: a, prompt: One.}
  - {id: t2, category: a, prompt: Two.}
  - id: t3
    category: b
    prompt: Three.
    aligned: Be very good.
    violating: Be very bad.
  - {id: t4, category: b, prompt: Four.}
validation:
  - {id: v1, category: a, prompt: Five.}
test:
  - {id: e1, category: a, prompt: Six.}
rubric:
  trait: How good?
  coherence: How coherent?
"""


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


@pytest.fixture
def check(tmp_path: Path):
    """A function: (old, new) changes of the good file -> its errors. Warnings of size are left out."""

    def errors(*changes: tuple[str, str]) -> list[Fault]:
        text = GOOD
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "made.yaml"
        path.write_text(text, encoding="utf-8")
        found = [fault for fault in check_concept(path) if fault.severity == "error"]
        if found:
            with pytest.raises(ConceptError) as told:
                load_concept(path)
            assert all(str(fault) in str(told.value) for fault in found)
        else:
            load_concept(path)
        return found

    return errors


def test_a_good_file_loads(check) -> None:
    assert check() == []


CASES = {
    "missing field": (("title: Made up\n", ""), 1, "title", "is missing", "add this field"),
    "missing field of a scenario": (
        ("{id: t2, category: a, prompt: Two.}", "{id: t2, category: a}"),
        20,
        "train[1].prompt",
        "is missing",
        "add this field",
    ),
    "misspelt field": (("neutral_prompts:", "neutral_promts:"), 16, "neutral_promts", "is no field", "neutral_prompts"),
    "misspelt field of a pair": (("- aligned: Act", "- alined: Act"), 10, "pairs[1].alined", "is no field", "aligned"),
    "misspelt field of a scenario": (
        ("    category: b\n", "    categry: b\n"),
        22,
        "train[2].categry",
        "is no field",
        "id, category, prompt, aligned, violating, reference",
    ),
    "misspelt field of the rubric": (
        ("  trait: How", "  traits: How"),
        32,
        "rubric.traits",
        "is no field",
        "trait, coherence",
    ),
    "number for text": (("title: Made up", "title: 7"), 4, "title", "is a number, not text", "in quotes"),
    "yes for text": (("title: Made up", "title: yes"), 4, "title", "is yes or no, not text", "in quotes"),
    "date for text": (("title: Made up", "title: 2001-02-03"), 4, "title", "is a date, not text", "in quotes"),
    "nothing for text": (("title: Made up", "title:"), 4, "title", "is empty, not text", "write text"),
    "text for a list": (("pairs:\n", "pairs: Be good.\nx:\n"), 7, "pairs", "is text, not a list", "- ..."),
    "text for a record": (
        ("- {id: t2, category: a, prompt: Two.}", "- Two."),
        20,
        "train[1]",
        "is text, not a mapping",
        "field: value",
    ),
    "list for a record": (("{aligned: good, violating: bad}", "[good]"), 6, "poles", "is a list, not", "field: value"),
    "blank text": (("title: Made up", 'title: "  "'), 4, "title", "is blank", "write some text"),
    "blank list item": (("- Ruin it.", '- ""'), 13, "malicious[0]", "is blank", "write some text"),
    "half a pair of a scenario": (
        ("    violating: Be very bad.\n", ""),
        21,
        "train[2]",
        "without the other",
        "give both or leave both out",
    ),
    "half a pair": (("    violating: Act badly.\n", ""), 10, "pairs[1].violating", "is missing", "add this field"),
    "equal pair": (("Act badly.", "Act well."), 10, "pairs[1]", "says the same", "two different texts"),
    "equal pair but for blanks": (("Act badly.", "' Act well. '"), 10, "pairs[1]", "says the same", "two different"),
    "equal pair of a scenario": (("Be very bad.", "Be very good."), 21, "train[2]", "says the same", "two different"),
    "unknown schema": (("schema: 1", "schema: 2"), 1, "schema", "is not 1", "write 1"),
    "odd name": (("concept: made", "concept: Made-up"), 2, "concept", "is no plain name", "lower-case letters"),
    "empty list": (("  - Ruin it.\n", "  []\n"), 12, "malicious", "too few entries (0)", "write 1 or more"),
    "too short a list": (
        ("  - {id: t4, category: b, prompt: Four.}\n", ""),
        18,
        "train",
        "too few entries (3)",
        "write 4 or more",
    ),
    "duplicate id": (("{id: t4,", "{id: t1,"), 26, "train[3].id", "same id as train[0]", "once, in one split"),
    "duplicate id in two splits": (("{id: e1,", "{id: t1,"), 30, "test[0].id", "same id as train[0]", "change it"),
    "prompt in two splits": (
        ("prompt: Six.", "prompt: '  one. '"),
        30,
        "test[0].prompt",
        "same prompt as train[0]",
        "once, in one split",
    ),
    "prompt twice in one split": (("Four.", "TWO."), 26, "train[3].prompt", "same prompt as train[1]", "change it"),
    "malicious prompt in a pair": (("- Ruin it.", "- Act badly."), 13, "malicious[0]", "used for fitting", "reword"),
    "malicious prompt of a scenario": (
        ("- Ruin it.", "- Be very bad."),
        13,
        "malicious[0]",
        "used for fitting",
        "reword",
    ),
    "other file name": (("concept: made", "concept: other"), 2, "concept", "named 'made.yaml'", "one name"),
    "duplicate field": (("title: Made up", "title: A\ntitle: B"), 5, "(YAML)", "'title' is given twice", "keep one"),
    "duplicate field of a scenario": (("prompt: Three.", "id: t3"), 23, "(YAML)", "'id' is given twice", "keep one"),
    "unclosed bracket": (("{id: t2, category: a, prompt: Two.}", "{id: t2"), 21, "(YAML)", "", "check indentation"),
    "colon in text": (("title: Made up", "title: Made: up"), 4, "(YAML)", "mapping values", "needs quotes"),
    "tab": (("  - Ruin it.", "\t- Ruin it."), 13, "(YAML)", "cannot start any token", "check indentation"),
    "control character": (("Ruin it.", "Ruin\x07 it."), 13, "(YAML)", "control character 0x07", "delete it"),
    "thirteenth month": (("title: Made up", "title: 2001-13-01"), 4, "(YAML)", "cannot be read", "put it in quotes"),
    "odd tag": (("title: Made up", "title: !!int ''"), 4, "(YAML)", "cannot be read", "put it in quotes"),
    "code": (("title: Made up", "title: !!python/name:os.system"), 4, "(YAML)", "python/name", "check"),
    "list for a field name": (("title: Made up", "? [a]\n: 1"), 4, "(YAML)", "not a word", "field: value"),
    "number for a field name": (("title: Made up", "title: x\n7: x"), 5, "[7]", "yet no text", "allowed: schema"),
    "half a character": (("title: Made up", 'title: "\\uD800"'), 4, "(YAML)", "half a character", "whole one"),
    "two documents": (("test:\n", "---\ntest:\n"), 29, "(YAML)", "another document", "check"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_told_with_line_field_and_fix(check, case: str) -> None:
    change, line, field, problem, fix = CASES[case]
    found = [fault for fault in check(change) if fault.field == field]
    assert found, f"nothing about {field}"
    assert found[0].line == line
    assert problem in found[0].problem
    assert fix in found[0].fix
    assert str(found[0]).startswith(f"line {line}: {field}: ")


@pytest.mark.parametrize("case", CASES)
def test_faults_are_told_in_plain_words(check, case: str) -> None:
    told = " ".join(str(fault) for fault in check(CASES[case][0]))
    for word in ("tuple", "model", "dict", "Input", "input", "instance", "NoneType", "pydantic"):
        assert word not in told


@pytest.mark.parametrize(
    "change",
    [
        ("- aligned: Act", "- alined: Act"),
        ("- Ruin it.", '- ""'),
        ("{id: e1, category: a, prompt: Six.}", "{id: e1}"),
    ],
)
def test_an_inner_fault_brings_no_noise_about_its_list(check, change: tuple[str, str]) -> None:
    fields = {fault.field for fault in check(change)}
    assert not fields & {"pairs", "malicious", "test"}


def test_several_faults_come_in_the_order_of_the_lines(check) -> None:
    found = check(("title: Made up", "title: 7"), ("Ruin it.", '""'), ("  trait: How", "  traits: How"))
    assert [fault.field for fault in found] == ["title", "malicious[0]", "rubric.trait", "rubric.traits"]
    assert [fault.line for fault in found] == sorted(fault.line for fault in found)


def test_few_entries_are_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(GOOD, encoding="utf-8")
    found = {fault.field: fault for fault in check_concept(path)}
    assert set(found) == {"pairs", "malicious", "neutral_prompts", "train", "validation", "test"}
    assert {fault.severity for fault in found.values()} == {"warning"}
    assert found["train"].line == line_of(GOOD, "train:")
    assert found["train"].problem == "4 entries; 50 or more give stable figures"
    assert found["train"].fix == "add more, varied in wording"
    assert isinstance(load_concept(path), Concept)


def test_pairs_are_not_missed_where_every_scenario_has_its_own(tmp_path: Path) -> None:
    data = yaml.safe_load(GOOD)
    for index, scenario in enumerate(data["train"]):
        scenario |= {"aligned": f"Good {index}.", "violating": f"Bad {index}."}
    path = tmp_path / "made.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert "pairs" not in {fault.field for fault in check_concept(path)}


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "null\n"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(text, encoding="utf-8")
    assert check_concept(path) == [Fault("error", 1, "(file)", "is empty, not a concept", "write 'field: value' lines")]


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "a list"), ("hello\n", "text"), ("7\n", "a number")])
def test_a_file_that_holds_no_mapping(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(text, encoding="utf-8")
    assert [fault.problem for fault in check_concept(path)] == [f"is {kind}, not a concept"]


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "made.yaml"
    path.write_bytes(GOOD.replace("Made up", "Caf\xe9").encode("latin-1"))
    for read in (check_concept, load_concept):
        with pytest.raises(ConceptError, match=r"made\.yaml is not UTF-8 text \(byte \d+\); save it as UTF-8"):
            read(path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "made.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_concept(path).concept == "made"


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name, why in (("none.yaml", "No such file"), ("folder.yaml", "directory")):
        for read in (check_concept, load_concept):
            with pytest.raises(ConceptError, match=rf"{name} cannot be read: .*{why}"):
                read(tmp_path / name)


@pytest.mark.parametrize("nest", ["[", "{a: ", "- "])
def test_nesting_without_end(tmp_path: Path, nest: str) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(nest * 5000, encoding="utf-8")
    assert [fault.severity for fault in check_concept(path)] == ["error"]


def examined(path: Path) -> Concept | None:
    """Check and load a file; nothing may come of it but faults, a concept or `ConceptError`."""
    try:
        faults = check_concept(path)
    except ConceptError:
        with pytest.raises(ConceptError):
            load_concept(path)
        return None
    assert all(fault.line >= 1 and fault.field and fault.problem and fault.fix for fault in faults)
    assert [fault.line for fault in faults] == sorted(fault.line for fault in faults)
    if any(fault.severity == "error" for fault in faults):
        with pytest.raises(ConceptError):
            load_concept(path)
        return None
    return load_concept(path)


YAMLISH = st.text(st.sampled_from("ab1 \n\t:-{}[]&*!|>'\"%@`#?,.=<~\\u0\x07\x85é\ud7ff\U0001f600"), max_size=60)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(text=st.text(max_size=80) | YAMLISH)
def test_arbitrary_text_never_crashes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "made.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    examined(path)


@FUZZ
@given(start=st.integers(0, len(GOOD)), length=st.integers(0, 12), text=YAMLISH)
def test_arbitrary_text_inside_a_good_file_never_crashes(tmp_path: Path, start: int, length: int, text: str) -> None:
    path = tmp_path / "made.yaml"
    path.write_bytes((GOOD[:start] + text + GOOD[start + length :]).encode("utf-8", "surrogatepass"))
    examined(path)


@FUZZ
@given(value=VALUES)
def test_arbitrary_values_never_crash(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    examined(path)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in below for place in places(item, (*at, key)))]


@FUZZ
@given(data=st.data())
def test_a_mutated_file_has_faults_or_is_a_concept(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands in one place: a concept comes of it only if every text in it is one."""
    mutated = copy.deepcopy(yaml.safe_load(GOOD))
    *way, last = data.draw(st.sampled_from([place for place in places(mutated) if place]))
    inner = mutated
    for part in way:
        inner = inner[part]
    change = data.draw(st.sampled_from(["drop", "replace", "repeat"]))
    if change == "drop":
        del inner[last]
    elif change == "replace":
        inner[last] = data.draw(VALUES)
    elif isinstance(inner, list):
        inner.append(inner[last])
    else:
        inner[data.draw(st.text(max_size=5))] = inner[last]
    path = tmp_path / "made.yaml"
    path.write_text(yaml.safe_dump(mutated, allow_unicode=True), encoding="utf-8")
    concept = examined(path)
    if concept is not None:
        for aligned, violating in concept.contrastive():
            assert aligned.messages[0].content.strip() != violating.messages[0].content.strip()
            assert aligned.messages[-1].content.strip()
