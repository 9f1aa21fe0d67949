"""The steering direction itself as a detector, on the states of the model that it was made for.

A response's mean state is projected on the direction, which points to the aligned class; P(violating) is a logistic
function of the projection that falls with it. The direction is not learned here: training examples say where the
middle lies and how fast the probability turns (a one-dimensional logistic fit with balanced classes), validation
examples say which layer has the highest AUROC. Without training examples, or where they would turn the direction round,
the direction's own calibration serves: two normal classes with means `mu_aligned`, `mu_violating` and their pooled
variance, and the middle at its boundary. Without validation examples the training examples choose the layer, and
without either the direction's largest Cohen's d.

The model reads the prompt as one user turn, and the response as its answer, without system prompt. An engine is needed
to score. The direction leaves nothing to chance, so a seed leaves a tenth of the training prompts out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from steerwell.core.errors import ArgumentError, ArtifactError
from steerwell.core.records import Calibration, Direction, ModelInfo, Prompt, Vectors
from steerwell.engines.base import Engine
from steerwell.synthesis.detection import auroc, by_prompt, f1_threshold
from steerwell.synthesis.detectors._saved import read, write
from steerwell.synthesis.detectors._training import kept_rows, provenance, says, scored, usable
from steerwell.synthesis.examples import Example, labels
from steerwell.testbed.bundled import BUNDLED, bundled_path

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Detector:
    """See the module; make one with `fit` or `load`.

    Attributes:
        engine: reads the states; the model that the direction was made for.
        model: what that model is.
        layer: whose output is read.
        vector: the unit direction at that layer, [d_model].
        slope: log odds of violating per activation unit towards the violating class; positive.
        boundary: the projection where both classes are as likely, activation units.
    """

    name: ClassVar[str] = "probe"
    engine: Engine
    model: ModelInfo
    layer: int
    vector: Vectors
    slope: float
    boundary: float
    threshold: float
    provenance: Mapping[str, Any]

    @classmethod
    def fit(
        cls,
        train: Sequence[Example] = (),
        validation: Sequence[Example] = (),
        seeds: Sequence[int] = (0,),
        *,
        engine: Engine,
        direction: Direction,
        layer: int | None = None,
    ) -> Iterator[Self]:
        """One detector per seed; states are read once.

        Args:
            train: labelled examples of both classes, or none.
            validation: others, or none.
            seeds: each leaves another tenth of the training prompts out.
            engine: the model that the direction was made for.
            direction: the concept's.
            layer: 0-based block; None: chosen.

        Raises:
            ModelMismatchError: the direction was made for another model.
            UnknownNameError: no such layer.
            ArgumentError: a class is missing among the examples with a response.
        """
        direction.model.require_same(engine.info, "the direction")
        learned = _usable("train", train, engine)
        held_out = _usable("validation", validation, engine)
        along = _projections(engine, [*learned, *held_out], direction.vectors)
        inside, outside = along[: len(learned)], along[len(learned) :]
        targets, truth, groups = labels(learned), labels(held_out), by_prompt(learned)
        if layer is None:
            judged = (truth, outside) if held_out else (targets, inside)
            layer = _best_layer(*judged, direction.calibration)
        vector, own = direction.at(layer)
        for seed in seeds:
            rows = kept_rows(targets, groups, seed) if learned else np.zeros(0, np.int64)
            slope, boundary, fitted = _fitted(inside[rows, layer], targets[rows]) or _own(direction, own)
            unseen = _logistic(outside[:, layer], slope, boundary)
            cut = f1_threshold(truth, unseen) if held_out else 0.5
            made = provenance(train, held_out, [learned[row] for row in rows], seed, unseen)
            made |= {"calibration": "training examples" if fitted else "the direction's own"}
            made |= {"concept": direction.concept, "concept_hash": direction.concept_hash, "method": direction.method}
            yield cls(engine, direction.model, layer, vector, slope, boundary, cut, made)

    @classmethod
    def load(cls, folder: str | Path, *, engine: Engine | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            folder: where it lies.
            engine: the model it was made for; None: loaded by its name.

        Raises:
            ArtifactError: missing, damaged or of another kind.
            ModelMismatchError: another model.
            EngineError: the model cannot be loaded.
        """
        arrays, saved = read(folder, cls.name, _Content)
        vector = arrays.get("vector", np.zeros(0, np.float32))
        if vector.shape != (saved.model.d_model,) or not 0 <= saved.layer < saved.model.n_layers:
            raise ArtifactError(f"detector {folder} is not usable: vector or layer do not fit its model; train it anew")
        if engine is None:
            from steerwell.engines.hf import HFEngine

            engine = HFEngine.load(saved.model.name)
        saved.model.require_same(engine.info, "the detector")
        where = (engine, saved.model, saved.layer, vector.astype(np.float32))
        return cls(*where, saved.slope, saved.boundary, saved.threshold, saved.provenance)

    def scores(self, examples: Sequence[Example]) -> Values:
        """P(violating), [n]; NaN: a response without tokens.

        Raises:
            ArgumentError: an exchange does not fit into the model's context.
        """
        return scored(examples, self._scores)

    def save(self, folder: str | Path) -> Path:
        """Write the detector as a folder; the model is not in it, only what it is."""
        model = self.model
        if model.name == str(bundled_path()):
            model = replace(model, name=BUNDLED)  # found again wherever the package lies
        content = {"model": asdict(model), "layer": self.layer, "slope": self.slope, "boundary": self.boundary}
        return write(folder, self.name, {"vector": self.vector}, content, self.threshold, self.provenance)

    def _scores(self, examples: list[Example]) -> Values:
        found = np.full(len(examples), math.nan)
        rows = [row for row, example in enumerate(examples) if self.engine.tokenise(example.response)]
        vectors = np.zeros((self.model.n_layers, self.model.d_model), np.float32)
        vectors[self.layer] = self.vector
        along = _projections(self.engine, [examples[row] for row in rows], vectors)
        found[rows] = _logistic(along[:, self.layer], self.slope, self.boundary)
        return found


