"""The engine that users hold: load, generate, stream, capture, score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerwell.core.records import Edit, ModelInfo, Pool, Prompt, Response, Sampling, Score, Vectors
from steerwell.engines.base import (
    Asked,
    Chunk,
    Edits,
    Samplings,
    check_responses,
    length_sorted,
    pooled_span,
    row_edits,
    row_prompts,
    row_samplings,
)
from steerwell.engines.hf.batch import Batch, decode
from steerwell.engines.hf.model import LoadedModel, load
from steerwell.engines.hf.plan import Plan, Scope
from steerwell.engines.rows import Row
from steerwell.engines.text import TextStream
from steerwell.testbed.bundled import BUNDLED

GREEDY = Sampling()


class HFEngine:
    """Any Hugging Face causal language model; see `steerwell.engines.base.Engine` for what every engine promises.

    Args:
        model: a loaded model.
        batch_size: rows per forward pass; longer lists are cut into batches sorted by length.
    """

    def __init__(self, model: LoadedModel, batch_size: int = 32) -> None:
        self._model, self.batch_size = model, batch_size

    @classmethod
    def load(
        cls,
        name: str = BUNDLED,
        *,
        dtype: str = "auto",
        device_map: Any = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        blocks: str | None = None,
        chat_options: Mapping[str, Any] | None = None,
        batch_size: int = 32,
    ) -> Self:
        """Load a model.

        Args:
            name: `pilot` (the bundled model), a hub id, a local folder, or a `.gguf` file.
            dtype: `auto` (as saved), `float32`, `float16` or `bfloat16`.
            device_map: as in transformers, `"auto"` or `"cuda"` for instance.
            gguf_file: a GGUF file inside the hub repository or folder `name`.
            revision: branch, tag or commit of a hub id.
            trust_remote_code: run code that comes with the model.
            blocks: dotted path of the list of decoder blocks, where it cannot be found by structure.
            chat_options: variables for the chat template, such as `{"enable_thinking": False}`.
            batch_size: rows per forward pass.

        Raises:
            EngineError: the model cannot be loaded, or its decoder blocks cannot be found.
        """
        model = load(
            name,
            dtype=dtype,
            device_map=device_map,
            gguf_file=gguf_file,
            revision=revision,
            trust_remote_code=trust_remote_code,
            blocks=blocks,
            chat_options=chat_options,
        )
        return cls(model, batch_size)

    @property
    def info(self) -> ModelInfo:
        """What the loaded model is."""
        return self._model.info

    @property
    def loaded(self) -> LoadedModel:
        """The loaded model itself, for what has to know its tokenizer or its limits."""
        return self._model

    def close(self) -> None:
        """Nothing to end: everything runs in this process."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Samplings = GREEDY,
        edits: Edits = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Answer every prompt, each row under its own edit or none.

        Args:
            prompts: one per row.
            sampling: one for all (row i draws with seed + i), or one per row.
            edits: one for all, or one per row; None leaves a row unsteered.
            progress: called with the number of rows finished since the last call.

        Returns:
            Responses in the order of the prompts; every steered one carries a receipt.
        """
        rows = self._rows(prompts, sampling, edits)
        for batch in length_sorted([len(row.prompt_ids) for row in rows], self.batch_size):
            for _ in decode(self._model, [rows[index] for index in batch]):
                pass
            if progress is not None:
                progress(len(batch))
        return [row.response() for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling = GREEDY, edit: Edit | None = None) -> Iterator[Chunk]:
        """Answer one prompt piece by piece; the last chunk carries the response. Arguments are checked at once."""
        return self._chunks(self._rows([prompt], sampling, edit)[0])

    def _chunks(self, row: Row) -> Iterator[Chunk]:
        for _ in decode(self._model, [row]):
            piece = row.text.fresh(row.tokens, done=row.finish is not None)
            if piece:
                yield Chunk(piece)
        yield Chunk("", row.response())

    def capture(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        edits: Edits = None,
        *,
        pool: Pool = "response_mean",
    ) -> Vectors:
        """One state per row after every block, float32 [n, n_layers, d_model], in one pass.

        Args:
            prompts: one per row.
            responses: token ids of each row's answer (`Response.token_ids`), none empty.
            edits: as in `generate`; states are read after the edits of their layer.
            pool: `response_mean`, the mean over the response's tokens, or `prompt_last`, the token that yields its
                first one.
        """
        prompts = row_prompts(prompts)
        states = np.zeros((len(prompts), self.info.n_layers, self.info.d_model), np.float32)
        for batch, ids, scope, spans, plan in self._forced(prompts, responses, edits, tail=0):
            weights = torch.zeros(ids.shape, device=ids.device)
            for row, span in enumerate(spans):
                first, end = pooled_span(pool, *span)
                weights[row, first:end] = 1 / (end - first)
            with torch.inference_mode():
                states[batch] = self._model.pooled(ids, weights, plan, scope)
            plan.receipts()
        return states

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], edits: Edits = None) -> list[Score]:
        """Log-probabilities (nats), top-two margins (logits) and greediness of every given response token.

        Args:
            prompts: one per row.
            responses: token ids of each row's answer, none empty.
            edits: as in `generate`.
        """
        prompts = row_prompts(prompts)
        scores: list[Score | None] = [None] * len(prompts)
        for batch, ids, scope, spans, plan in self._forced(prompts, responses, edits, tail=1):
            keep = ids.shape[1] - min(start for start, _ in spans) + 1
            with torch.inference_mode():
                logits = self._model.read(ids, plan, scope, keep)
                read = [_read(logits[row], ids[row], start, end) for row, (start, end) in enumerate(spans)]
            traces = plan.traced([(start - 1, end - 1) for start, end in spans])
            for index, reading, receipt, traced in zip(batch, read, plan.receipts(), traces, strict=True):
                scores[index] = Score(*reading, receipt, traced)
        return [score for score in scores if score is not None]

    def tokenise(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer's text, without special tokens."""
        return self._model.codec.tokens(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._model.codec.decode(tokens)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token of an answer adds; a character of several tokens comes with its last one."""
        stream, listed = TextStream(self._model.codec, ()), list(tokens)
        ends = range(1, len(listed) + 1)
        return [stream.fresh(listed[:end], done=end == len(listed)) for end in ends]

    def batch(self) -> Batch:
        """An empty batch for rows of `row`, which may join it while others decode if the model's cache can do that."""
        return Batch(self._model, joins=self._model.joinable)

    def row(self, asked: Asked) -> Row:
        """What a batch needs to answer one request; everything is checked here.

        Raises:
            ArgumentError: a prompt that the model cannot read, or that fills its context.
            ModelMismatchError: an edit of another model.
            UnknownNameError: a layer that the model does not have.
        """
        (row,) = self._rows([asked.prompt], asked.sampling, asked.edit)
        row.logprobs, row.echo, row.trace = asked.logprobs, asked.echo, asked.trace
        return row

    def _rows(self, prompts: Sequence[Prompt], sampling: Samplings, edits: Edits) -> list[Row]:
        listed = row_prompts(prompts)
        drawn, steered = row_samplings(sampling, len(listed)), row_edits(edits, len(listed), self.info)
        rows = []
        for prompt, how, edit in zip(listed, drawn, steered, strict=True):
            ids = self._model.encode(prompt)
            limit = self._model.room(ids, how.max_new_tokens)
            rows.append(Row(prompt, ids, how, edit, TextStream(self._model.codec, how.stop), limit))
        return rows

    def _forced(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], edits: Edits, *, tail: int
    ) -> Iterator[tuple[list[int], Tensor, Scope, list[tuple[int, int]], Plan]]:
        """Right-padded batches of prompt + response: row indices, ids [B, T], scope, response spans, plan.

        `tail` last tokens are in nobody's scope: scoring leaves out the one that generating never feeds back.
        """
        check_responses(responses, len(prompts), self._model.vocabulary)
        steered = row_edits(edits, len(prompts), self.info)
        starts = [self._model.encode(prompt) for prompt in prompts]
        for start, tokens in zip(starts, responses, strict=True):
            self._model.room([*start, *tokens[:-1]], 1)
        for batch in length_sorted([len(a) + len(b) for a, b in zip(starts, responses, strict=True)], self.batch_size):
            whole = [[*starts[index], *responses[index]] for index in batch]
            spans = [(len(starts[index]), len(row)) for index, row in zip(batch, whole, strict=True)]
            ids = torch.full((len(batch), max(map(len, whole))), self._model.pad_id)
            for row, tokens in enumerate(whole):
                ids[row, : len(tokens)] = torch.tensor(tokens)
            places = torch.arange(ids.shape[1])
            first, end = (torch.tensor(column)[:, None] for column in zip(*spans, strict=True))
            real, device = places < end - tail, self._model.device
            scope = Scope(real.to(device), (real & (places >= first - 1)).to(device))
            yield batch, ids.to(device), scope, spans, Plan([steered[i] for i in batch], self.info.d_model, device)


def _read(logits: Tensor, ids: Tensor, start: int, end: int) -> tuple[Vectors, Vectors, NDArray[np.bool_]]:
    """Log-probabilities, margins, greediness of tokens start..end-1 from the last `len(logits)` positions' logits."""
    shift = len(ids) - len(logits) + 1
    rows = logits[start - shift : end - shift].float()
    tokens = ids[start:end, None]
    logprobs = torch.log_softmax(rows, -1).gather(-1, tokens)[:, 0]
    top = rows.topk(2, -1).values
    greedy = rows.gather(-1, tokens)[:, 0] == top[:, 0]
    return logprobs.cpu().numpy(), (top[:, 0] - top[:, 1]).cpu().numpy(), greedy.cpu().numpy()
