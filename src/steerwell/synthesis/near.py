"""Near-duplicate texts: Jaccard similarity of word shingles, pairs found with MinHash and then checked exactly.

Words are runs of letters and digits without case; a Chinese or Japanese character is a word of its own. Broder, "On the
resemblance and containment of documents" (1997); the index is datasketch's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from steerwell.core.errors import ArgumentError, MissingDependencyError
from steerwell.synthesis.examples import Example

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
_PERMUTATIONS = 128
_MISSED = 1e-6  # chance that the index misses a pair right at the threshold

Shingles = frozenset[str]


@dataclass(frozen=True, slots=True)
class Near:
    """When two texts count as near-duplicates.

    Attributes:
        threshold: Jaccard similarity of their shingles from which on they do, above 0, at most 1.
        size: words per shingle; a text of fewer words is one shingle.
        short: responses of fewer words ("Yes.") say too little alone: they are near-duplicates only where the responses
            are equal and the prompts near-duplicates.
    """

    threshold: float = 0.8
    size: int = 3
    short: int = 8

    def __post_init__(self) -> None:
        if not 0.3 <= self.threshold <= 1:
            raise ArgumentError(f"threshold: got {self.threshold!r}; expected a similarity from 0.3 to 1, such as 0.8")
        if self.size < 1 or self.short < 0:
            raise ArgumentError(f"size, short: got {self.size} and {self.short}; expected size >= 1 and short >= 0")


NEAR = Near()


def words(text: str) -> list[str]:
    """The words of a text, without case; a text without any (an emoji) is one word."""
    return _WORD.findall(text.casefold()) or text.split()


def normal(text: str) -> str:
    """A text without case, punctuation and extra space: equal for texts that differ in nothing else."""
    return " ".join(words(text))


def shingles(text: str, size: int) -> Shingles:
    """Every run of `size` words, once; the whole text if it is shorter."""
    found = words(text)
    return frozenset(" ".join(found[start : start + size]) for start in range(max(1, len(found) - size + 1)))


def said(example: Example, near: Near) -> tuple[str, str]:
    """What stands for an example's response: (its normal text, that of the prompt beside a short response or "")."""
    response = normal(example.response)
    return response, normal(example.prompt) if len(words(response)) < near.short else ""


def response_shingles(example: Example, near: Near) -> Shingles:
    """Shingles of an example's response; of a short one those of its prompt, marked with the response."""
    if len(words(example.response)) >= near.short:
        return shingles(example.response, near.size)
    mark = normal(example.response)
    return frozenset(f"{mark}\n{shingle}" for shingle in shingles(example.prompt, near.size))


def linked(sets: Sequence[Shingles | None], threshold: float) -> list[tuple[int, int]]:
    """Pairs that connect all near-duplicates, directly or through others; None is like nothing."""
    members: dict[Shingles, list[int]] = {}
    for index, one in enumerate(sets):
        if one is not None:
            members.setdefault(one, []).append(index)
    firsts = [those[0] for those in members.values()]
    equal = [(those[0], copy) for those in members.values() for copy in those[1:]]
    return equal + [(firsts[a], firsts[b]) for a, b in similar(list(members), threshold)]


def jaccard(left: Shingles, right: Shingles) -> float:
    """Shared shingles over all shingles, 0 to 1; 1 for two empty sets."""
    shared = len(left & right)
    union = len(left) + len(right) - shared
    return shared / union if union else 1.0


def similar(sets: Sequence[Shingles], threshold: float, *, first: bool = False) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of sets with a Jaccard similarity of `threshold` or more, in the order of the later one.

    `first`: a set that resembles an earlier one is told once, and nothing is compared with it after that: what is never
    the later of a pair resembles nothing else of that kind. The index misses a pair at the threshold with a chance
    below 1e-6, less above it; nothing else is ever reported.

    Raises:
        MissingDependencyError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise MissingDependencyError("datasketch", "synthesis") from error
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
    encoded = ([shingle.encode() for shingle in one] for one in sets)
    for later, sketch in enumerate(MinHash.generator(encoded, num_perm=_PERMUTATIONS)):
        alike = (one for one in sorted(index.query(sketch)) if jaccard(sets[one], sets[later]) >= threshold)
        found = list(islice(alike, 1 if first else None))
        yield from ((earlier, later) for earlier in found)
        if not (first and found):
            index.insert(later, sketch, check_duplication=False)


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the most rows, hence the fewest false candidates, that miss nothing to speak of.

    A pair of similarity t agrees on all r rows of one of b bands with a chance of 1 - (1 - t^r)^b.
    """
    rows = [
        rows for rows in range(1, _PERMUTATIONS // 2 + 1) if (1 - threshold**rows) ** (_PERMUTATIONS // rows) <= _MISSED
    ]
    return _PERMUTATIONS // max(rows), max(rows)
