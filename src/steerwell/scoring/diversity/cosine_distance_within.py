"""Mean cosine distance between two texts that answer the same prompt."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerwell.core.errors import ArgumentError
from steerwell.scoring.diversity import Measure, Subsets, Texts, Values, unit_rows
from steerwell.scoring.diversity.cosine_distance import mean_distance


def cosine_distance_within(embeddings: NDArray[np.floating[Any]], groups: Sequence[Hashable]) -> float:
    """Mean of `1 - cosine` over the pairs of a group, then over groups, which weigh the same; 0 to 2.

    Pooled distance is high wherever the prompts differ; this is what the model itself varies.

    Args:
        embeddings: [n, d], any norm.
        groups: one per row, such as its prompt.

    Returns:
        NaN: no group has 2 rows.

    Raises:
        ArgumentError: another number of groups than rows.
    """
    if len(groups) != len(embeddings):
        raise ArgumentError(f"groups: got {len(groups)} for {len(embeddings)} embeddings; give one per row")
    return _within(unit_rows(embeddings), groups)


def _within(units: Values, groups: Sequence[Hashable]) -> float:
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    distances = [mean_distance(units[members]) for members in rows.values() if len(members) > 1]
    return float(np.mean(distances)) if distances else math.nan


def _of(texts: Texts, subsets: Subsets) -> Values:
    prompts = texts.prompts
    if prompts is None:
        return np.full(len(subsets), math.nan)
    return np.array([_within(texts.units[rows], [prompts[row] for row in rows]) for rows in subsets], np.float64)


MEASURE = Measure(_of, "cosine distance, within prompt", high=2)
