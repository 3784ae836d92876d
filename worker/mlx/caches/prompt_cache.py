"""Keys and values of prompts that prefill together.

Created by `worker.mlx.caches.kinds` in place of mlx-lm's `BatchKVCache`; used by `PromptBatch`, until `worker.mlx.caches.kv_slots` takes the
arrays over. It differs from mlx-lm's in three ways: positions are kept on the host, so that nothing waits for the device to read them;
attention without padding gets no mask array, with which a GPU takes up to three times as long; a single prompt is never copied to be padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, KVCache


class PromptKVCache(BatchKVCache):
    """One layer's keys and values.

    Sequence i is row i of both arrays. All sequences end at the same column, `_idx` (mlx-lm's name), and each begins at its own.

    Attributes:
        keys: (rows, heads, columns, size), as `values`; None while nothing is cached.
        starts: By row: the first column of its sequence. The columns before it are padding.
        num_columns: Columns of new arrays, at least: writing into an array is cheaper than making a longer one.
        keys: (rows, heads, columns, size), as `values`; None before the first tokens, and always if a layer keeps nothing.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self.starts = list(starts)
        self.num_columns = 0
        self.keys: Any = None
        self.values: Any = None
        self._idx = 0
        self._padding: list[int] = []
        self._offset: tuple[list[int], mx.array] | None = None

    @property
    def offset(self) -> Any:  # type: ignore[override]
        """The position of the next token: an array (rows,), or a number if it is the same in all rows."""
        if self._is_even:
            return self._idx - self.starts[0]
        positions = [self._idx - start for start in self.starts]
        if self._offset is None or self._offset[0] != positions:
            self._offset = positions, mx.array(positions, mx.int32)
        return self._offset[1]

    @property
    def left_padding(self) -> Any:  # type: ignore[override]
        """`starts` as an array on the host."""
        return np.array(self.starts)

    @property  # type: ignore[misc]
    def state(self) -> Any:
        """The arrays, to be evaluated."""
        return self.keys, self.values

    @property
    def num_used(self) -> int:
        """How many columns are in use."""
        return self._idx

    @property
    def _is_even(self) -> bool:
        return len(set(self.starts)) == 1

    @classmethod
    def merge(cls, caches: Sequence[Any], num_columns: int = 0) -> PromptKVCache:
        """Merge sequences' own caches, `KVCache`; the arrays of a single one are shared, not copied.

        Args:
            num_columns: See the class.
        """
        end = max(cache.offset for cache in caches)
        merged = cls([end - cache.offset for cache in caches])
        merged.num_columns = num_columns
        if end:
            room = max(end, num_columns)
            merged.keys = _padded([_used(cache.keys, cache.offset) for cache in caches], end, room)
            merged.values = _padded([_used(cache.values, cache.offset) for cache in caches], end, room)
            merged._idx = end
        return merged

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append columns to all rows; returns all keys and values."""
        end = self._idx + keys.shape[2]
        if self.keys is not None and end <= self.keys.shape[2]:
            self.keys[:, :, self._idx : end] = keys
            self.values[:, :, self._idx : end] = values
        else:
            self.keys = self._grown(self.keys, keys)
            self.values = self._grown(self.values, values)
        self._idx = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, old: Any, new: mx.array) -> mx.array:
        parts = [new] if old is None else [old[:, :, : self._idx], new]
        num_spare = self.num_columns - self._idx - new.shape[2]
        if num_spare > 0:
            parts.append(mx.zeros((*new.shape[:2], num_spare, new.shape[3]), new.dtype))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def make_mask(self, N: int, return_array: bool = False, **options: Any) -> Any:  # noqa: N803 (as mlx-lm calls it)
        """No array if each row's tokens attend to everything before them."""
        if self._is_even and not return_array and options.get("window_size") is None:
            return "causal" if N > 1 else None
        padding = None if not any(self.starts) else mx.array(self.starts, mx.int32)
        return create_causal_mask(N, offset=self._idx, left_padding=padding, **options)

    def prepare(self, *, lengths: Any = None, right_padding: Any = None, left_padding: Any = None) -> None:  # noqa: ARG002 (mlx-lm's)
        """Announce right padding of the next tokens.

        Args:
            right_padding: By row: how many of them are padding, at the end. mlx-lm's other arguments are not needed.
        """
        self._padding = list(right_padding)

    def finalize(self) -> None:
        """Remove the announced padding, by moving rows to the right."""
        padding, self._padding = self._padding, []
        if not any(padding) or self.keys is None:
            return
        if common := min(padding):
            # The arrays end with the last token: decode steps use buffers of other lengths.
            self._idx -= common
            self.keys, self.values = self.keys[:, :, : self._idx], self.values[:, :, : self._idx]
        shifts = [each - min(padding) for each in padding]
        if any(shifts):
            columns = np.arange(self._idx)[None, :] - np.array(shifts)[:, None]
            index = mx.array(np.maximum(columns, 0).astype(np.int32))[:, None, :, None]
            self.keys = mx.take_along_axis(self.keys, index, axis=2)
            self.values = mx.take_along_axis(self.values, index, axis=2)
            self.starts = [start + shift for start, shift in zip(self.starts, shifts, strict=True)]
            self._drop_common_padding()

    def extend(self, other: PromptKVCache) -> None:
        """Append the rows of another batch."""
        both = (self, other)
        end = max(each.num_used for each in both)
        starts = [end - each.num_used + start for each in both for start in each.starts]
        like: Any = self if self.keys is not None else other
        if like.keys is not None:
            keys = [each.rows_of(each.keys, like.keys) for each in both]
            values = [each.rows_of(each.values, like.values) for each in both]
            self.keys, self.values = _padded(keys, end, end), _padded(values, end, end)
        self.starts, self._idx = starts, end

    def rows_of(self, array: Any, like: mx.array) -> mx.array:
        """The used columns of keys or values, (rows, heads, columns, size); without columns if nothing is cached."""
        if array is None:
            return mx.zeros((len(self.starts), like.shape[1], 0, like.shape[3]), like.dtype)
        used: mx.array = array[:, :, : self._idx]
        return used

    def trim(self, n: int) -> int:
        """Remove up to n columns at the end; returns how many were removed."""
        n = min(self._idx, n)
        self._idx -= n
        return n

    def extract(self, idx: int) -> KVCache:
        """One sequence's own cache, not evaluated yet."""
        return row_cache(self.keys, self.values, idx, self.starts[idx], self._idx)

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        indices = list(batch_indices)
        if self.keys is not None and indices != list(range(len(self.starts))):
            rows: Any = slice(indices[0], indices[0] + 1) if len(indices) == 1 else mx.array(indices)
            self.keys, self.values = self.keys[rows], self.values[rows]
        self.starts = [self.starts[index] for index in indices]
        self._drop_common_padding()

    def _drop_common_padding(self) -> None:
        if first := min(self.starts):
            self.keys, self.values = self.keys[:, :, first:], self.values[:, :, first:]
            self.starts = [start - first for start in self.starts]
            self._idx -= first


def row_cache(keys: Any, values: Any, row: int, start: int, end: int) -> KVCache:
    """The cache of one row's sequence, which has the columns from `start` to `end`, not evaluated yet; empty if there are no keys."""
    cache = KVCache()
    if keys is not None:
        cache.keys = mx.contiguous(keys[row : row + 1, :, start:end])
        cache.values = mx.contiguous(values[row : row + 1, :, start:end])
        cache.offset = end - start
    return cache


def _used(array: Any, num_columns: int) -> Any:
    return None if array is None else array[:, :, :num_columns]


def _padded(parts: Sequence[Any], end: int, num_columns: int) -> mx.array:
    """Concatenate arrays of rows into one of `num_columns`, in which all rows end at column `end`.

    None stands for one row of zeros. A single array is returned as it is.
    """
    like: mx.array = next(part for part in parts if part is not None)
    if len(parts) == 1:
        return like
    num_rows = [1 if part is None else part.shape[0] for part in parts]
    merged = mx.zeros((sum(num_rows), like.shape[1], num_columns, like.shape[3]), like.dtype)
    first = 0
    for part, count in zip(parts, num_rows, strict=True):
        if part is not None and part.shape[2]:
            merged[first : first + count, :, end - part.shape[2] : end] = part
        first += count
    return merged
