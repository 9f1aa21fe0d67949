"""What every engine offers, and the checks that every engine makes before it runs anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from steerwell.core.errors import ArgumentError, EngineError, ModelMismatchError, UnknownNameError
from steerwell.core.records import POOLS, Edit, ModelInfo, Pool, Prompt, Receipt, Response, Sampling, Score, Vectors

T = TypeVar("T")
HERE = "steerwell.engines."
Edits = Edit | None | Sequence[Edit | None]
Samplings = Sampling | Sequence[Sampling]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer; the last one carries the whole `response`. Texts join to `response.text`."""

    text: str
    response: Response | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer that is wanted of a running batch.

    Attributes:
        prompt: what is asked.
        sampling: how the answer is drawn.
        edit: how it is steered; None: not at all.
        logprobs: how many of the likeliest tokens to tell with every token; None: no log-probabilities.
        echo: tell the prompt's tokens' log-probabilities too; needs `logprobs`.
        trace: tell every token's projections and whether it was edited.
    """

    prompt: Prompt
    sampling: Sampling
    edit: Edit | None = None
    logprobs: int | None = None
    echo: bool = False
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, or of an echoed prompt.

    Attributes:
        id: token id.
        text: what it says, decoded alone.
        logprob: nats, of the model's distribution before temperature; None: not asked for, or nothing came before.
        top: the likeliest tokens at its place, (id, text, log-probability), most likely first.
        projections: per term of the edit: h . v before it, of the state that yields this token; activation units.
        edited: per term of the edit: whether its gate was open there.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    projections: tuple[float, ...] = ()
    edited: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer of a running batch.

    Attributes:
        response: the answer.
        prompt_tokens: tokens of the prompt.
        completion_tokens: generated tokens; the end token counts.
        prompt_logprobs: the prompt's tokens, where `echo` was asked for.
    """

    response: Response
    prompt_tokens: int
    completion_tokens: int
    prompt_logprobs: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a running batch has added to an answer; texts join to the answer's.

    Attributes:
        text: the new text.
        tokens: its tokens, where log-probabilities or a trace were asked for.
        answer: the whole, with the last piece.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    answer: Answer | None = None


class Engine(Protocol):
    """A model that can be steered row by row.

    For every row the result is the one that the row would get alone: batched = alone, mixed = separate, no edit =
    unsteered. An engine that cannot apply an edit raises; it never answers unsteered.
    """

    @property
    def info(self) -> ModelInfo:
        """What the loaded model is."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Samplings = ...,
        edits: Edits = ...,
        *,
        progress: Callable[[int], None] | None = ...,
    ) -> list[Response]:
        """Answer every prompt, each row under its own edit or none, in the order given."""
        ...

    def stream(self, prompt: Prompt, sampling: Sampling = ..., edit: Edit | None = ...) -> Iterator[Chunk]:
        """Answer one prompt piece by piece."""
        ...

    def capture(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        edits: Edits = ...,
        *,
        pool: Pool = ...,
    ) -> Vectors:
        """One state per row after every block, [n, n_layers, d_model]; `pool` says of which tokens (`pooled_span`)."""
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], edits: Edits = ...) -> list[Score]:
        """Log-probabilities of given responses, with or without edits."""
        ...

    def tokenise(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer's text, without special tokens."""
        ...

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token of an answer adds; they join to the answer's text."""
        ...

    def close(self) -> None:
        """End the processes that it has started; nothing is asked of it afterwards."""
        ...


def kind_of(engine: Engine) -> str:
    """Which engine answers: the name of its file here (`hf`, `vllm`); "" for one from elsewhere."""
    said: str | None = getattr(engine, "kind", None)  # of one that only hands calls on
    files = (made.__module__.split(".")[2] for made in type(engine).__mro__ if made.__module__.startswith(HERE))
    return said or next(files, "")


def made_by(engine: Engine) -> dict[str, Any]:
    """What a ledger says of who answers: the model, and the engine where it is not `hf`.

    Engines round and draw differently, so none may go on with what another one has begun.
    """
    kind = kind_of(engine)
    return {"model": asdict(engine.info)} | ({} if kind == "hf" else {"engine": kind})


