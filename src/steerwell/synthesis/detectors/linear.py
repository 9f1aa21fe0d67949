"""Sentence embeddings of response and prompt, and logistic regression: the fast default.

The two embeddings stand side by side, [n, 2 d]. As one text a long prompt would fill the embedder's window and hide the
response, and the prompt's own vector lets the fit tell the topic from the violation. What a linear reading cannot see
is whether the response fits its prompt: for that take `encoder`.

Embeddings have unit norm and are not scaled. Classes are weighted to equal weight, so P is that of a world with as many
violating as benign examples. C has the least class-balanced log loss on the validation examples; without them, in
5-fold cross-validation over prompts, whose held-out scores also choose the threshold.

Logistic regression has one solution, so a seed does something else: it leaves a tenth of the training prompts out. The
range over seeds says how much a detector hangs on some of its examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_sample_weight

from steerwell.core.errors import ArgumentError, ArtifactError
from steerwell.core.records import Vectors
from steerwell.scoring.embeddings import Embedder, load_embedder
from steerwell.synthesis.detection import by_prompt, f1_threshold
from steerwell.synthesis.detectors._saved import read, write
from steerwell.synthesis.detectors._training import folds, kept_rows, provenance, scored, usable
from steerwell.synthesis.examples import Example, labels

DEFAULT_EMBEDDER = "minilm"
DEFAULT_C = 1.0  # where nothing can choose it
STRENGTHS = tuple(10.0**power for power in range(-2, 4))  # values of C that are tried

Values = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class LinearHead:
    """P(violating) = logistic(features . weights + bias).

    Attributes:
        weights: [d].
        bias: log odds where the features are 0.
    """

    weights: Values
    bias: float

    def scores(self, features: Vectors) -> Values:
        """P(violating) of features [n, d], [n]."""
        chances: Values = expit(np.asarray(features, np.float64) @ self.weights + self.bias)
        return chances


@dataclass(frozen=True, eq=False)
class Detector:
    """See the module; make one with `fit` or `load`.

    Attributes:
        head: what it has learned.
        embedder: name of the embedder it reads with.
        c: inverse strength of the regularisation.
        embed: the embedder itself.
    """

    name: ClassVar[str] = "linear"
    head: LinearHead
    embedder: str
    c: float
    threshold: float
    provenance: Mapping[str, Any]
    embed: Embedder

    @classmethod
    def fit(
        cls,
        train: Sequence[Example],
        validation: Sequence[Example] = (),
        seeds: Sequence[int] = (0,),
        *,
        embedder: str = DEFAULT_EMBEDDER,
        c: float | None = None,
    ) -> Iterator[Self]:
        """One detector per seed; texts are embedded once.

        Args:
            train: labelled examples of both classes; `validation` others, or none.
            seeds: each leaves another tenth of the training prompts out.
            embedder: see `load_embedder`.
            c: inverse strength of the regularisation; None: chosen.

        Raises:
            ArgumentError: a class is missing among the examples with a response.
            UnknownNameError, MissingDependencyError, EngineError: see `load_embedder`.
        """
        learned = usable("train", train)
        held_out = usable("validation", validation) if validation else []
        embed = load_embedder(embedder)
        both = features([*learned, *held_out], embed)
        inputs, targets, groups = both[: len(learned)], labels(learned), by_prompt(learned)
        outside, truth = both[len(learned) :], labels(held_out)
        tried = (c,) if c is not None else STRENGTHS
        chosen, threshold = _chosen(inputs, targets, groups, outside, truth, tried)
        for seed in seeds:
            head = fit_linear(inputs, targets, seed, chosen, groups)
            used = [learned[row] for row in kept_rows(targets, groups, seed)]
            unseen = head.scores(outside)
            cut = f1_threshold(truth, unseen) if held_out else threshold
            yield cls(head, embedder, chosen, cut, provenance(train, held_out, used, seed, unseen), embed)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote; the embedder is loaded by its name.

        Raises:
            ArtifactError: missing, damaged or of another kind.
            UnknownNameError, MissingDependencyError, EngineError: see `load_embedder`.
        """
        arrays, saved = read(folder, cls.name, _Content)
        weights, bias = (arrays.get(key, np.zeros(0)) for key in ("weights", "bias"))
        if weights.ndim != 1 or not weights.size or bias.shape != (1,):
            raise ArtifactError(f"detector {folder} is not usable: it lacks weights [d] and bias [1]; train it anew")
        head = LinearHead(weights.astype(np.float64), float(bias[0]))
        return cls(head, saved.embedder, saved.c, saved.threshold, saved.provenance, load_embedder(saved.embedder))

    def scores(self, examples: Sequence[Example]) -> Values:
        """P(violating), [n]; NaN: a blank response.

        Raises:
            ArgumentError: the embedder gives vectors of another width than it did in training.
        """
        return scored(examples, self._scores)

    def save(self, folder: str | Path) -> Path:
        """Write the detector as a folder."""
        arrays = {"weights": self.head.weights, "bias": np.array([self.head.bias])}
        content = {"embedder": self.embedder, "c": self.c}
        return write(folder, self.name, arrays, content, self.threshold, self.provenance)

    def _scores(self, examples: list[Example]) -> Values:
        inputs = features(examples, self.embed)
        if inputs.shape[1] != len(self.head.weights):
            raise ArgumentError(
                f"embedder: {self.embedder!r} gives {inputs.shape[1]} features; the detector was trained on "
                f"{len(self.head.weights)}; give the embedder it was trained with"
            )
        return self.head.scores(inputs)


