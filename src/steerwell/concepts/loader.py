"""Find, read and check concept files. Every fault is told with its line, its field and how to mend it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from steerwell.concepts.schema import SPLITS, Concept
from steerwell.core.errors import ConceptError, UnknownNameError

PACKS = Path(__file__).parent / "packs"
ENGLISH = "english"
Location = tuple[str | int, ...]

# Below these counts a direction can still be fitted, but its figures say little.
ENOUGH = {"train": 50, "validation": 8, "test": 32, "pairs": 5, "malicious": 5, "neutral_prompts": 8}

FIXES = {
    "missing": "add this field",
    "extra_forbidden": "remove it, or correct its spelling; allowed: {allowed}",
    "string_type": "write text (put it in quotes if it looks like a number, a date or yes/no)",
    "string_pattern_mismatch": "use lower-case letters, digits and '_', beginning with a letter",
    "too_short": "add more entries",
    "literal_error": "write {expected}",
    "model_type": "write a mapping of fields",
    "tuple_type": "write a list ('- ...' lines)",
}


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
    """Every fault of a concept file, in the order of its lines. Empty means: nothing to mend."""
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
        node, data = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConceptError(f"concept file {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConceptError(f"concept file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        return None, [_syntax_fault(error)]
    except (ValueError, RecursionError) as error:  # a date or number YAML cannot construct; nesting without end
        return None, [Fault("error", 1, "(file)", f"not usable YAML: {error}", "quote the value")]
    if not isinstance(data, dict):
        got = type(data).__name__
        return None, [Fault("error", 1, "(file)", f"holds a {got}, not a concept", "write 'concept: NAME' and so on")]
    try:
        concept = Concept.model_validate(data)
    except ValidationError as error:
        return None, sorted((_schema_fault(node, item) for item in error.errors()), key=lambda fault: fault.line)
    return concept, sorted(_content_faults(node, concept, path), key=lambda fault: fault.line)


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (plain YAML keeps the last one silently)."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem="this key is not a word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        return node, loader.construct_document(node) if node is not None else None
    finally:
        loader.dispose()


def _syntax_fault(error: yaml.YAMLError) -> Fault:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    fix = "check indentation, quotes and colons on this line (text with ': ' or '#' needs quotes)"
    return Fault("error", mark.line + 1 if mark else 1, "(YAML)", problem, fix)


def _schema_fault(node: yaml.Node | None, item: Any) -> Fault:
    location: Location = item["loc"]
    allowed = ", ".join(field.alias or name for name, field in Concept.model_fields.items())
    expected = item.get("ctx", {}).get("expected", "the stated value")
    fix = FIXES.get(item["type"], "correct the value").format(
        allowed=allowed if len(location) == 1 else "see the docs", expected=expected
    )
    problem = item["msg"].removeprefix("Value error, ")
    return Fault("error", _line(node, location), _dotted(location), problem[:1].lower() + problem[1:], fix)


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".") or "(file)"


def _line(node: yaml.Node | None, location: Location) -> int:
    """1-based line of the node at `location`, or of its nearest parent that exists."""
    line = node.start_mark.line + 1 if node else 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            entry = next((pair for pair in node.value if pair[0].value == part), None)
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
