"""Prompts that look made from one template, where nobody recorded the template.

Two prompts share a template if they differ in one stretch of words alone, once numbers and names are masked:
"Is it true that green tea is safe?" and "Is it true that raw fish is safe?". A heuristic: it splits a template with two
free slots unless some prompts share one of the values, and it joins natural prompts that begin alike ("Generate a list
of ..."). A recorded template is always better.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

SLOT = "_"
_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")
_FIXED = 3  # words that a template keeps at least,
_SHARE = 0.5  # and their share of the prompt's words
_SPAN = 8  # words in its free stretch at most
_ENDS = ".!?:"  # after which a capital is no sign of a name
_LONGEST = 60  # longer prompts share a template only where they are equal but for numbers and names

Tokens = tuple[str, ...]


def templates_of(prompts: Sequence[str]) -> list[str]:
    """A template's name for every prompt, equal where prompts look made from one; "" for an empty prompt.

    The name is the first such prompt, numbers and names masked by "_". Sharing is passed on: where A shares a template
    with B, and B one with C, all three get one name.
    """
    masked = [_masked(prompt) for prompt in prompts]
    skeletons = list(dict.fromkeys(masked))
    first: dict[Tokens, int] = {}
    pairs = [
        (first.setdefault(frame, index), index)
        for index, skeleton in enumerate(skeletons)
        for frame in _frames(skeleton)
    ]
    group = components(len(skeletons), [pair for pair in pairs if pair[0] != pair[1]])
    name = {int(which): " ".join(skeletons[index]) for index, which in reversed(list(enumerate(group)))}
    of = {skeleton: name[int(which)] for skeleton, which in zip(skeletons, group, strict=True)}
    return [of[skeleton] for skeleton in masked]


def components(count: int, pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Numbers 0 .. count - 1 in groups that the pairs connect: each one's group, [count]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not count:
        return np.zeros(0, np.int64)
    ends = np.array(pairs, np.int64).reshape(-1, 2).T
    links = coo_array((np.ones(ends.shape[1], bool), (ends[0], ends[1])), shape=(count, count))
    return np.asarray(connected_components(links, directed=False)[1], np.int64)


def _masked(prompt: str) -> Tokens:
    """Words and punctuation without case; a run of numbers and of names (capitals inside a sentence) is one slot.

    Nothing is masked where that would leave too little, as in a title or in capitals.
    """
    found: list[str] = []
    fixed, begins, tokens = 0, True, _TOKEN.findall(prompt)
    for part in tokens:
        name = part[0].isupper() and not begins and not re.fullmatch(r"I(?:['’]\w+)?", part)
        begins = part in _ENDS
        if not name and not any(letter.isdigit() for letter in part):
            found.append(part.casefold())
            fixed += part[0].isalnum()
        elif found[-1:] != [SLOT]:
            found.append(SLOT)
    if fixed >= _least(sum(part[0].isalnum() for part in tokens)):
        return tuple(found)
    return tuple(part.casefold() for part in tokens)


def _least(count: int) -> float:
    """How many of a prompt's `count` words must be the template's."""
    return max(_FIXED, _SHARE * count)


def _frames(skeleton: Tokens) -> Iterator[Tokens]:
    """The skeleton, and what is left of it around every stretch that might be a template's free slot."""
    yield skeleton
    if len(skeleton) > _LONGEST:
        return
    before = list(accumulate((part[0].isalnum() for part in skeleton), initial=0))  # words before each token
    least = _least(before[-1])
    for start in range(len(skeleton)):
        for stop in range(start + 1, min(len(skeleton), start + _SPAN) + 1):
            if before[-1] - before[stop] + before[start] >= least:
                yield (*skeleton[:start], SLOT, *skeleton[stop:])
