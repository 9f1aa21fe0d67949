"""Moving-average type-token ratio: how seldom a text repeats its words nearby (Covington and McFall 2010)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from steerwell.scoring.diversity import WINDOW, Measure, Subsets, Texts, Values


def mattr(words: Sequence[Hashable], window: int = WINDOW) -> float:
    """Mean share of distinct words over all windows of one text, 1 / window (one word again and again) to 1.

    A plain type-token ratio falls with length; this does not, because every window is as long.

    Args:
        words: of one text, in order.
        window: words looked at together.

    Returns:
        NaN: the text is shorter than the window, so that its ratio would not compare with a longer text's.
    """
    starts = range(len(words) - window + 1)
    shares = [len(set(words[start : start + window])) for start in starts]
    return sum(shares) / (len(shares) * window) if shares else math.nan


def _of(texts: Texts, subsets: Subsets) -> Values:
    each = np.array([mattr(words, texts.window) for words in texts.words], np.float64)
    known = [each[rows][~np.isnan(each[rows])] for rows in subsets]
    return np.array([values.mean() if len(values) else math.nan for values in known], np.float64)


MEASURE = Measure(_of, "MATTR (inside a text)", least=lambda texts: texts.window)
