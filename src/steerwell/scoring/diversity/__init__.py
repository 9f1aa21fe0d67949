"""Diversity of texts: one measure per file; `measure` runs one by its name (METHODS section 6).

A measure's module offers `MEASURE`. All measures see the same texts, cut to the same number of words, because most of
them move with length and with the number of texts. What cannot be computed is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from steerwell.core.errors import ArgumentError
from steerwell.core.registry import Registry
from steerwell.scoring.diversity._words import cut, words_of
from steerwell.scoring.embeddings import Embedder

DIVERSITY = Registry("diversity_measure", __name__, "MEASURE")
WORDS = 50  # of every text that count
WINDOW = 15  # of the moving average
Values = NDArray[np.float64]
Subsets = Sequence[NDArray[np.intp]]

__all__ = ["DIVERSITY", "WINDOW", "WORDS", "Measure", "Subsets", "Texts", "Values", "cut", "measure", "words_of"]


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts made ready for every measure.

    Attributes:
        texts: as they are, cut to their first words.
        words: of each (see `words_of`).
        units: their embeddings, float64 [n, d], of unit norm or zero.
        prompts: what each answers; None: not known.
        window: words that the moving average looks at.
    """

    texts: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    units: Values
    prompts: tuple[str, ...] | None = None
    window: int = WINDOW

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        embeddings: Embedder | NDArray[np.floating[Any]],
        prompts: Sequence[str] | None = None,
        words: int = WORDS,
        window: int = WINDOW,
    ) -> Self:
        """Cut n texts, find their words and embed what is left.

        Args:
            texts: whole.
            embeddings: what embeds them, or vectors [n, d] of any norm; they should be of texts cut by `cut`.
            prompts: one per text.
            words: of every text that count, from its start.
            window: at most `words`.

        Raises:
            ArgumentError: a number that makes no sense, or another number of prompts or vectors than texts.
        """
        if not 1 <= window <= words:
            raise ArgumentError(f"window: got {window}; expected 1 to {words}, the words of every text that count")
        if prompts is not None and len(prompts) != len(texts):
            raise ArgumentError(f"prompts: got {len(prompts)} for {len(texts)} texts; give one per text")
        kept = tuple(cut(text, words) for text in texts)
        vectors = embeddings(kept) if callable(embeddings) else embeddings
        units = unit_rows(vectors)
        if len(units) != len(texts):
            raise ArgumentError(f"embeddings: got {len(units)} vectors for {len(texts)} texts; give one per text")
        found = tuple(words_of(text, words) for text in kept)
        return cls(kept, found, units, None if prompts is None else tuple(prompts), window)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Words of each text, [n], at most those that count."""
        return np.array([len(text) for text in self.words], np.int64)


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of a set of texts.

    Attributes:
        of: texts and subsets of them (row numbers) to one value per subset; NaN where there is none. Many subsets are
            asked for at once, so that what they share is computed once.
        title: what a table calls it.
        high: largest value possible; the smallest is 0.
        more_is_diverse: whether a higher value means more diversity.
        least: words that a text must have to count.
    """

    of: Callable[[Texts, Subsets], Values]
    title: str
    high: float = 1
    more_is_diverse: bool = True
    least: Callable[[Texts], int] = lambda texts: 0


def measure(name: str, texts: Texts, subsets: Subsets | None = None) -> Values:
    """One registered measure of every subset; None: of all texts, shape [1].

    Raises:
        UnknownNameError: no such measure.
    """
    chosen: Measure = DIVERSITY.get(name)
    return np.asarray(chosen.of(texts, [np.arange(len(texts.texts))] if subsets is None else subsets), np.float64)


def unit_rows(vectors: NDArray[np.floating[Any]]) -> Values:
    """Vectors scaled to unit norm, float64 [n, d]; zero ones stay zero.

    Raises:
        ArgumentError: not a table of finite numbers.
    """
    table = np.array(vectors, np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ArgumentError(f"embeddings: got shape {table.shape}; expected finite vectors [n, d]")
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    table /= np.where(norms > 0, norms, 1)
    return table
