"""A tiny deterministic model in NumPy that keeps every promise of an engine: for tests that shall need no torch.

It reads and writes bytes. Each block mixes a token's state with a fading memory of the states before it, so an edit
of one token reaches all later ones, as in a real model. Rows are run one by one: there is no batch to depend on.
"""

from __future__ import annotations

import math
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from steerwell.core.records import (
    Edit,
    EditTerm,
    FinishReason,
    ModelInfo,
    Pool,
    Prompt,
    Receipt,
    Response,
    Sampling,
    Score,
    TermReceipt,
    TokenTrace,
    Vectors,
)
from steerwell.engines.base import Chunk, Edits, Samplings, check_responses, pooled_span, row_edits, row_samplings

END = 256
FADING = 0.97  # share of a block's memory that the next token leaves: prompts still tell apart where an answer starts
Array = NDArray[np.float64]


class FakeEngine:
    """See `steerwell.engines.base.Engine`.

    Args:
        n_layers: blocks.
        d_model: width of the residual stream.
        seed: of the weights; engines of one seed are the same model.
        language: which concept packs the model reads.
    """

    def __init__(self, n_layers: int = 4, d_model: int = 16, seed: int = 0, language: str = "english") -> None:
        rng = np.random.default_rng(seed)
        self._embedding = rng.normal(size=(END + 1, d_model))
        self._own = rng.normal(size=(n_layers, d_model, d_model)) / math.sqrt(d_model)
        self._past = rng.normal(size=(n_layers, d_model, d_model)) / math.sqrt(d_model)
        self._head = rng.normal(size=(d_model, END + 1))
        signature = tuple(np.round(self._embedding[:16, :16].flatten(), 4).tolist())
        shape = f"fake-{n_layers}-{d_model}"
        self._info = ModelInfo(f"fake-{seed}", "FakeEngine", shape, d_model, n_layers, signature, language)

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        return self._info

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Samplings = Sampling(),  # noqa: B008 - frozen
        edits: Edits = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Answer every prompt, each row under its own edit or none."""
        drawn, steered = row_samplings(sampling, len(prompts)), row_edits(edits, len(prompts), self.info)
        responses = []
        for prompt, how, edit in zip(prompts, drawn, steered, strict=True):
            responses.append(self._answer(prompt, how, edit))
            if progress is not None:
                progress(1)
        return responses

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling(), edit: Edit | None = None) -> Iterator[Chunk]:  # noqa: B008
        """Answer one prompt, character by character."""
        response = self.generate([prompt], sampling, edit)[0]
        yield from (Chunk(letter) for letter in response.text)
        yield Chunk("", response)

    def capture(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        edits: Edits = None,
        *,
        pool: Pool = "response_mean",
    ) -> Vectors:
        """One state per row after every block, [n, n_layers, d_model]."""
        rows = []
        for start, tokens, run in self._forced(prompts, responses, edits):
            states = [run.feed(token, start - 1 <= place) for place, token in enumerate(tokens)]
            first, end = pooled_span(pool, start, len(tokens))
            rows.append(np.mean([state[1] for state in states[first:end]], 0))
        return np.array(rows, np.float32)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], edits: Edits = None) -> list[Score]:
        """Log-probabilities and top-two margins of given responses."""
        scores = []
        for start, tokens, run in self._forced(prompts, responses, edits):
            logits = [run.feed(token, start - 1 <= place)[0] for place, token in enumerate(tokens[:-1])]
            rows = np.array(logits[start - 1 :])
            normalised = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
            normalised -= rows.max(1, keepdims=True)
            logprobs = normalised[np.arange(len(rows)), tokens[start:]].astype(np.float32)
            top = np.sort(rows, 1)
            greedy = rows[np.arange(len(rows)), tokens[start:]] == top[:, -1]
            margins = (top[:, -1] - top[:, -2]).astype(np.float32)
            scores.append(Score(logprobs, margins, greedy, run.receipt(), run.traces(len(rows))))
        return scores

    def tokenise(self, text: str) -> tuple[int, ...]:
        """The text's bytes."""
        return tuple(text.encode())

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each byte adds; a character of several bytes comes with its last one."""
        decoder = getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(bytes([token]), at == len(tokens)) for at, token in enumerate(tokens, 1)]

    def close(self) -> None:
        """Nothing to end."""

    def _answer(self, prompt: Prompt, how: Sampling, edit: Edit | None) -> Response:
        run, written = _Run(self, edit), bytearray()
        start = _encode(prompt)
        for place, token in enumerate(start):
            logits, _ = run.feed(token, place == len(start) - 1)
        uniform = np.random.default_rng(how.seed).random(how.max_new_tokens)
        reason: FinishReason | None = None
        while reason is None:
            token = _draw(logits, how, uniform[len(written)])
            if token == END:
                reason = "stop"
                break
            written.append(token)
            if any(stop in written.decode(errors="replace") for stop in how.stop):
                reason = "stop"
            elif len(written) == how.max_new_tokens:
                reason = "length"
            else:
                logits, _ = run.feed(token, True)
        text = written.decode(errors="replace")
        cut = min((text.find(stop) for stop in how.stop if stop in text), default=len(text))
        return Response(prompt, text[:cut], tuple(written), reason, how, run.receipt())

    def _forced(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], edits: Edits
    ) -> Iterator[tuple[int, list[int], _Run]]:
        check_responses(responses, len(prompts), END + 1)
        for prompt, tokens, edit in zip(prompts, responses, row_edits(edits, len(prompts), self.info), strict=True):
            start = _encode(prompt)
            yield len(start), [*start, *tokens], _Run(self, edit)


@dataclass
class _Tally:
    """What one term did so far: one entry per token in its scope."""

    before: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    fired: list[bool] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


class _Run:
    """One row on its way through the model: the memory of every block, and what each term did."""

    def __init__(self, engine: FakeEngine, edit: Edit | None) -> None:
        self._engine, self._edit = engine, edit
        self._memory = np.zeros((engine.info.n_layers, engine.info.d_model))
        self._tallies = [_Tally() for _ in edit.terms] if edit else []

    def feed(self, token: int, in_response: bool) -> tuple[Array, Array]:
        """Read one token: logits of the next one, and the states after every block [n_layers, d_model]."""
        engine, states = self._engine, []
        state: Array = engine._embedding[token].copy()
        for layer in range(engine.info.n_layers):
            self._memory[layer] = FADING * self._memory[layer] + (1 - FADING) * state
            state = state + np.tanh(engine._own[layer] @ state + engine._past[layer] @ self._memory[layer])
            for term, tally in zip(self._edit.terms if self._edit else (), self._tallies, strict=True):
                if term.layer == layer and (term.position == "all" or in_response):
                    state = _apply(state, term, tally)
            states.append(state)
        return state @ engine._head, np.array(states)

    def traces(self, last: int) -> tuple[TokenTrace, ...]:
        """What every term met and did at the last tokens fed."""
        terms = self._edit.terms if self._edit else ()
        return tuple(
            TokenTrace(term.layer, np.array(tally.before[-last:], np.float32), np.array(tally.fired[-last:], bool))
            for term, tally in zip(terms, self._tallies, strict=True)
        )

    def receipt(self) -> Receipt | None:
        if self._edit is None:
            return None
        pairs = zip(self._edit.terms, self._tallies, strict=True)
        return Receipt(self._edit.id, tuple(_term_receipt(term, tally) for term, tally in pairs))


def _apply(state: Array, term: EditTerm, tally: _Tally) -> Array:
    gate = term.direction if term.gate_direction is None else term.gate_direction
    projection, gating = float(state @ term.direction), float(state @ gate)
    fired = gating < term.gate
    moved = term.offset + term.gain * projection if fired else 0.0
    tally.before.append(projection)
    tally.moved.append(moved)
    tally.fired.append(fired)
    tally.margins.append(abs(gating - term.gate))
    return state + moved * term.direction


def _term_receipt(term: EditTerm, tally: _Tally) -> TermReceipt:
    moved = np.array(tally.moved)
    margin = min(tally.margins, default=math.inf)
    sums = sum(tally.before), float(moved.sum()), float(np.abs(moved).sum())
    return TermReceipt.of(term, len(tally.fired), sum(tally.fired), *sums, margin)


def _draw(logits: Array, how: Sampling, uniform: float) -> int:
    if how.temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / how.temperature)
    order = np.argsort(-weights, kind="stable")
    share = weights[order] / weights.sum()
    nucleus = np.where(share.cumsum() - share < how.top_p, share, 0.0).cumsum()
    place = int((nucleus <= uniform * nucleus[-1]).sum())
    return int(order[min(place, END)])


def _encode(prompt: Prompt) -> list[int]:
    """Bytes of the prompt behind a begin byte; a turn is told by its role's first letter."""
    if prompt.tokens is not None:
        return list(prompt.tokens)
    if prompt.text is not None:
        text = prompt.text
    else:
        text = "".join(f"[{turn.role[0]}]{turn.content}" for turn in prompt.messages) + "[a]"
    return [0, *(text + prompt.prefill).encode()]
