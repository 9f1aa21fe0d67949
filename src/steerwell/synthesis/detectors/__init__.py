"""Detectors of violations: one kind per file; train, save and load one by its kind's name.

A kind's module offers a class `Detector` with two ways to make one:

* `fit(train, validation, seeds, **options)` yields one detector per seed, in their order; what does not depend on the
  seed (embeddings, activations) is computed once. Validation examples choose settings and the threshold, never weights;
* `load(folder, **options)` reads what `save` wrote.

Every kind leaves examples with a blank response out of training and gives them no score (NaN): there is nothing to
read, and silence is neither violating nor benign. A detector reads prompt and response, not the system prompt, which
would often give the label away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steerwell.core.errors import ArgumentError
from steerwell.core.registry import Registry
from steerwell.synthesis.detection import Detection, by_prompt, detection
from steerwell.synthesis.detectors._saved import read as read_saved
from steerwell.synthesis.detectors._saved import read_kind
from steerwell.synthesis.detectors._saved import write as write_saved
from steerwell.synthesis.examples import Example, labels

__all__ = [
    "DETECTORS",
    "Detector",
    "Trial",
    "load_detector",
    "read_kind",
    "read_saved",
    "train_detector",
    "train_detectors",
    "trial",
    "write_saved",
]

DETECTORS = Registry("detector", __name__, "Detector")


class Detector(Protocol):
    """A trained detector.

    Attributes:
        name: its kind.
        threshold: of P(violating), from which on an example is flagged; chosen on validation examples.
        provenance: what it was trained on and how; JSON values.
    """

    @property
    def name(self) -> str: ...

    @property
    def threshold(self) -> float: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def scores(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """P(violating) of every example, [n]; NaN: its response is blank. Labels are not read."""
        ...

    def save(self, folder: str | Path) -> Path:
        """Write it as a folder that `load_detector` reads; never pickle."""
        ...


def train_detectors(
    kind: str, train: Sequence[Example], validation: Sequence[Example] = (), seeds: Sequence[int] = (0,), **options: Any
) -> Iterator[Detector]:
    """Train one detector per seed; each is yielded as soon as it is ready.

    Args:
        kind: `linear`, `encoder`, `probe`, or a registered one.
        train: labelled examples of both classes.
        validation: others, which share no prompt with them; none: the kind says what it does without.
        seeds: what a seed means is the kind's to say.
        options: the kind's own.

    Raises:
        UnknownNameError: no such kind.
        ArgumentError: a class is missing.
    """
    found: Iterator[Detector] = DETECTORS.get(kind).fit(train, validation, seeds, **options)
    return found


def train_detector(
    kind: str, train: Sequence[Example], validation: Sequence[Example] = (), seed: int = 0, **options: Any
) -> Detector:
    """Train one detector; see `train_detectors`."""
    return next(train_detectors(kind, train, validation, (seed,), **options))


@dataclass(frozen=True, eq=False)
class Trial:
    """A kind of detector, trained and tested.

    Attributes:
        detector: the first seed's: which one is kept does not depend on how well it did.
        figures: mean over the seeds; intervals over the test examples' prompts.
        scores: P(violating) of the test examples, [seeds, n].
    """

    detector: Detector
    figures: Detection
    scores: NDArray[np.float64]


def trial(
    kind: str,
    train: Sequence[Example],
    validation: Sequence[Example],
    test: Sequence[Example],
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Trial:
    """Train one detector per seed and test them on examples that none of them saw.

    Args:
        kind, train, validation, seeds, options: see `train_detectors`.
        test: labelled examples that share no prompt with the others; see `steerwell.synthesis.data.split`.
        progress: called with 1 after every seed.
    """
    if not seeds:
        raise ArgumentError("seeds: got none; expected one or more, such as (0, 1, 2)")
    kept, rows, thresholds = None, [], []
    for each in train_detectors(kind, train, validation, seeds, **options):
        kept = kept or each
        rows.append(each.scores(test))
        thresholds.append(each.threshold)
        if progress is not None:
            progress(1)
    if kept is None:
        raise ArgumentError(f"kind: {kind!r} made no detector for seeds {list(seeds)}; mend its fit")
    scores = np.stack(rows)
    return Trial(kept, detection(labels(test), scores, threshold=thresholds, groups=by_prompt(test)), scores)


def load_detector(folder: str | Path, **options: Any) -> Detector:
    """Load a saved detector of any kind.

    Args:
        folder: where `save` wrote it.
        options: of the kind's `load`, such as `engine=` of a probe.

    Raises:
        ArtifactError: nothing there, damaged, or another kind of artifact.
        UnknownNameError: of a kind that is not installed here.
    """
    found: Detector = DETECTORS.get(read_kind(folder)).load(folder, **options)
    return found
