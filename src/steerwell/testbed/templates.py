"""A tiny template language that both renders sentences and parses them back.

``[a|b]`` is a choice (not nested), ``{slot}`` a slot. A slot whose name starts with a capital renders its value with a
capital first letter and reads it back as the same slot.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_PART = re.compile(r"\[([^\]]*)\]|\{(\w+)\}")


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Template:
    """One sentence form; see the module's docstring for its syntax."""

    text: str
    slots: frozenset[str] = field(init=False)
    _pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = [match.group(2) for match in _PART.finditer(self.text) if match.group(2)]
        object.__setattr__(self, "slots", frozenset(name.lower() for name in names))
        object.__setattr__(self, "_pattern", re.compile(_regex(self.text)))

    def render(self, rng: random.Random, slots: Mapping[str, str]) -> str:
        """One random wording with the slots filled in."""

        def fill(match: re.Match[str]) -> str:
            slot: str | None = match[2]
            if slot is None:
                return rng.choice(str(match[1]).split("|"))
            value = slots[slot.lower()]
            return capital(value) if slot[0].isupper() else value

        return _PART.sub(fill, self.text)

    def wordings(self) -> int:
        """Number of wordings for one set of slot values."""
        count = 1
        for match in _PART.finditer(self.text):
            count *= len((match.group(1) or "").split("|"))
        return count

    def match(self, sentence: str) -> dict[str, str] | None:
        """Slot values that give `sentence`, or None where the template cannot give it."""
        found = self._pattern.fullmatch(sentence)
        return None if found is None else found.groupdict()


def _regex(text: str) -> str:
    out, end, seen = [], 0, set[str]()
    for match in _PART.finditer(text):
        out.append(re.escape(text[end : match.start()]))
        choice, slot = match.groups()
        if slot is None:
            out.append("(?:" + "|".join(re.escape(item) for item in choice.split("|")) + ")")
        elif (name := slot.lower()) in seen:
            out.append(f"(?i:(?P={name}))")
        else:
            seen.add(name)
            out.append(f"(?P<{name}>.+?)")
        end = match.end()
    return "".join([*out, re.escape(text[end:])])
