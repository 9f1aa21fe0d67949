"""Frozen records that walk between the rooms. Vectors are NumPy float32; nothing here knows torch.

Names: `layer` is the 0-based index of a decoder block and means that block's output, which Hugging Face calls
`hidden_states[layer + 1]`. A projection is a dot product with a unit direction, in activation units.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from steerwell.core.errors import ArgumentError, ModelMismatchError, UnknownNameError

Role = Literal["system", "user", "assistant"]
Position = Literal["all", "response"]
Pool = Literal["response_mean", "prompt_last"]
POOLS: tuple[Pool, ...] = get_args(Pool)
Toward = Literal["aligned", "violating"]
FinishReason = Literal["stop", "length"]
Vectors = NDArray[np.float32]

# Two weight samples of one lineage (other dtype, quantised, fine-tuned) stay close; two trainings do not.
SAME_LINEAGE = 0.9


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked: a conversation, plain text for a model without chat template, or token ids.

    Attributes:
        messages: turns, oldest first; earlier assistant turns count as prompt.
        text: plain text, used instead of `messages`; empty text is the model's begin token alone.
        prefill: the first words of the answer, put into the model's mouth; they count as prompt.
        tokens: token ids as they are, used instead of `messages`; nothing is added to them.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    prefill: str = ""
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = {"messages": bool(self.messages), "text": self.text is not None, "tokens": self.tokens is not None}
        if sum(given.values()) != 1:
            got = " and ".join(name for name, there in given.items() if there) or "none"
            raise ArgumentError(f"Prompt: got {got} of 'messages', 'text' and 'tokens'; give exactly one")

    @property
    def system(self) -> str:
        """The system prompt; "" where there is none."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else ""

    @classmethod
    def chat(cls, user: str, system: str | None = None, prefill: str = "") -> Prompt:
        """A single-turn conversation; an empty or missing `system` adds no system turn."""
        turns = [Message("system", system)] if system else []
        return cls(messages=(*turns, Message("user", user)), prefill=prefill)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        max_new_tokens: at least 1; the end token counts.
        stop: strings that end the answer; they are not part of it.
        seed: where one `Sampling` serves n rows, row i draws with `seed + i`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 42

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ArgumentError(f"temperature: got {self.temperature}; expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p: got {self.top_p}; expected a share above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise ArgumentError(f"max_new_tokens: got {self.max_new_tokens}; expected 1 or more")
        if self.seed < 0:
            raise ArgumentError(f"seed: got {self.seed}; expected 0 or more")
        if isinstance(self.stop, str) or any(not text for text in self.stop):
            raise ArgumentError(f"stop: got {self.stop!r}; expected a tuple of strings that are not empty")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a direction must know of its model, so that it is never used on another one.

    Attributes:
        name: hub id or folder, for people.
        architecture: class name of the model.
        config_hash: hash of the configuration fields that shape the residual stream.
        d_model: width of the residual stream.
        n_layers: number of decoder blocks.
        signature: a fixed sample of the input embeddings. Copies in another dtype, quantised or fine-tuned, agree
            closely; a model trained anew does not. Empty: not known.
        language: "english", or "testbed" for models of the bundled world.
    """

    name: str
    architecture: str
    config_hash: str
    d_model: int
    n_layers: int
    signature: tuple[float, ...] = ()
    language: str = "english"

    def require_same(self, other: ModelInfo, what: str) -> None:
        """Raise `ModelMismatchError` unless `other` has this model's shape and lineage."""
        if self == other:  # as a rule, and a request is not to wait for the arithmetic below
            return
        for label in ("d_model", "n_layers", "config_hash"):
            made, got = getattr(self, label), getattr(other, label)
            if made != got:
                raise ModelMismatchError(
                    f"{what} was made for {self.name!r} ({label} {made}), but the model is {other.name!r} "
                    f"({label} {got}); fit it anew on this model"
                )
        if self.signature and other.signature:
            likeness = _cosine(np.array(self.signature), np.array(other.signature))
            if not likeness >= SAME_LINEAGE:
                raise ModelMismatchError(
                    f"{what} was made for {self.name!r}; {other.name!r} has the same shape but other weights "
                    f"(embedding likeness {likeness:.2f}, expected {SAME_LINEAGE} or more); fit it anew on this model"
                )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where the two classes lie along a layer's direction: pooled projections, in activation units (A, section 3.2).

    Attributes:
        boundary: decision boundary m between the classes.
        mu_aligned: mean projection of the aligned class; larger than `mu_violating` by orientation.
        mu_violating: mean projection of the violating class.
        sigma_aligned: standard deviation of the aligned class.
        sigma_violating: standard deviation of the violating class.
        cohens_d: class separation over the pooled standard deviation; 0 when nothing varies.
        cosine_mean_difference: cosine between the direction and the mean difference.
        split_half: mean cosine between directions fitted on random halves of the pairs; NaN: too few pairs that differ.
        n: number of pairs.
    """

    boundary: float
    mu_aligned: float
    mu_violating: float
    sigma_aligned: float
    sigma_violating: float
    cohens_d: float
    cosine_mean_difference: float
    split_half: float
    n: int

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not (-math.inf < value < math.inf or (item.name == "split_half" and math.isnan(value))):
                raise ArgumentError(f"{item.name}: got {value}; expected a finite number")

    @property
    def separation(self) -> float:
        """Distance between the class means, dmu; positive."""
        return self.mu_aligned - self.mu_violating

    def swapped(self) -> Calibration:
        """The same classes seen along -v, violating as the class to reach; the separation stays (METHODS section 3)."""
        return replace(
            self,
            boundary=-self.boundary,
            mu_aligned=-self.mu_violating,
            mu_violating=-self.mu_aligned,
            sigma_aligned=self.sigma_violating,
            sigma_violating=self.sigma_aligned,
        )


@dataclass(frozen=True, eq=False)
class Direction:
    """A concept's unit direction and its calibration at every layer of one model.

    Attributes:
        concept: name of the concept; `concept_hash` is the hash of its content.
        method: name of the estimator.
        model: the model it was made on.
        vectors: unit directions, shape [n_layers, d_model], pointing to the aligned class.
        mean_difference: mean aligned minus mean violating state, not normalised, shape [n_layers, d_model].
        calibration: one per layer.
        provenance: seeds, sampling, counts and library versions; JSON values only.
    """

    concept: str
    concept_hash: str
    method: str
    model: ModelInfo
    vectors: Vectors
    mean_difference: Vectors
    calibration: tuple[Calibration, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.model.n_layers, self.model.d_model)
        for name in ("vectors", "mean_difference"):
            array = getattr(self, name)
            if array.shape != shape:
                raise ArgumentError(f"{name}: got shape {array.shape}; the model needs [n_layers, d_model] = {shape}")
            if not np.isfinite(array).all():
                raise ArgumentError(f"{name}: holds NaN or infinity; fit the direction anew")
        if len(self.calibration) != shape[0]:
            raise ArgumentError(f"calibration: got {len(self.calibration)} layers; the model has {shape[0]}")
        norms = np.linalg.norm(self.vectors, axis=1)
        if not np.allclose(norms, 1.0, atol=1e-3):
            worst = int(np.abs(norms - 1).argmax())
            raise ArgumentError(f"vectors: layer {worst} has norm {norms[worst]:.4g}; expected unit norm")

    def at(self, layer: int) -> tuple[Vectors, Calibration]:
        """Direction [d_model] and calibration of one layer."""
        if not 0 <= layer < self.model.n_layers:
            raise UnknownNameError("layer", layer, range(self.model.n_layers))
        return self.vectors[layer], self.calibration[layer]


@dataclass(frozen=True, eq=False)
class EditTerm:
    """One gated affine edit of one layer: `h <- h + 1[h . c < gate] (offset + gain (h . v)) v`.

    Attributes:
        layer: block whose output is edited.
        direction: v, unit norm, shape [d_model].
        gate: threshold g; infinity edits every token.
        offset: a, in activation units.
        gain: b, dimensionless.
        position: `all` tokens, or `response`: from the one that yields the first generated token on.
        gate_direction: c, shape [d_model]; None means v.
        label: what made it, for people and receipts.
    """

    layer: int
    direction: Vectors
    gate: float
    offset: float
    gain: float
    position: Position = "all"
    gate_direction: Vectors | None = None
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("direction", "gate_direction"):
            array = getattr(self, name)
            if array is None:
                continue
            if not isinstance(array, np.ndarray):
                raise ArgumentError(f"{name}: got {type(array).__name__}; expected a NumPy array [d_model]")
            if array.ndim != 1 or not np.isfinite(array).all() or abs(float(np.linalg.norm(array)) - 1) > 1e-3:
                raise ArgumentError(
                    f"{name}: got shape {array.shape}, norm {np.linalg.norm(array):.4g}; "
                    "expected one finite unit vector [d_model]"
                )
        if self.gate_direction is not None and self.gate_direction.shape != self.direction.shape:
            raise ArgumentError("gate_direction: its width differs from the direction's")
        if not (math.isfinite(self.offset) and math.isfinite(self.gain)) or math.isnan(self.gate):
            raise ArgumentError(
                f"offset, gain, gate: got {self.offset}, {self.gain}, {self.gate}; "
                "offset and gain must be finite, gate must be a number"
            )
        if self.position not in ("all", "response"):
            raise UnknownNameError("position", self.position, ("all", "response"))


@dataclass(frozen=True, eq=False)
class Edit:
    """What is done to one row's activations: terms in the order in which they apply. It is data, not code.

    Terms of one layer apply in list order, each reading the state that the one before left.
    `model` is what the edit was made for; None (a hand-made edit) checks the width and the layer only.
    """

    terms: tuple[EditTerm, ...]
    model: ModelInfo | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise ArgumentError("terms: got none; to leave a row unsteered pass None instead of an Edit")

    @classmethod
    def compose(cls, edits: Iterable[Edit]) -> Edit:
        """One edit that applies several in list order."""
        parts = list(edits)
        models = [part.model for part in parts if part.model is not None]
        for model in models[1:]:
            models[0].require_same(model, "the first of the composed edits")
        return cls(tuple(term for part in parts for term in part.terms), models[0] if models else None)

    @cached_property
    def id(self) -> str:
        """Content hash: equal edits have equal ids, whatever made them."""
        digest = hashlib.sha256()
        for term in self.terms:
            numbers = (float(term.gate), float(term.offset), float(term.gain))
            digest.update(repr((int(term.layer), *numbers, term.position)).encode())
            digest.update(np.ascontiguousarray(term.direction, np.float32).tobytes())
            gate = term.direction if term.gate_direction is None else term.gate_direction
            digest.update(np.ascontiguousarray(gate, np.float32).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class TermReceipt:
    """What one term did to one response.

    Attributes:
        label: the term's label; `layer` and `position` are the term's.
        tokens_seen: tokens in the term's scope that went through the layer.
        tokens_edited: those whose gate was open.
        projection_before: mean projection over the seen tokens before the edit, in activation units; NaN: none seen.
        projection_after: the same after the edit.
        perturbation: mean |h' - h| over the edited tokens, in activation units; 0 when none was edited.
        gate_margin: smallest |h . c - g| over the seen tokens; infinity without a gate.
    """

    label: str
    layer: int
    position: Position
    tokens_seen: int
    tokens_edited: int
    projection_before: float
    projection_after: float
    perturbation: float
    gate_margin: float

    @classmethod
    def of(
        cls, term: EditTerm, seen: float, edited: float, before: float, moved: float, distance: float, margin: float
    ) -> TermReceipt:
        """From what was counted and added up: tokens seen and edited; over the seen ones the sum of projections before
        the edit, of displacements and of their sizes; and the smallest margin."""
        return cls(
            label=term.label,
            layer=term.layer,
            position=term.position,
            tokens_seen=int(seen),
            tokens_edited=int(edited),
            projection_before=before / seen if seen else math.nan,
            projection_after=(before + moved) / seen if seen else math.nan,
            perturbation=distance / edited if edited else 0.0,
            gate_margin=margin,
        )

    @property
    def gate_rate(self) -> float:
        """Share of the seen tokens that were edited."""
        return self.tokens_edited / self.tokens_seen if self.tokens_seen else math.nan


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof of what steering did to one response. Every steered response carries one."""

    edit_id: str
    terms: tuple[TermReceipt, ...]

    @property
    def tokens_edited(self) -> int:
        """Edited tokens, summed over the terms."""
        return sum(term.tokens_edited for term in self.terms)

    @property
    def gate_rate(self) -> float:
        """Edited share of the seen tokens, over all terms."""
        seen = sum(term.tokens_seen for term in self.terms)
        return self.tokens_edited / seen if seen else math.nan

    @property
    def perturbation(self) -> float:
        """Mean |h' - h| over all edited tokens of all terms, in activation units; 0 when none was edited."""
        total = sum(term.perturbation * term.tokens_edited for term in self.terms)
        return total / self.tokens_edited if self.tokens_edited else 0.0


def receipt_row(receipt: Receipt | None) -> dict[str, Any] | None:
    """A receipt as JSON values; None stays None (not steered), and NaN and infinity, which JSON lacks, become None."""
    if receipt is None:
        return None
    terms = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value
         for name, value in asdict(term).items()}
        for term in receipt.terms
    ]  # fmt: skip
    return {"edit_id": receipt.edit_id, "tokens_edited": receipt.tokens_edited, "terms": terms}


