"""The generation loop: one padded batch, every row with its own edit, sampling and seed.

Row independence: a sampled row draws its t-th token with the t-th uniform number of its own seed, by inverting the
distribution, so nothing that happens in other rows can reach it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerwell.core.records import Edit, FinishReason, Prompt, Receipt, Sampling
from steerwell.engines.hf.model import LoadedModel
from steerwell.engines.hf.plan import Plan, Scope
from steerwell.engines.hf.text import TextStream

SHRINK_BELOW = 0.75  # finished rows leave the batch once fewer than this share of it is alive


@dataclass(slots=True)
class Row:
    """One answer in the making; `tokens` leaves the end token out."""

    prompt: Prompt
    prompt_ids: list[int]
    sampling: Sampling
    edit: Edit | None
    text: TextStream
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    receipt: Receipt | None = None


def decode(model: LoadedModel, rows: Sequence[Row]) -> Iterator[None]:
    """Grow every row by one token per step, yielding after each; receipts are set when the last row has finished.

    The model is steered inside a forward pass only, never while this generator rests.
    """
    plan = Plan([row.edit for row in rows], model.info.d_model, model.device)
    ids, real = left_padded([row.prompt_ids for row in rows], model.pad_id, model.device)
    room = max(row.limit for row in rows)
    mask = torch.cat([real, real.new_ones(len(rows), room)], 1).long()  # of the whole answer; steps read slices
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    response = torch.zeros_like(real)
    response[:, -1] = True
    scope, width, prompt = Scope(real, response), ids.shape[1], True
    alive, sampler = list(rows), _Sampler(rows, room, model.device)
    cache: Any = None
    while True:
        with torch.inference_mode():
            places = positions[:, width - ids.shape[1] : width]
            logits, cache = model.step(ids, mask[:, :width], places, cache, plan, scope, prompt=prompt)
            tokens = sampler.draw(logits)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            if row.finish is None:
                _grow(row, token, model.end_ids)
        yield
        kept = [index for index, row in enumerate(alive) if row.finish is None]
        if not kept:
            break
        if len(kept) < SHRINK_BELOW * len(alive) and model.can_shrink(cache):
            index = torch.tensor(kept, device=model.device)
            plan.keep(kept, model.device)
            sampler.keep(index)
            with torch.inference_mode():
                cache.batch_select_indices(index)
                tokens, mask, positions = tokens[index], mask[index], positions[index]
            alive = [alive[row] for row in kept]
        going = torch.tensor([row.finish is None for row in alive], device=model.device)[:, None]
        ids, scope, width, prompt = tokens[:, None], Scope(going, going), width + 1, False
    for row, receipt in zip(rows, plan.receipts(), strict=True):
        row.receipt = receipt


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and real-token mask, both [B, T], padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        real[index, width - len(row) :] = True
    return ids.to(device), real.to(device)


def _grow(row: Row, token: int, end_ids: frozenset[int]) -> None:
    if token in end_ids:
        row.finish = "stop"
        return
    row.tokens.append(token)
    if row.text.stopped(row.tokens):
        row.finish = "stop"
    elif len(row.tokens) >= row.limit:
        row.finish = "length"


class _Sampler:
    """Draws one token per row: greedy at temperature 0, else by inverting the nucleus distribution."""

    def __init__(self, rows: Sequence[Row], steps: int, device: torch.device) -> None:
        self._greedy = all(row.sampling.temperature == 0 for row in rows)
        if self._greedy:
            return
        self._step = 0
        warm = [row.sampling.temperature for row in rows]
        self._temperature = torch.tensor([value or 1.0 for value in warm], device=device)[:, None]
        self._top_p = torch.tensor([row.sampling.top_p for row in rows], device=device)[:, None]
        self._is_greedy = torch.tensor([value == 0 for value in warm], device=device)
        # Drawn in float32: a float64 draw just below 1 would round to 1, which lies beyond the last token.
        draws = [np.random.default_rng(row.sampling.seed).random(steps, np.float32) for row in rows]
        self._uniform = torch.from_numpy(np.stack(draws)).to(device)

    def draw(self, logits: Tensor) -> Tensor:
        """Token ids [B] from logits [B, vocabulary]."""
        best = logits.argmax(-1)
        if self._greedy:
            return best
        scores = logits.float()
        flat = torch.softmax((scores - scores.amax(-1, keepdim=True)) / self._temperature, -1)
        probabilities, order = flat.sort(stable=True, dim=-1, descending=True)
        reached = probabilities.cumsum(-1)
        nucleus = torch.where(reached - probabilities < self._top_p, probabilities, 0.0).cumsum(-1)
        target = self._uniform[:, self._step, None] * nucleus[:, -1:]
        self._step += 1
        place = (nucleus <= target).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        return torch.where(self._is_greedy, best, order.gather(-1, place)[:, 0])

    def keep(self, index: Tensor) -> None:
        """Drop the rows that are not in `index`."""
        if self._greedy:
            return
        self._temperature, self._top_p = self._temperature[index], self._top_p[index]
        self._is_greedy, self._uniform = self._is_greedy[index], self._uniform[index]