@dataclass(frozen=True)
class _Content:
    model: ModelInfo
    layer: int
    slope: float
    boundary: float
    threshold: float
    provenance: dict[str, Any]


def _usable(name: str, examples: Sequence[Example], engine: Engine) -> list[Example]:
    """Examples with tokens to read; none given: none."""
    if not examples:
        return []
    return usable(name, [example for example in examples if says(example) and engine.tokenise(example.response)])


def _projections(engine: Engine, examples: Sequence[Example], vectors: Vectors) -> Values:
    """Mean response state of every example along the direction of every layer, [n, n_layers]."""
    if not examples:
        return np.zeros((0, len(vectors)))
    prompts = [Prompt.chat(item.prompt) if item.prompt.strip() else Prompt(text="") for item in examples]
    states = engine.capture(prompts, [engine.tokenise(item.response) for item in examples])
    along: Values = np.einsum("nld,ld->nl", states.astype(np.float64), vectors.astype(np.float64))
    return along


def _best_layer(truth: NDArray[np.int64], along: Values, calibration: Sequence[Calibration]) -> int:
    """The layer with the highest AUROC, the first of equals; without examples the one with the largest Cohen's d."""
    if not len(truth):
        return int(np.argmax([layer.cohens_d for layer in calibration]))
    return int(np.argmax([auroc(truth, -along[:, layer]) for layer in range(len(calibration))]))


def _fitted(along: Values, truth: NDArray[np.int64]) -> tuple[float, float, bool] | None:
    """(slope, boundary, True) by logistic regression; None where the examples do not fall along the direction."""
    spread = float(along.std()) if len(along) else 0.0
    if spread == 0:
        return None
    centre = float(along.mean())
    model = LogisticRegression(class_weight="balanced").fit(((along - centre) / spread)[:, None], truth)
    weight, bias = float(model.coef_[0, 0]), float(model.intercept_[0])
    if weight >= 0:  # violating lies where the projection is low, or the direction would be turned round
        return None
    return -weight / spread, centre - spread * bias / weight, True


def _own(direction: Direction, calibration: Calibration) -> tuple[float, float, bool]:
    """(slope, boundary, False) by the direction's own classes.

    Raises:
        ArgumentError: they were read elsewhere, or have no spread.
    """
    variance = (calibration.sigma_aligned**2 + calibration.sigma_violating**2) / 2
    pool = direction.provenance.get("pool", "response_mean")
    if pool != "response_mean" or not (calibration.separation > 0 and variance > 0):
        raise ArgumentError(
            f"direction: its own calibration (of {pool} states, separation {calibration.separation:.3g}, variance "
            f"{variance:.3g}) gives no probability of a response; give training examples that it separates"
        )
    return calibration.separation / variance, calibration.boundary, False


def _logistic(along: Values, slope: float, boundary: float) -> Values:
    chances: Values = expit(slope * (boundary - along))
    return chances
