"""An edit as request data: what travels in `SamplingParams.extra_args["steerwell"]`, over HTTP in `vllm_xargs`.

Vectors travel as names of vectors registered before, or as base64 of little-endian float32, never as lists of numbers.
The value is a mapping, or the same as JSON text (which is all that `vllm_xargs` can carry):

    {"terms": [[layer, gate, offset, gain, position, direction, gate_direction], ...],   null: no gate / same direction
     "vectors": {name: base64, ...},      those not registered; a name is the `vector_name` of its content
     "ticket": "...",                     the receipt is kept under it until it is collected
     "start": 17, "end": 40,              first token in the scope of `response`; first token left alone again
     "read": [17, 40],                    mean states of these tokens are kept, too
     "trace": [16, 39]}                   what every term meets at each of these tokens is kept until the receipt is
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from steerwell.core.errors import ArgumentError
from steerwell.core.records import Edit, Position, Vectors

KEY = "steerwell"  # in `extra_args`, and in `additional_config`, which turns steering on
POSITIONS: tuple[Position, ...] = ("all", "response")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server reserves for steering: `additional_config={"steerwell": {...}}`, an empty mapping for these values.

    Attributes:
        max_terms: most terms that one request may have at one layer.
        directions: rows of the device's direction table: distinct vectors of the requests that run at one time.
        captures: requests that may have their states read at one time; 0 leaves the reading op out of the graph.
        traces: tokens of all running requests together whose projections may be kept; 0 leaves them out of the graph.
            Each takes 8 x `max_terms` bytes per layer: 16384 tokens 17 MB in a model of 32 layers, 42 MB in one of 80.
        policy: file of a policy that steers every request (see `policy`); on several machines an absolute path.
        requests: what a request may choose where there is a policy. `locked`, the default: nothing; `open`: its own
            steering instead, or none.
    """

    max_terms: int = 4
    directions: int = 4096
    captures: int = 0
    traces: int = 0
    policy: str | None = None
    requests: Literal["locked", "open"] | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_terms", 1), ("directions", 1), ("captures", 0), ("traces", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name}: got {value!r}; expected a whole number, at least {least}")
        if not isinstance(self.policy, str | None) or self.policy == "":
            raise ArgumentError(f"policy: got {self.policy!r}; expected the path of a policy file")
        if self.requests not in (None, "locked", "open") or (self.requests and not self.policy):
            raise ArgumentError(f"requests: got {self.requests!r}; expected 'locked' or 'open', beside a policy")

    @property
    def locked(self) -> bool:
        """Whether the policy steers every request, whatever that asks for."""
        return self.policy is not None and self.requests != "open"

    @classmethod
    def of(cls, additional: Any) -> Settings | None:
        """Those in a vLLM configuration's `additional_config`; None: steering is off.

        Raises:
            ArgumentError: a setting that does not exist, or a wrong value.
        """
        found = additional.get(KEY) if isinstance(additional, Mapping) else None
        if found is None:
            return None
        given = {name: value for name, value in found.items() if name != "code"}
        unknown = sorted(set(given) - set(asdict(cls())))
        if unknown:
            raise ArgumentError(f"additional_config[{KEY!r}]: unknown {unknown}; known: {sorted(asdict(cls()))}")
        return cls(**given)


AMPLE = Settings(captures=16, traces=16384)  # what `VLLMEngine.load` reserves


@dataclass(frozen=True, slots=True)
class Term:
    """One term as it travels; `direction` and `gate_direction` are names of vectors."""

    layer: int
    gate: float
    offset: float
    gain: float
    position: Position
    direction: str
    gate_direction: str


@dataclass(frozen=True)
class Request:
    """What one request asks for; see the module's text."""

    terms: tuple[Term, ...]
    vectors: Mapping[str, Vectors]
    ticket: str = ""
    start: int | None = None
    end: int | None = None
    read: tuple[int, int] | None = None
    trace: tuple[int, int] | None = None

    @cached_property
    def key(self) -> str:
        """Hash of all that decides what the keys and values of this request's tokens are, its tokens aside."""
        return hashlib.sha256(repr((self.terms, self.start, self.end)).encode()).hexdigest()[:32]

    def first_steered(self, prompt_length: int) -> int:
        """The first token that may be edited."""
        if any(term.position == "all" for term in self.terms):
            return 0
        return self.response_start(prompt_length)

    def response_start(self, prompt_length: int) -> int:
        """The token that yields the first generated one: the first in the scope of position `response`."""
        return prompt_length - 1 if self.start is None else self.start

    @property
    def names(self) -> set[str]:
        """Names of all vectors that it needs."""
        return {name for term in self.terms for name in (term.direction, term.gate_direction)}


def vector_name(vector: Vectors) -> str:
    """A vector's name: the hash of its content, so that a name never means two vectors."""
    return hashlib.sha256(np.ascontiguousarray(vector, "<f4").tobytes()).hexdigest()[:24]


def packed(vector: Vectors) -> str:
    """A vector as text."""
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()


