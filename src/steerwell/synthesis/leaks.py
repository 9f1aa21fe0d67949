"""What splits share: an exact check of every pair, by another way than the one that made the splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from steerwell.core.errors import MissingDependencyError
from steerwell.synthesis.examples import Example
from steerwell.synthesis.near import NEAR, Near, words

Grams = list[tuple[str, ...]]
_CHUNK = 512  # texts of one split that are compared with all of another at once
_SHOWN = 60


def leaks(
    train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example], *, near: Near | None = NEAR
) -> list[str]:
    """What any two of the splits share, in words; empty: no prompt, no template, no near-duplicate.

    Every pair of texts is compared, exactly; None for `near` leaves near-duplicates out.
    """
    return leaks_between({"train": train, "validation": validation, "test": test}, near=near)


def leaks_between(splits: Mapping[str, Sequence[Example]], *, near: Near | None = NEAR) -> list[str]:
    """`leaks` of any number of splits under any names."""
    counted = {what: _counts(splits, grams, near) for what, grams in _GRAMS.items()} if near else {}
    found = []
    for (left, here), (right, there) in combinations(splits.items(), 2):
        for what, key in (("prompts", _prompt), ("templates", _template)):
            if shared := sorted({key(one) for one in here} & {key(one) for one in there} - {""}):
                found.append(f"{left} and {right} share {len(shared)} {what}, such as {shared[0][:_SHOWN]!r}")
        for what, counts in counted.items():
            if pairs := _near(counts[left], counts[right], (near or NEAR).threshold):
                text = getattr(here[pairs[0][0]], what.removesuffix("s"))[:_SHOWN]
                found.append(f"{left} and {right} share {len(pairs)} near-duplicate {what}, such as {text!r}")
    return found


def _prompt(example: Example) -> str:
    return " ".join(words(example.prompt))


def _template(example: Example) -> str:
    return example.template


def _prompt_grams(example: Example, near: Near) -> Grams:
    return _grams(words(example.prompt), near.size)


def _response_grams(example: Example, near: Near) -> Grams:
    """Word n-grams of the response; beside a short one those of the prompt, each with the whole response."""
    found = words(example.response)
    if len(found) >= near.short:
        return _grams(found, near.size)
    return [("\n", *found, "\n", *gram) for gram in _grams(words(example.prompt), near.size) or [()]]


def _grams(found: list[str], size: int) -> Grams:
    if len(found) <= size:
        return [tuple(found)] if found else []
    return list(zip(*(found[start:] for start in range(size)), strict=False))


_GRAMS: dict[str, Callable[[Example, Near], Grams]] = {"prompts": _prompt_grams, "responses": _response_grams}


def _counts(
    splits: Mapping[str, Sequence[Example]], grams: Callable[[Example, Near], Grams], near: Near
) -> dict[str, Any]:
    """Which n-grams every text holds, by split: sparse, 0 or 1, [texts, n-grams of all splits]."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "synthesis") from error
    found = [grams(example, near) for part in splits.values() for example in part]
    if not any(found):
        return dict.fromkeys(splits)
    matrix = CountVectorizer(analyzer=list, binary=True, dtype=np.float64).fit_transform(found)
    ends = np.cumsum([len(part) for part in splits.values()]).tolist()
    return {name: matrix[end - len(part) : end] for (name, part), end in zip(splits.items(), ends, strict=True)}


def _near(left: Any, right: Any, threshold: float) -> list[tuple[int, int]]:
    """Every pair of rows across whose Jaccard similarity reaches the threshold."""
    if left is None:
        return []
    sizes, others = np.asarray(left.sum(axis=1)).ravel(), np.asarray(right.sum(axis=1)).ravel()
    found: list[tuple[int, int]] = []
    for start in range(0, left.shape[0], _CHUNK):
        shared = (left[start : start + _CHUNK] @ right.T).tocoo()
        rows = start + shared.row
        alike = shared.data / (sizes[rows] + others[shared.col] - shared.data) >= threshold
        found += zip(rows[alike].tolist(), shared.col[alike].tolist(), strict=True)
    return sorted(found)
