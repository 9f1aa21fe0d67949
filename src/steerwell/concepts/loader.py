"""Find, read and check concept files. Every fault is told with its line, its field and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from steerwell.concepts.schema import SPLITS, Concept
from steerwell.core.errors import ConceptError, UnknownNameError
from steerwell.core.yamltext import parse_yaml

PACKS = Path(__file__).parent / "packs"
ENGLISH = "english"
Location = tuple[str | int, ...]

# Below these counts a direction can still be fitted, but its figures say little.
ENOUGH = {"train": 50, "validation": 8, "test": 32, "pairs": 5, "malicious": 5, "neutral_prompts": 8}

# What the schema finds, by pydantic's name of it: (problem, fix) in plain words.
WORDS = {
    "missing": ("is missing", "add this field"),
    "extra_forbidden": ("is no field here", "remove it, or correct its spelling; allowed: {allowed}"),
    "string_type": ("is {got}, not text", "write text (in quotes if it looks like a number, a date or yes/no)"),
    "string_pattern_mismatch": ("is no plain name", "use lower-case letters, digits and '_', beginning with a letter"),
    "too_short": ("has too few entries ({count})", "write {min_length} or more"),
    "literal_error": ("is not {expected}", "write {expected}"),
    "model_type": ("is {got}, not a mapping of fields", "write 'field: value' lines"),
    "tuple_type": ("is {got}, not a list", "write '- ...' lines"),
    "invalid_key": ("is a field name, yet no text", "write the name of a field; allowed: {allowed}"),
    "blank": ("is blank", "write some text, or remove the field where it may be left out"),
    "half_pair": ("has one of 'aligned' and 'violating' without the other", "give both or leave both out"),
    "equal_pair": ("says the same under 'aligned' and 'violating'", "write two different texts"),
}
KINDS = {str: "text", bool: "yes or no", int: "a number", float: "a number", list: "a list", dict: "a mapping"}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a concept file. `error` makes the file unusable, `warning` makes it weak."""

    severity: Literal["error", "warning"]
    line: int
    field: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.field}: {self.problem}; fix: {self.fix}"


def concept_names(language: str = ENGLISH) -> tuple[str, ...]:
    """Names of the packs that come with Steerwell in one language, sorted."""
    return tuple(sorted(path.stem for path in _folder(language).glob("*.yaml")))


def load_concept(name: str | Path, language: str = ENGLISH) -> Concept:
    """Load a concept by the name of a bundled pack, or from a user's own YAML file (a path ending in .yaml / .yml).

    Raises:
        UnknownNameError: no such pack in this language.
        ConceptError: the file is unreadable or has faults; the message lists them all.
    """
    if str(name).endswith((".yaml", ".yml")):
        return _read(Path(name))
    path = _folder(language) / f"{name}.yaml"
    if not path.is_file():
        kind = f"concept ({language})"
        raise UnknownNameError(kind, str(name), concept_names(language), "A file of your own ends in .yaml.")
    return _bundled(path)


def check_concept(path: str | Path) -> list[Fault]:
    """Every fault of a concept file, in the order of its lines. Empty means: nothing to mend.

    Raises:
        ConceptError: the file cannot be read, or is not UTF-8 text.
    """
    return _examine(Path(path))[1]


def _folder(language: str) -> Path:
    return PACKS if language == ENGLISH else PACKS / language


@cache
def _bundled(path: Path) -> Concept:
    return _read(path)


def _read(path: Path) -> Concept:
    concept, faults = _examine(path)
    errors = [fault for fault in faults if fault.severity == "error"]
    if concept is None or errors:
        listed = "\n  ".join(str(fault) for fault in errors)
        raise ConceptError(f"concept file {path} has {len(errors)} fault(s):\n  {listed}")
    return concept


