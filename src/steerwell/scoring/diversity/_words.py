"""Words of a text in any script, and a text cut to its first words."""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib import import_module
from typing import Any

from steerwell.core.errors import MissingDependencyError

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
APOSTROPHES = str.maketrans({"\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{MODIFIER LETTER APOSTROPHE}": "'"})


def words_of(text: str, first: int | None = None) -> tuple[str, ...]:
    """A text's first words without regard to case; punctuation and symbols are none, so `"?!"` has no word.

    A word is a run of letters, their marks and digits, with apostrophes inside (Unicode 15, NFKC, case-folded). Scripts
    that put no spaces between words give one word per character: Chinese, Japanese, Thai, Lao, Khmer and Burmese texts
    compare among themselves, not with texts of other languages.

    Args:
        text: any.
        first: words from the start; None: all.

    Raises:
        MissingDependencyError: the package regex is not installed.
    """
    found = _pattern().findall(text)[:first]
    return tuple(unicodedata.normalize("NFKC", word).casefold().translate(APOSTROPHES) for word in found)


def cut(text: str, first: int) -> str:
    """A text up to the end of its first words (see `words_of`); one that has no more is returned whole."""
    ends = [match.end() for match in _pattern().finditer(text)]
    return text[: ends[first - 1]] if len(ends) > first else text


@cache
def _pattern() -> Any:
    try:
        regex = import_module("regex")  # the standard library's \w takes vowel signs of Hindi for word boundaries
    except ModuleNotFoundError as error:
        raise MissingDependencyError("regex", "hf") from error
    letter, tail = rf"[[\p{{L}}\p{{N}}]--[{UNSPACED}]]", r"[\p{M}\u200c\u200d]"
    run = rf"{letter}(?:{letter}|{tail})*"
    return regex.compile(rf"(?V1)[{UNSPACED}]{tail}*|{run}(?:['’ʼ]{run})*")
