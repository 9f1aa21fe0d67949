"""The generation loop: rows that decode together, each with its own edit, sampling and seed; they may join and leave.

Every row's newest token stands in the last column, so a row that joins is filled up on the left, as is the batch where
the new row is longer. Row independence: a sampled row draws its t-th token with the t-th uniform number of its own
seed, by inverting the distribution, so nothing that happens in other rows can reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerwell.core.errors import EngineError, NotFiniteError
from steerwell.engines.base import Token
from steerwell.engines.hf import cache as caches
from steerwell.engines.hf.model import LoadedModel
from steerwell.engines.hf.plan import Plan, Scope
from steerwell.engines.rows import Row

PADDED = 128  # tokens of padding that cost no more than a pass of their own
SHRINK_BELOW = 0.75  # finished rows leave the batch once fewer than this share of it is alive


class Batch:
    """Rows that decode together. The model is steered inside a forward pass only, never between two.

    Args:
        model: the loaded model.
        joins: whether rows will join while others decode; the cache then keeps every column.
    """

    padded, gone = True, False

    def __init__(self, model: LoadedModel, *, joins: bool = False) -> None:
        self._model, self.joins = model, joins
        self._clear()

    def _clear(self) -> None:
        device = self._model.device
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=device)  # of the cached columns
        self._places = torch.zeros(0, dtype=torch.long, device=device)  # position of each row's newest token
        self._tokens = torch.zeros(0, dtype=torch.long, device=device)  # newest, not yet read
        self._going: Tensor | None = None  # rows not finished, [B, 1]; None: to be made
        self._plan = Plan([], self._model.info.d_model, device)

    @property
    def width(self) -> int:
        """Cached columns: the longest row, with what it has generated."""
        return int(self._mask.shape[1])

    @property
    def alive(self) -> int:
        """Rows not finished."""
        return sum(row.finish is None for row in self.rows)

    def admit(self, rows: Sequence[Row]) -> int:
        """`join`, in passes of prompts of like length where the cache allows several; one token a row."""
        for group in alike(rows) if self.joins else [rows]:
            self.join(group)
        return len(rows)

    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows, draw their first tokens, and let them decode with the others."""
        for echo in (False, True):
            group = [row for row in rows if row.echo == echo]
            if group:
                self._merge(self._started(group, echo))

    def step(self) -> int:
        """Grow every row that has not finished by one token; how many these are."""
        self.sweep(SHRINK_BELOW)
        alive = self.alive
        if self._going is None:
            self._going = torch.tensor([row.finish is None for row in self.rows], device=self._model.device)[:, None]
        with torch.inference_mode():
            mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], 1)
            scope = Scope(self._going, self._going)
            ids, places = self._tokens[:, None], self._places[:, None]
            logits, self._cache = self._model.step(ids, mask, places, self._cache, self._plan, scope, prompt=False)
            self._mask, self._places = mask, self._places + 1
            self._grow(logits[:, -1])
        return alive

    def settle(self) -> None:
        """Set the receipts of the rows that have finished since the last time."""
        for index, row in enumerate(self.rows):
            if row.finish is None or row.settled:
                continue
            row.settled = True
            if row.fault is None:
                row.fault, row.receipt = self._plan.fault(index), self._plan.receipt(index)

    def sweep(self, share: float = 1.0) -> None:
        """Let finished rows go, once fewer than `share` of the rows are alive."""
        kept = [index for index, row in enumerate(self.rows) if row.finish is None]
        movable = self.joins or hasattr(self._cache, "batch_select_indices")
        if len(kept) >= share * len(self.rows) or not (movable or not kept):
            return
        self.settle()
        if not kept:
            self._clear()
            return
        tail = [index for index in kept if index >= len(kept)]  # these fill the gaps, so that few rows move
        kept = [index if self.rows[index].finish is None else tail.pop() for index in range(len(kept))]
        self._plan.keep(kept)
        index = torch.tensor(kept, device=self._model.device)
        with torch.inference_mode():
            self._mask, self._places, self._tokens = self._mask[index], self._places[index], self._tokens[index]
            if self.joins:
                longest = int(self._mask.sum(1).max())
                self._mask = self._mask[:, -longest:]
                caches.keep(self._cache, kept, longest)
            else:
                self._cache.batch_select_indices(index)
        self.rows, self._going = [self.rows[row] for row in kept], None

    def rest(self) -> None:
        """Let go the finished rows, and what is held for them."""
        self.sweep()

    def drop(self, rows: Sequence[Row]) -> None:
        """End rows that nobody waits for any more; the next sweep lets them go."""
        for row in rows:
            row.finish = row.finish or "length"
        self._going = None

    def _started(self, rows: list[Row], echo: bool) -> Batch:
        """A batch of its own that has read the prompts and drawn the first tokens."""
        model, new = self._model, Batch(self._model, joins=self.joins)
        new._plan = Plan([row.edit for row in rows], model.info.d_model, model.device)
        ids, real = left_padded([row.prompt_ids for row in rows], model.pad_id, model.device)
        response = torch.zeros_like(real)
        response[:, -1] = True
        with torch.inference_mode():
            mask = real.long()
            places = (mask.cumsum(1) - 1).clamp(min=0)
            blank = caches.empty() if self.joins else None
            logits, new._cache = model.step(
                ids, mask, places, blank, new._plan, Scope(real, response), prompt=True, keep=0 if echo else 1
            )
            if echo:
                for row, read in zip(rows, logits, strict=True):
                    row.echoed = _echoed(row, read, model)
            new.rows, new._mask, new._places = rows, mask, places[:, -1] + 1
            new._grow(logits[:, -1])
        return new

    def _merge(self, new: Batch) -> None:
        """Take over the rows of another batch."""
        self.sweep()
        if not self.rows:
            self.rows, self._cache, self._plan, self._going = new.rows, new._cache, new._plan, None
            self._mask, self._places, self._tokens = new._mask, new._places, new._tokens
            return
        if not self.joins:
            raise EngineError("rows cannot join this batch while it decodes; wait until it has finished")
        width = max(self.width, new.width)
        with torch.inference_mode():
            caches.join(self._cache, new._cache)
            pair = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask, new._mask)]
            self._mask = torch.cat(pair)
            self._places = torch.cat([self._places, new._places])
            self._tokens = torch.cat([self._tokens, new._tokens])
        self._plan.join(new._plan)
        self.rows, self._going = self.rows + new.rows, None

    def _grow(self, logits: Tensor) -> None:
        """Draw one token per row from logits [B, vocabulary] and append it."""
        tokens = self._tokens = draw(logits, self.rows)
        sound = torch.isfinite(logits.amax(-1))  # amax hands a NaN on
        drawn = torch.where(sound, tokens, -1).tolist()
        telling = [index for index, row in enumerate(self.rows) if row.finish is None]
        self._tell(telling, drawn, logits)
        for index, (row, token) in enumerate(zip(self.rows, drawn, strict=True)):
            if row.finish is not None:
                continue
            if token < 0:
                row.fault = self._plan.fault(index) or NotFiniteError(
                    f"row {index}: the model's output is not finite; steer with less strength, or load the model "
                    "with dtype='bfloat16' or 'float32'"
                )
                row.finish = "stop"
            else:
                row.append(token, self._model.end_ids)
            if row.finish is not None:
                self._going = None

    def _tell(self, alive: Sequence[int], drawn: Sequence[int], logits: Tensor) -> None:
        """Note what rows that asked for log-probabilities or a trace are to be told of their new token."""
        wanted = [index for index in alive if self.rows[index].trace or self.rows[index].logprobs is not None]
        if not wanted:
            return
        met = self._plan.latest() if any(self.rows[index].trace for index in wanted) else []
        for index in wanted:
            row, token = self.rows[index], drawn[index]
            if token < 0 or token in self._model.end_ids:
                continue
            read = met[index] if row.trace else ()
            scored = _scored(token, logits[index], row.logprobs, self._model)
            row.told.append(
                Token(*scored, projections=tuple(item[0] for item in read), edited=tuple(item[1] for item in read))
            )