def per_row(name: str, value: T | Sequence[T], rows: int) -> list[T]:
    """One value for every row, or one per row.

    Raises:
        ArgumentError: a sequence of another length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * rows  # type: ignore[list-item]
    if len(value) != rows:
        raise ArgumentError(f"{name}: got {len(value)} for {rows} rows; give one for all, or one per row")
    return list(value)


def row_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of the rows.

    Raises:
        ArgumentError: a single prompt, or something that is none.
    """
    if isinstance(prompts, (str, Prompt)):
        raise ArgumentError(f"prompts: got a single {type(prompts).__name__}; give a list of prompts")
    listed = list(prompts)
    for prompt in listed:
        if not isinstance(prompt, Prompt):
            raise ArgumentError(f"prompts: got {type(prompt).__name__}; expected Prompt (see Prompt.chat)")
    return listed


def row_samplings(sampling: Samplings, rows: int) -> list[Sampling]:
    """The sampling of every row; one `Sampling` for all gives row i the seed `seed + i`.

    Raises:
        ArgumentError: another number of samplings than rows, or something that is none.
    """
    if isinstance(sampling, Sampling):
        return [replace(sampling, seed=sampling.seed + index) for index in range(rows)]
    listed: list[Sampling] = per_row("sampling", sampling, rows)
    for item in listed:
        if not isinstance(item, Sampling):
            raise ArgumentError(f"sampling: got {type(item).__name__}; expected Sampling")
    return listed


def row_edits(edits: Edits, rows: int, info: ModelInfo) -> list[Edit | None]:
    """The edit of every row, each checked against the model.

    Raises:
        ArgumentError: another number of edits than rows, or something that is no edit.
        ModelMismatchError: an edit of another model or width.
        UnknownNameError: a layer that the model does not have.
    """
    listed = per_row("edits", edits, rows)
    for edit in {id(item): item for item in listed if item is not None}.values():
        if not isinstance(edit, Edit):
            raise ArgumentError(f"edits: got {type(edit).__name__}; expected Edit or None (see steering.interventions)")
        if edit.model is not None:
            edit.model.require_same(info, "the edit")
        for term in edit.terms:
            if not 0 <= term.layer < info.n_layers:
                raise UnknownNameError("layer", term.layer, range(info.n_layers))
            if term.direction.shape != (info.d_model,):
                width = len(term.direction)
                raise ModelMismatchError(f"the edit's direction has d_model {width}; {info.name!r} has {info.d_model}")
    return listed


def check_responses(responses: Sequence[Sequence[int]], rows: int, vocabulary: int) -> None:
    """Raise `ArgumentError` unless there is one response per row, none is empty, and every token id exists."""
    if len(responses) != rows:
        raise ArgumentError(f"responses: got {len(responses)} for {rows} prompts; give one per prompt")
    empty = [index for index, tokens in enumerate(responses) if len(tokens) == 0]
    if empty:
        raise ArgumentError(f"responses: row(s) {empty[:5]} hold no token; leave such rows out")
    for index, tokens in enumerate(responses):
        if not (min(tokens) >= 0 and max(tokens) < vocabulary):
            raise ArgumentError(f"responses: row {index} holds token ids outside 0 to {vocabulary - 1}")


def pooled_span(pool: Pool, start: int, end: int) -> tuple[int, int]:
    """The tokens whose mean state stands for a row whose response is tokens `start` to `end - 1`.

    `response_mean`: the response's (A, section 3.2). `prompt_last`: the one that yields the response's first token,
    where a model has read its instructions and has said nothing yet (as in arXiv 2406.11717).

    Raises:
        UnknownNameError: no such pool.
    """
    if pool not in POOLS:
        raise UnknownNameError("pool", pool, POOLS)
    return (start - 1, start) if pool == "prompt_last" else (start, end)


def proven(receipt: Receipt | None, edit: Edit | None) -> Receipt | None:
    """The receipt of an answer that was asked for under `edit`.

    Raises:
        EngineError: the answer was not made under that edit.
    """
    made, asked = receipt and receipt.edit_id, edit and edit.id
    if made != asked:
        raise EngineError(f"an answer was made under edit {made}, but {asked} was asked for; report this as a bug")
    return receipt


def length_sorted(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row indices in batches of at most `size`, longest first, so that padding is small and memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]
