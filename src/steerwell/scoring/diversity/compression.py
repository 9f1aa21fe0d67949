"""Compression ratio: how much smaller gzip makes a set of texts (Shaib et al. 2024, arXiv 2403.00553)."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence

import numpy as np

from steerwell.scoring.diversity import Measure, Subsets, Texts, Values

LEVEL = 9


def compression(texts: Sequence[str]) -> float:
    """Bytes of the texts, one per line, over bytes of their gzip file; higher: more is said again.

    gzip sees what repeats within 32 KiB, so in a larger set the order of the texts plays a part. Its header weighs on a
    tiny set, whose ratio may be below 1.

    Returns:
        NaN: fewer than 2 texts, or all are blank.
    """
    if len(texts) < 2 or not any(text.strip() for text in texts):
        return math.nan
    data = "\n".join(texts).encode("utf-8", "surrogatepass")
    return len(data) / len(gzip.compress(data, LEVEL, mtime=0))


def _of(texts: Texts, subsets: Subsets) -> Values:
    return np.array([compression([texts.texts[row] for row in rows]) for rows in subsets], np.float64)


MEASURE = Measure(_of, "compression ratio", high=math.inf, more_is_diverse=False)