def decode(model: LoadedModel, rows: Sequence[Row]) -> Any:
    """Grow rows until all have finished, yielding after every step; receipts are set when the last one has.

    Raises:
        EngineError: the activations of a row are not finite.
    """
    batch, listed = Batch(model, joins=model.joinable and not model.slides), list(rows)
    batch.join(listed)
    yield
    while batch.alive:
        batch.step()
        yield
    batch.settle()
    for row in listed:
        if row.fault is not None:
            raise row.fault


def draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Token ids [B] from logits [B, vocabulary]; greedy at temperature 0, else the nucleus distribution inverted."""
    best = logits.argmax(-1)
    if all(row.sampling.temperature == 0 for row in rows):
        return best

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    for row in rows:
        if row.draws is None:
            # Drawn in float32: a float64 draw just below 1 would round to 1, which lies beyond the last token.
            row.draws = np.random.default_rng(row.sampling.seed).random(row.limit, np.float32)
    scores = logits.float()
    temperature = column([row.sampling.temperature or 1.0 for row in rows])
    flat = torch.softmax((scores - scores.amax(-1, keepdim=True)) / temperature, -1)
    probabilities, order = flat.sort(stable=True, dim=-1, descending=True)
    reached = probabilities.cumsum(-1)
    top_p = column([row.sampling.top_p for row in rows])
    nucleus = torch.where(reached - probabilities < top_p, probabilities, 0.0).cumsum(-1)
    uniform = column([float(row.draws[min(len(row.tokens), row.limit - 1)]) for row in rows])
    place = (nucleus <= uniform * nucleus[:, -1:]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    is_greedy = column([row.sampling.temperature == 0 for row in rows])[:, 0] > 0
    return torch.where(is_greedy, best, order.gather(-1, place)[:, 0])


def alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups of prompts so alike in length that padding costs less than another pass."""
    groups: list[list[Row]] = []
    padding = 0
    for row in sorted(rows, key=lambda row: -len(row.prompt_ids)):
        padding += len(groups[-1][0].prompt_ids) - len(row.prompt_ids) if groups else 0
        if groups and padding <= PADDED:
            groups[-1].append(row)
        else:
            groups.append([row])
            padding = 0
    return groups


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and real-token mask, both [B, T], padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        real[index, width - len(row) :] = True
    return ids.to(device), real.to(device)


def _scored(
    token: int, logits: Tensor, count: int | None, model: LoadedModel
) -> tuple[int, str, float | None, tuple[tuple[int, str, float], ...]]:
    """A token with its log-probability and the `count` likeliest at its place, from logits [vocabulary]."""
    text = model.codec.decode([token])
    if count is None:
        return token, text, None, ()
    logprobs = torch.log_softmax(logits.float(), -1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = tuple((i, model.codec.decode([i]), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return token, text, float(logprobs[token]), top


def _echoed(row: Row, logits: Tensor, model: LoadedModel) -> tuple[Token, ...]:
    """The prompt's tokens with their log-probabilities, from logits [T, vocabulary] of the left-padded row."""
    first, *others = row.prompt_ids
    read = logits[len(logits) - len(row.prompt_ids) : -1]
    return (
        Token(first, model.codec.decode([first])),
        *(Token(*_scored(token, at, row.logprobs, model)) for token, at in zip(others, read, strict=True)),
    )
