"""Keys and values of a running batch: rows join it and leave it, every row's newest token in the last column.

Caches are transformers' `DynamicCache`, whose layers hold keys and values [B, heads, T, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def joinable(network: nn.Module) -> bool:
    """Whether rows can join the model's cache: it holds keys and values only, and columns can move together.

    A recurrent state, or attention in chunks of absolute columns, cannot be moved.
    """
    config: Any = network.config
    text = config.get_text_config(decoder=True)
    if getattr(network, "_is_stateful", False) or getattr(text, "attention_chunk_size", None):
        return False
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def empty() -> Any:
    """A cache whose layers keep every column; the model's masks do what sliding windows ask for."""
    return DynamicCache()


def join(old: Any, new: Any) -> None:
    """Add the rows of `new` to `old`, after its own; the narrower one is filled up on the left."""
    for mine, other in zip(old.layers, new.layers, strict=True):
        if not mine.is_initialized:  # a layer that reads another layer's keys
            continue
        width = max(mine.get_seq_length(), other.get_seq_length())
        mine.keys = torch.cat([_wide(mine.keys, width), _wide(other.keys, width)])
        mine.values = torch.cat([_wide(mine.values, width), _wide(other.values, width)])


def keep(cache: Any, rows: Tensor, width: int) -> None:
    """Keep some rows and the last `width` columns."""
    for layer in cache.layers:
        if layer.is_initialized:
            index = rows.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[index, :, -width:], layer.values[index, :, -width:]


def _wide(states: Any, width: int) -> Tensor:
    """[B, heads, T, D] -> [B, heads, width, D], zeros on the left."""
    return pad(states, (0, 0, width - states.shape[-2], 0))
