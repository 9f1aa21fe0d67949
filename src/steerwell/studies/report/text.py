"""Markdown in which foreign text stays text.

Prompts, answers and names come from models, judges and users. `escaped` writes what could be markup as character
references, which CommonMark (section 2.5) and GitHub's dialect never read as markup, so it is safe in any reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steerwell.scoring.intervals import Interval

_MARKUP = re.compile(r"[&<>|\\`*\[\]~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_BEGINNING = re.compile(
    r"^(\s*(?:[#+=-]*(?=[#+=-])|\d{1,9}(?=[.)])))([#+=.)-])(?=\s|$)"
)  # what would begin a heading, a list or a rule
_LINE_END = re.compile("\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)  # controls, and what turns text round


class Markdown(str):
    """A text that is Markdown already."""

    __slots__ = ()


MISSING = Markdown("n/a")
NAMES = {"hf": "Hugging Face transformers", "vllm": "vLLM"}  # of engines


def escaped(value: object) -> Markdown:
    """Any text as Markdown that shows just that text, on one line: `<br>` parts lines, controls become U+FFFD."""
    if isinstance(value, Markdown):
        return value
    return Markdown("<br>".join(map(_line, _LINE_END.split(str(value)))))


def _line(text: str) -> str:
    shown = _MARKUP.sub(_reference, _UNSEEN.sub("\ufffd", text.expandtabs(1)))
    return _BEGINNING.sub(lambda found: found[1] + f"&#{ord(found[2])};", shown)


def _reference(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"


PERCENT = "\N{NO-BREAK SPACE}%"


def number(value: float, digits: int = 1, unit: str = "") -> Markdown:
    """A number with its unit; NaN is `MISSING`."""
    return MISSING if math.isnan(value) else Markdown(f"{_rounded(value, digits)}{unit}")


def spread(found: Interval, digits: int = 1, unit: str = "") -> Markdown:
    """An estimate and, in small print below it, its interval."""
    told = between(found, digits, unit)
    return Markdown(number(found.estimate, digits, unit) + (f"<br><small>{told}</small>" if told else ""))


def between(found: Interval, digits: int = 1, unit: str = "") -> str:
    """An interval's bounds; "" where it has none."""
    known = not math.isnan(found.low + found.high)
    return f"{_rounded(found.low, digits)} to {_rounded(found.high, digits)}{unit}" if known else ""


def _rounded(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # adding 0 turns -0 into 0


def table(header: Sequence[object], rows: Sequence[Sequence[object]], left: int = 1) -> Markdown:
    """A table; the first `left` columns are flush left, the others flush right. "" without rows."""
    if not rows:
        return Markdown()
    rule = "|" + " --- |" * left + " ---: |" * (len(header) - left)
    first, *others = ("| " + " | ".join(map(escaped, row)) + " |" for row in (header, *rows))
    return Markdown("\n".join((first, rule, *others)))


def code_block(text: str, language: str = "") -> Markdown:
    """A fenced block that nothing in the text can close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def engines(cells: Iterable[Mapping[str, Any]]) -> str:
    """Who ran the models, from their cells' `cell.json`; those of before vLLM ran in studies do not say."""
    shown = {cell["model"]: _engine(**cell.get("engine", {"engine": "hf"})) for cell in cells}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return "; ".join(f"{name}: {value}" for name, value in shown.items())


def _engine(engine: str, **asked: Any) -> str:
    return ", ".join([NAMES[engine], *(f"{name} {value}" for name, value in asked.items())])
