"""Keys and values of a running batch: rows join it and leave it, every row's newest token in the last column.

Growing, joining and leaving write in place, into buffers with room to spare, where transformers' own layers copy every
key and value at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 32  # columns to spare, at least; half of what is there, if that is more
WASTE = 4  # buffers larger than what is needed by more than this are let go


def joinable(network: nn.Module) -> bool:
    """Whether rows can join the model's cache: it holds keys and values only, and columns can move together.

    A recurrent state, or attention in chunks of absolute columns, cannot be moved.
    """
    text = _text_config(network)
    if getattr(network, "_is_stateful", False) or getattr(text, "attention_chunk_size", None):
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=text).layers)


def slides(network: nn.Module) -> bool:
    """Whether the model's own cache forgets what has left a sliding window; ours keeps it, behind the model's mask."""
    return any(type(layer) is DynamicSlidingWindowLayer for layer in DynamicCache(config=_text_config(network)).layers)


def empty() -> DynamicCache:
    """A cache of `Columns`."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = Columns
    return cache


class Columns(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, views [rows, heads, columns, D] into buffers that are larger.

    What lies outside the views may be of rows that are gone; it is zeroed before a view reaches it, so that no number
    of theirs, NaN for one, is ever multiplied.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stores: list[Tensor] = []  # keys and values, [row capacity, heads, column capacity, D]
        self._rows = self._begin = self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns for every row; all keys and values."""
        new = [key_states, value_states]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores, self._rows, self._end = new, key_states.shape[0], key_states.shape[2]
            return self._look()
        end = self._end + key_states.shape[2]
        if end > self._stores[0].shape[2]:
            self._move(self._rows, self.get_seq_length(), key_states.shape[2])
            end = self._end + key_states.shape[2]
        for store, states in zip(self._stores, new, strict=True):
            store[: self._rows, :, self._end : end] = states
        self._end = end
        return self._look()

    def get_seq_length(self) -> int:
        """Columns."""
        return self._end - self._begin

    def join(self, other: Columns) -> None:
        """Add another layer's rows after the own ones; the narrower one is filled up with zeros on the left."""
        width, rows = max(self.get_seq_length(), other.get_seq_length()), self._rows + other._rows
        if self._end < width or rows > self._stores[0].shape[0]:
            self._move(rows, width, 0)
        begin, own = self._end - width, self._end - other.get_seq_length()
        for store, states in zip(self._stores, other._look(), strict=True):
            store[: self._rows, :, begin : self._begin] = 0
            store[self._rows : rows, :, begin:own] = 0
            store[self._rows : rows, :, own : self._end] = states
        self._rows, self._begin = rows, begin
        self._look()

    def keep(self, rows: Sequence[int], width: int) -> None:
        """Keep some rows, row `rows[i]` as row i, and the last `width` columns; the i-th row kept is never before i."""
        for store in self._stores:
            for new, old in enumerate(rows):
                if new != old:
                    store[new, :, self._begin : self._end] = store[old, :, self._begin : self._end]
        self._rows, self._begin = len(rows), self._end - width
        self._look()

    def _look(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (store[: self._rows, :, self._begin : self._end] for store in self._stores)
        return self.keys, self.values

    def _move(self, rows: int, width: int, more: int) -> None:
        """Bring the columns to where `width` of them fit before, and `more` and some room after, for so many rows.

        In place if the buffers are large enough: new memory has its price, and rows come and go all the time.
        """
        old_rows, heads, old_columns, size = self._stores[0].shape
        room, length = more + max(ROOM, width // 2), self.get_seq_length()
        columns = width + room
        fits = rows <= old_rows and columns <= old_columns
        if fits and old_rows * old_columns <= WASTE * rows * columns:
            end = old_columns - room
            for store in self._stores:
                for row in store[: self._rows]:
                    row[:, end - length : end] = row[:, self._begin : self._end].clone()  # they may overlap
        else:
            end, capacity = width, rows + rows // 4
            larger = [store.new_empty((capacity, heads, columns, size)) for store in self._stores]
            for new, held in zip(larger, self._look(), strict=True):
                new[: self._rows, :, end - length : end] = held
            self._stores = larger
        self._begin, self._end = end - length, end


def join(old: DynamicCache, new: DynamicCache) -> None:
    """Add the rows of `new` to `old`, after its own."""
    for mine, other in zip(old.layers, new.layers, strict=True):
        if isinstance(mine, Columns) and isinstance(other, Columns) and mine.is_initialized:
            mine.join(other)  # else it is a layer that reads another layer's keys


def keep(cache: DynamicCache, rows: Sequence[int], width: int) -> None:
    """Keep some rows and the last `width` columns of every layer; see `Columns.keep`."""
    for layer in cache.layers:
        if isinstance(layer, Columns) and layer.is_initialized:
            layer.keep(rows, width)


def _text_config(network: nn.Module) -> Any:
    return network.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