@dataclass(frozen=True)
class _Content:
    embedder: str
    c: float
    threshold: float
    provenance: dict[str, Any]


def features(examples: Sequence[Example], embed: Embedder) -> Vectors:
    """Embeddings of response and prompt side by side, float32 [n, 2 d]; every distinct text is embedded once."""
    place: dict[str, int] = {}
    rows = [[place.setdefault(text, len(place)) for text in (example.response, example.prompt)] for example in examples]
    vectors = embed(list(place))
    return vectors[np.array(rows, np.int64).reshape(-1, 2)].reshape(len(examples), -1)


def fit_linear(
    features: Vectors, labels: Rows, seed: int = 0, c: float = DEFAULT_C, groups: Rows | None = None
) -> LinearHead:
    """Logistic regression with balanced classes on what the seed leaves in.

    Args:
        features: [n, d].
        labels: 1 violating, 0 benign, [n].
        seed: leaves a tenth of the groups out (see `_training.kept_rows`).
        c: inverse strength of the regularisation.
        groups: the prompt of every row, numbered from 0, [n]; None: every row is its own.
    """
    truth = np.asarray(labels, np.int64)
    rows = kept_rows(truth, np.arange(len(truth)) if groups is None else groups, seed)
    return _fit(features[rows], truth[rows], c)


def _fit(inputs: Vectors, truth: Rows, c: float) -> LinearHead:
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=10_000).fit(inputs, truth)
    return LinearHead(np.asarray(model.coef_[0], np.float64), float(model.intercept_[0]))


def _chosen(
    inputs: Vectors, targets: Rows, groups: Rows, outside: Vectors, truth: Rows, tried: Sequence[float]
) -> tuple[float, float]:
    """(C, threshold) that do best on validation examples, or in cross-validation where there are none."""
    if len(truth):
        chances = [_fit(inputs, targets, c).scores(outside) for c in tried]
    elif splits := folds(targets, groups):
        truth, chances = targets, [_cross_validated(inputs, targets, splits, c) for c in tried]
    else:
        return (DEFAULT_C if len(tried) > 1 else tried[0]), 0.5
    weights = compute_sample_weight("balanced", truth)
    losses = [log_loss(truth, each, sample_weight=weights) for each in chances]
    best = int(np.argmin(losses))
    return tried[best], f1_threshold(truth, chances[best])


def _cross_validated(inputs: Vectors, targets: Rows, splits: Sequence[tuple[Rows, Rows]], c: float) -> Values:
    """P(violating) of every row from the fold that did not see it, [n]."""
    chances = np.zeros(len(targets))
    for inside, outside in splits:
        chances[outside] = _fit(inputs[inside], targets[inside], c).scores(inputs[outside])
    return chances