def encode(
    edit: Edit | None,
    *,
    known: Collection[str] = (),
    ticket: str = "",
    start: int | None = None,
    end: int | None = None,
    read: tuple[int, int] | None = None,
    trace: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """An edit as request data.

    Args:
        edit: what to do; None where only states are read.
        known: names of vectors that the server already has.
        ticket: a fresh name for the receipt; empty: none is kept.
        start: see the module's text; `end`, `read` and `trace` too.
    """
    terms, vectors = [], {}
    for term in edit.terms if edit else ():
        pair = [term.direction] if term.gate_direction is None else [term.direction, term.gate_direction]
        names = [vector_name(vector) for vector in pair]
        vectors.update({name: vector for name, vector in zip(names, pair, strict=True) if name not in known})
        gate = None if term.gate == math.inf else term.gate
        terms.append([term.layer, gate, term.offset, term.gain, term.position, names[0], names[-1]])
    spans = {"read": read and list(read), "trace": trace and list(trace)}
    extra = {"ticket": ticket, "start": start, "end": end, **spans}
    found = {"terms": terms, "vectors": {name: packed(vector) for name, vector in vectors.items()}}
    return found | {name: value for name, value in extra.items() if value not in (None, "")}


def decode(value: Any, d_model: int, n_layers: int, settings: Settings, known: Collection[str]) -> Request:
    """Request data, checked.

    Args:
        value: what came: a mapping, or JSON text of one.
        d_model: the model's width; `n_layers` its number of blocks.
        settings: of the server.
        known: names of the vectors that the server has.

    Raises:
        ArgumentError: it cannot be steered so; the request must be refused.
    """
    request = parse(value, d_model)
    _check(request, n_layers, settings, known)
    return request


def parse(value: Any, d_model: int | None = None) -> Request:
    """Request data, its form checked; vectors that came along are read only where the model's width is given.

    Raises:
        ArgumentError: it is no such data.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else dict(value)
        odd = sorted(set(found) - {"terms", "vectors", "ticket", "start", "end", "read", "trace"})
        if odd:
            raise ArgumentError(f"{KEY}: unknown {odd}")
        sent = dict(found.get("vectors") or {}) if d_model is not None else {}
        vectors = {name: vector_of(name, text, d_model or 0) for name, text in sent.items()}
        terms = tuple(_term(item) for item in found["terms"])
        start, end = (None if found.get(name) is None else int(found[name]) for name in ("start", "end"))
        read, trace = (_span(found.get(name)) for name in ("read", "trace"))
        return Request(terms, vectors, str(found.get("ticket", "")), start, end, read, trace)
    except ArgumentError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArgumentError(
            f"{KEY}: cannot be read ({type(error).__name__}: {error}); see engines.vllm.wire"
        ) from error


def vector_of(name: str, text: str, d_model: int) -> Vectors:
    """A vector from text.

    Raises:
        ArgumentError: it is no unit vector of the model's width, or not the one that its name says.
    """
    try:
        vector = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ArgumentError(f"{KEY}: vector {name!r} is no base64 of float32 values: {error}") from error
    if vector.shape != (d_model,) or not abs(float(np.linalg.norm(vector)) - 1) <= 1e-3:
        raise ArgumentError(f"{KEY}: vector {name!r} has shape {vector.shape}; expected one unit vector [{d_model}]")
    if vector_name(vector) != name:
        raise ArgumentError(f"{KEY}: vector {name!r} has other content than its name says ({vector_name(vector)!r})")
    return vector


def _term(item: Any) -> Term:
    layer, gate, offset, gain, position, direction, other = item
    return Term(
        int(layer),
        math.inf if gate is None else float(gate),
        float(offset),
        float(gain),
        position,
        str(direction),
        str(direction if other is None else other),
    )


def _span(value: Any) -> tuple[int, int] | None:
    """First token, and the one after the last; None: not asked for."""
    if not value:
        return None
    first, end = (int(place) for place in value)
    return first, end


def _check(request: Request, n_layers: int, settings: Settings, known: Collection[str]) -> None:
    if not request.terms and request.read is None:
        raise ArgumentError(f"{KEY}: no terms; leave it out for an unsteered request")
    for term in request.terms:
        if not 0 <= term.layer < n_layers:
            raise ArgumentError(f"{KEY}: layer {term.layer}; the model has layers 0 to {n_layers - 1}")
        if not (math.isfinite(term.offset) and math.isfinite(term.gain)) or math.isnan(term.gate):
            raise ArgumentError(f"{KEY}: offset and gain must be finite, gate a number; got {term}")
        if term.position not in POSITIONS:
            raise ArgumentError(f"{KEY}: position {term.position!r}; expected one of {POSITIONS}")
    most = max(Counter(term.layer for term in request.terms).values(), default=0)
    if most > settings.max_terms:
        raise ArgumentError(
            f"{KEY}: {most} terms at one layer; this server takes {settings.max_terms} (setting 'max_terms')"
        )
    if len(request.names) > settings.directions:
        raise ArgumentError(
            f"{KEY}: {len(request.names)} vectors; this server holds {settings.directions} (setting 'directions')"
        )
    lost = [name for name in request.names if name not in request.vectors and name not in known]
    if lost:
        raise ArgumentError(f"{KEY}: vectors {lost[:3]} are neither registered nor sent along")
    if request.read is not None and not settings.captures:
        raise ArgumentError(f"{KEY}: states cannot be read on this server (setting 'captures' is 0)")
    if request.trace is not None:
        first, end = request.trace
        if not (0 <= first < end and request.terms and request.ticket):
            raise ArgumentError(f"{KEY}: trace [{first}, {end}]; expected first < end, terms to trace, and a ticket")
        if end - first > settings.traces:
            raise ArgumentError(
                f"{KEY}: a trace of {end - first} tokens; this server keeps {settings.traces} (setting 'traces'). Ask "
                "for fewer tokens, or for no trace"
            )
