"""The n-grams of many texts as numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def grams(texts: Sequence[Sequence[Hashable]], order: int) -> tuple[Integers, Integers]:
    """Every run of `order` words inside a text: (text it is from, its number), both [total], in reading order.

    Equal n-grams have equal numbers, of whatever text; the numbers mean nothing else.
    """
    known: dict[Hashable, int] = {}
    words = np.array([known.setdefault(word, len(known)) for text in texts for word in text], np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts]).astype(np.int64)
    numbers = words
    for step in range(1, order):
        pairs = numbers[:-1] * len(known) + words[step:]
        numbers = np.unique(pairs, return_inverse=True)[1]  # small numbers again, so the next product fits
    inside = owner[: len(numbers)] == owner[order - 1 :]
    return owner[: len(numbers)][inside], numbers[inside]