def _examine(path: Path) -> tuple[Concept | None, list[Fault]]:
    try:
        text = path.read_text(encoding="utf-8")
        node, data = parse_yaml(text)
    except OSError as error:
        raise ConceptError(f"concept file {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConceptError(f"concept file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        return None, [_syntax_fault(error, text)]
    except RecursionError:
        return None, [Fault("error", 1, "(YAML)", "is nested too deeply", "see the bundled packs for the form")]
    if not isinstance(data, dict):
        return None, [Fault("error", 1, "(file)", f"is {_kind(data)}, not a concept", "write 'field: value' lines")]
    try:
        concept = Concept.model_validate(data)
    except ValidationError as error:
        return None, sorted(_schema_faults(node, error), key=lambda fault: fault.line)
    return concept, sorted(_content_faults(node, concept, path), key=lambda fault: fault.line)


def _syntax_fault(error: yaml.YAMLError, text: str) -> Fault:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Fault("error", line, "(YAML)", f"holds the control character {error.character:#04x}", "delete it")
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    fix = "check indentation, quotes and colons on this line (text with ': ' or '#' needs quotes)"
    return Fault("error", mark.line + 1 if mark else 1, "(YAML)", problem, getattr(error, "note", None) or fix)


def _schema_faults(node: yaml.Node | None, error: ValidationError) -> Iterator[Fault]:
    for item in error.errors(include_url=False):
        location, facts = item["loc"], item.get("ctx", {})
        count = len(item["input"]) if isinstance(item["input"], (list, dict)) else 0
        if item["type"] == "too_short" and count >= facts["min_length"]:
            continue  # enough entries, but some are wrong: those are told
        problem, fix = WORDS.get(item["type"], ("{msg}", "correct the value"))
        fields = _record_at(location[:-1]).model_fields.items()
        allowed = ", ".join(field.alias or name for name, field in fields)
        words = facts | {"msg": item["msg"], "allowed": allowed, "got": _kind(item["input"]), "count": count}
        line, field = _line(node, location), _dotted(location)
        yield Fault("error", line, field, problem.format(**words), fix.format(**words))


def _kind(value: object) -> str:
    return "empty" if value is None else KINDS.get(type(value), f"a {type(value).__name__}")


def _record_at(location: Location) -> type[BaseModel]:
    """The record that stands at a location of a concept."""
    record: type[BaseModel] = Concept
    for part in location:
        form = record.model_fields[part].annotation if part in record.model_fields else None
        inner = (kind for kind in (form, *get_args(form)) if isinstance(kind, type) and issubclass(kind, BaseModel))
        record = next(inner, record)
    return record


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".") or "(file)"


def _line(node: yaml.Node | None, location: Location) -> int:
    """1-based line of the node at `location`, or of its nearest parent that exists."""
    line = node.start_mark.line + 1 if node else 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            entry = next((pair for pair in node.value if pair[0].value == str(part)), None)
            if entry is None:
                break
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _content_faults(node: yaml.Node | None, concept: Concept, path: Path) -> Iterator[Fault]:
    """Faults that only show when fields are read together."""
    if concept.concept != path.stem:
        problem = f"says {concept.concept!r} in a file named {path.name!r}"
        yield Fault("error", _line(node, ("concept",)), "concept", problem, "give file and concept one name")
    yield from _repeats(node, concept)
    fitted = {text for pair in concept.pairs for text in (pair.aligned, pair.violating)}
    fitted |= {text for item in concept.train for text in (item.aligned, item.violating) if text}
    for index, text in enumerate(concept.malicious):
        if text in fitted:
            where: Location = ("malicious", index)
            problem = "this prompt is also used for fitting, so it is not held out"
            yield Fault("error", _line(node, where), _dotted(where), problem, "reword it or remove it from the pairs")
    for field, enough in ENOUGH.items():
        if field == "pairs" and all(item.aligned for item in concept.train):
            continue
        count = len(getattr(concept, field))
        if count < enough:
            problem = f"{count} entries; {enough} or more give stable figures"
            yield Fault("warning", _line(node, (field,)), field, problem, "add more, varied in wording")


def _repeats(node: yaml.Node | None, concept: Concept) -> Iterator[Fault]:
    ids: dict[str, str] = {}
    prompts: dict[str, str] = {}
    for split in SPLITS:
        for index, item in enumerate(getattr(concept, split)):
            here: Location = (split, index)
            prompt = " ".join(item.prompt.casefold().split())
            for seen, value, what in ((ids, item.id, "id"), (prompts, prompt, "prompt")):
                if value in seen:
                    problem = f"same {what} as {seen[value]}"
                    fix = "change it: a scenario may stand once, in one split"
                    yield Fault("error", _line(node, (*here, what)), _dotted((*here, what)), problem, fix)
                seen.setdefault(value, _dotted(here))
