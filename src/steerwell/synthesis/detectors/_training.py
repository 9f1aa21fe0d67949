"""What the kinds share in training: which examples count, what a seed leaves out, how a choice is scored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from steerwell.core.artifacts import library_versions
from steerwell.core.errors import ArgumentError
from steerwell.synthesis.detection import auroc, by_prompt
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example, labels

LEFT_OUT = 10  # a seed leaves out one prompt in so many
FOLDS = 5
Values = NDArray[np.float64]


def says(example: Example) -> bool:
    """Whether there is a response to read."""
    return bool(example.response.strip())


def scored(examples: Sequence[Example], score: Callable[[list[Example]], Values]) -> Values:
    """`score` of the examples that say something, NaN for the others, [n]."""
    found = np.full(len(examples), math.nan)
    rows = [row for row, example in enumerate(examples) if says(example)]
    if rows:
        found[rows] = score([examples[row] for row in rows])
    return found


def usable(name: str, examples: Sequence[Example]) -> list[Example]:
    """The examples that say something.

    Raises:
        ArgumentError: not both classes among them.
    """
    kept = [example for example in examples if says(example)]
    count = Counter(example.label for example in kept)
    if not (count[BENIGN] and count[VIOLATING]):
        raise ArgumentError(
            f"{name}: got {count[VIOLATING]} violating and {count[BENIGN]} benign examples with a response; "
            "expected some of both classes"
        )
    return kept


def kept_rows(truth: NDArray[np.int64], groups: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Rows that a seed trains on: it leaves out a tenth of the groups, at least one where there are three or more.

    Groups with examples of both classes, of the benign and of the violating class are drawn apart, so that a small
    class loses a tenth too. Groups are prompts, so that an answer is never left out without its counterpart.
    """
    rng = np.random.default_rng(seed)
    classes = np.zeros((int(groups.max()) + 1, 2), bool)
    classes[groups, truth] = True
    dropped: set[int] = set()
    for benign, violating in ((True, True), (True, False), (False, True)):
        members = np.flatnonzero((classes[:, 0] == benign) & (classes[:, 1] == violating))
        count = max(1, len(members) // LEFT_OUT) if len(members) > 2 else 0
        dropped.update(rng.permutation(members)[:count].tolist())
    return np.flatnonzero(~np.isin(groups, list(dropped)))


def folds(
    truth: NDArray[np.int64], groups: NDArray[np.int64], seed: int = 0
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(training rows, held-out rows) of up to 5 folds that share no group; [] where a fold would lack a class."""
    count = min(FOLDS, *(len(set(groups[truth == label].tolist())) for label in (BENIGN, VIOLATING)))
    if count < 2:
        return []
    splits = list(StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(truth, truth, groups))
    whole = all(len(set(truth[rows].tolist())) == 2 for split in splits for rows in split)
    return splits if whole else []


def held_out(examples: Sequence[Example], seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples: about a fifth is held out, and no prompt is on both sides.

    Raises:
        ArgumentError: too few prompts for both classes on both sides.
    """
    splits = folds(labels(examples), by_prompt(examples), seed)
    if not splits:
        raise ArgumentError("train: too few prompts to hold a fifth out with both classes; give validation examples")
    inside, outside = splits[0]
    return [examples[row] for row in inside], [examples[row] for row in outside]


def provenance(
    train: Sequence[Example],
    validation: Sequence[Example],
    used: Sequence[Example],
    seed: int,
    validation_scores: Values | None = None,
) -> dict[str, Any]:
    """What a detector was trained on: `train` as given, `used` of it; and its AUROC on validation, None without."""
    area = auroc(labels(validation), validation_scores) if validation_scores is not None and validation else None
    return {
        "concepts": sorted({example.concept for example in train if example.concept}),
        "seed": seed,
        "train": len(used),
        "train_violating": sum(example.label for example in used),
        "train_blank": sum(not says(example) for example in train),
        "train_sources": dict(sorted(Counter(example.source for example in used).items())),
        "validation": len(validation),
        "validation_auroc": area,
        "versions": library_versions(),
    }