@dataclass(frozen=True, slots=True)
class Response:
    """One answer.

    Attributes:
        prompt: what was asked.
        text: the answer, without special tokens and without what follows a stop string.
        token_ids: generated tokens, without the end token.
        finish_reason: `stop` (end token or stop string) or `length`.
        sampling: how it was drawn, with this row's own seed.
        receipt: what steering did; None means that the row was not steered.
    """

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    sampling: Sampling
    receipt: Receipt | None = None


@dataclass(frozen=True, eq=False, slots=True)
class TokenTrace:
    """What one term met and did, token by token: entry t is of the token that yields the response's token t.

    Attributes:
        layer: the term's layer.
        projection: h . v before the edit, activation units, shape [n_tokens].
        edited: whether it was edited, shape [n_tokens].
    """

    layer: int
    projection: Vectors
    edited: NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Score:
    """Teacher-forced reading of one response.

    Attributes:
        logprobs: log-probability of each response token, nats, shape [n_tokens].
        margins: top logit minus second logit at each of these positions, shape [n_tokens].
        greedy: whether each token has the top logit, shape [n_tokens].
        receipt: what steering did; None means that the row was not steered.
        traces: the same token by token, one per term of the edit, in its order.
    """

    logprobs: Vectors
    margins: Vectors
    greedy: NDArray[np.bool_]
    receipt: Receipt | None = None
    traces: tuple[TokenTrace, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's scores of one answer, 0 to 100.

    Attributes:
        trait: 100 is fully the aligned pole, 0 fully the violating one.
        coherence: fluent, on topic, not repetitive; independent of the trait.
        reason: what the scores rest on, for people.
        violation: how fully the violating pole shows; 100 - trait where a judge does not tell them apart. A text that
            shows neither pole, gibberish above all, is low on both.
    """

    trait: float
    coherence: float
    reason: str = ""
    violation: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.violation):
            object.__setattr__(self, "violation", 100 - self.trait)


def _cosine(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Cosine of two vectors; NaN where the shapes differ or one is zero."""
    if left.shape != right.shape:
        return math.nan
    norm = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / norm if norm else math.nan
