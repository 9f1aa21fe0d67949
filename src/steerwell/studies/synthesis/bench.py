"""The bench: one detector per set of violating examples, everything else equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steerwell.core.records import Vectors
from steerwell.scoring.embeddings import Embedder
from steerwell.synthesis.detection import auroc, by_prompt
from steerwell.synthesis.detectors.linear import features, fit_linear
from steerwell.synthesis.examples import Example, labels

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the detectors trained on one set are worth; one per seed.

    Attributes:
        validation: AUROC on validation examples, [seeds]; `test` on test examples.
        scores: P(violating) of the test examples, [seeds, n].
    """

    validation: Values
    test: Values
    scores: Values


class Bench:
    """Trains and tests linear detectors that differ in their violating examples alone.

    Args:
        benign: in every training; `validation` and `test` in every test.
        embed: texts to vectors.
        c: inverse strength of the regularisation.
        seeds: trainings; each leaves another tenth of the training prompts out.
    """

    def __init__(
        self,
        benign: Sequence[Example],
        validation: Sequence[Example],
        test: Sequence[Example],
        embed: Embedder,
        c: float,
        seeds: int,
    ) -> None:
        self.benign, self.embed, self.c, self.seeds = benign, embed, c, seeds
        self._benign = features(benign, embed)
        self._validation = labels(validation), features(validation, embed)
        self._test = labels(test), features(test, embed)

    def run(self, violating: Sequence[Example]) -> Outcome:
        """Train on these violating examples and test; blank ones are left out. NaN: fewer than two are left."""
        said = [example for example in violating if example.response.strip()]
        truth, inputs = self._test
        if len(said) < 2:
            nothing = np.full(self.seeds, np.nan)
            return Outcome(nothing, nothing, np.full((self.seeds, len(truth)), np.nan))
        both: Vectors = np.concatenate([self._benign, features(said, self.embed)])
        targets = np.repeat(np.array([0, 1], np.int64), (len(self.benign), len(said)))
        groups = by_prompt([*self.benign, *said])
        heads = [fit_linear(both, targets, seed, self.c, groups) for seed in range(self.seeds)]
        known, seen = self._validation
        scores = np.array([head.scores(inputs) for head in heads])
        return Outcome(
            np.array([auroc(known, head.scores(seen)) for head in heads]),
            np.array([auroc(truth, row) for row in scores]),
            scores,
        )
