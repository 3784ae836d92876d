"""Keys and values of decoding rows, in buffers in which rows come and go one by one.

mlx-lm 0.32 makes new arrays of all rows whenever one joins a batch or leaves it: with many short answers a batch does hardly
anything else. Here each row has a slot of a buffer that is written in place. A newcomer is written into the next free
slot; where a row has left, the last one is copied. New buffers are made only when slots or columns are short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from worker.mlx.backends.cuda_attention import PaddedAttention
from worker.mlx.memory import columns, slots


class Move(NamedTuple):
    """Neighbouring rows that change places, and stay neighbours.

    Attributes:
        place: Of the first, afterwards.
        row: The first.
    """

    place: int
    row: int
    num_rows: int


class SlotKVCache(BatchKVCache):
    """One layer's keys and values.

    Row i is in slot i. All rows end at the same column and each begins at its own. What a slot has between the first column
    that is looked at, `_first`, and its row's own is zero, or what mlx-lm computed for the padding of its prompt. `offset`,
    `left_padding` and `_idx` are mlx-lm's, counted from `_first`; after `extend` and `filter` they are made by `count`.

    Args:
        cache: Rows that mlx-lm has read; its arrays are taken over.
        max_rows: There will be.
        attention: Of rows that begin at different columns; None: MLX's own.

    Attributes:
        keys: (slots, heads, columns, size), as `values`; None where a layer keeps nothing.
        starts: By row, its first column.
    """

    def __init__(self, cache: BatchKVCache, max_rows: int, attention: PaddedAttention | None) -> None:
        super().__init__([])
        self.attention = attention
        self._max_rows = max_rows
        self.keys: Any = cache.keys
        self.values: Any = cache.values
        padding: Any = cache.left_padding.tolist()
        self.starts: list[int] = padding
        self._end = cache.size()
        self._first = min(self.starts)
        self._lifted: list[tuple[mx.array, mx.array]] = []

    @property
    def num_slots(self) -> int:
        """Rows for which there is room."""
        return len(self.starts) if self.keys is None else int(self.keys.shape[0])

    def is_wasteful(self, rows: Sequence[int]) -> bool:
        """Whether these rows alone would leave more than half of the slots or columns empty."""
        if self.keys is None:
            return False
        num_tokens = self._end - min(self.starts[row] for row in rows)
        return 2 * slots(len(rows)) < self.num_slots or 2 * columns(num_tokens) < self.keys.shape[2]

    def count(self, like: SlotKVCache | None = None) -> None:
        """Make the arrays that say where each row is, or share those of a layer with the same rows."""
        self._idx = self._end - self._first
        if like is not None and (like.starts, like._end) == (self.starts, self._end):  # noqa: SLF001 (another of its kind)
            self.offset, self.left_padding = like.offset, like.left_padding
            return
        self.offset = mx.array([self._end - start for start in self.starts], mx.int32)
        self.left_padding = mx.array([start - self._first for start in self.starts], mx.int32)

    # -- a step ------------------------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the next columns of all rows; what is looked at now, theirs included."""
        num_rows, num_new = keys.shape[0], keys.shape[2]
        if self.keys is None:
            self.keys, self.values = (_empty(each, num_rows) for each in (keys, values))
        if self._end + num_new > self.keys.shape[2]:
            self._rebuild(range(num_rows), self._first, num_rows, num_new)
        end = self._end + num_new
        self.keys[:num_rows, :, self._end : end] = keys
        self.values[:num_rows, :, self._end : end] = values
        self._end, self._idx = end, end - self._first
        self.offset = self.offset + num_new
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Of all rows, from the first column that is looked at."""
        rows, there = slice(len(self.starts)), slice(self._first, self._end)
        return self.keys[rows, :, there], self.values[rows, :, there]

    def make_mask(self, N: int, return_array: bool = False, **options: Any) -> Any:  # noqa: N803 (as mlx-lm calls it)
        """None where each row's next token may look at everything: MLX's CUDA back-end has one kernel for that, with a mask many."""
        is_decoding = N == 1 and options.get("window_size") is None
        is_padded = any(start != self._first for start in self.starts)
        if is_decoding and not return_array and not is_padded:
            return None
        mask: Any = super().make_mask(N, return_array, **options)
        if is_decoding and self.attention is not None:
            self.attention.expect(mask, self.left_padding)
        return mask

    # -- rows come and go ----------------------------------------------------------------------------------------------

    def extend(self, other: Any) -> None:
        """Rows that mlx-lm has read, in a `BatchKVCache`, join behind those that are there."""
        padding: Any = other.left_padding.tolist()
        left = self._end - other.size()  # the column where theirs begin
        first = min(self._first, left + min(padding))
        num_old, num_all = len(self.starts), len(self.starts) + len(padding)
        if self.keys is None and other.keys is not None:
            self.keys, self.values = (_empty(each, num_old) for each in (other.keys, other.values))
        if self.keys is not None:
            if first < 0 or num_all > self.num_slots:
                self._rebuild(range(num_old), first, num_all)
                left, first = left - first, 0
            newcomers, begin = slice(num_old, num_all), max(first, left)
            for buffer, read in ((self.keys, other.keys), (self.values, other.values)):
                if first < self._first:
                    buffer[:num_old, :, first : self._first] = 0
                if first < begin:
                    buffer[newcomers, :, first:begin] = 0
                if begin < self._end:
                    buffer[newcomers, :, begin : self._end] = read[:, :, begin - left : other.size()]
        self._first = first
        self.starts += [left + each for each in padding]

    def lift(self, moves: Sequence[Move]) -> list[mx.array]:
        """Copy rows that `filter` is to put down elsewhere.

        Returns:
            The copies. They should be computed by then: until that they hold on to the buffers, and MLX copies what is
            written while somebody does.
        """
        if self.keys is None:
            return []
        there = slice(self._first, self._end)
        for _, row, num_rows in moves:
            rows = slice(row, row + num_rows)
            copies = (mx.contiguous(buffer[rows, :, there]) for buffer in (self.keys, self.values))
            self._lifted.append((next(copies), next(copies)))
        return [copy for both in self._lifted for copy in both]

    def filter(self, order: Sequence[int]) -> None:
        """Keep these rows, in this order; the others leave.

        Where rows change places that were not lifted, and where half of the buffers would be empty, there are new ones.
        """
        moves, first = moves_to(order), min(self.starts[row] for row in order)
        if self._lifted:
            there = slice(self._first, self._end)
            for (place, _, num_rows), (keys, values) in zip(moves, self._lifted, strict=True):
                self.keys[place : place + num_rows, :, there] = keys
                self.values[place : place + num_rows, :, there] = values
            self._lifted = []
        elif self.keys is not None and (moves or self.is_wasteful(order)):
            self._rebuild(order, first, len(order))
            return
        self.starts = [self.starts[row] for row in order]
        self._first = first

    def extract(self, row: int) -> KVCache:
        """A row's own cache; not computed yet."""
        cache = KVCache()
        if self.keys is not None:
            there = slice(self.starts[row], self._end)
            cache.keys = mx.contiguous(self.keys[row : row + 1, :, there])
            cache.values = mx.contiguous(self.values[row : row + 1, :, there])
            cache.offset = self._end - self.starts[row]
        return cache

    def _rebuild(self, rows: Sequence[int], first: int, num_rows: int, num_more: int = 0) -> None:
        """New buffers for `num_rows` rows, with these in front, and for `num_more` columns, with some of both to spare.

        Args:
            first: The column that becomes column 0; what is before it is let go. It may be negative.
        """
        begin = max(first, self._first)
        num_slots = max(num_rows, min(self._max_rows, slots(num_rows)))
        num_columns = columns(self._end - first + num_more)
        padding = [
            (0, num_slots - len(rows)),
            (0, 0),
            (begin - first, num_columns - (self._end - first)),
            (0, 0),
        ]
        chosen: Any = mx.array(list(rows)) if moves_to(rows) else slice(len(rows))
        self.keys, self.values = (
            mx.pad(buffer[chosen, :, begin : self._end], padding) for buffer in (self.keys, self.values)
        )
        self.starts = [self.starts[row] - first for row in rows]
        self._end, self._first = self._end - first, 0


def _empty(like: mx.array, num_rows: int) -> mx.array:
    """A buffer without columns."""
    return mx.zeros((num_rows, like.shape[1], 0, like.shape[3]), like.dtype)


def moves_to(order: Sequence[int]) -> list[Move]:
    """Which rows change places so that they come to be in this order."""
    moves: list[Move] = []
    for place, row in enumerate(order):
        if place == row:
            continue
        last = moves[-1] if moves else Move(-1, -1, 0)
        if (last.place + last.num_rows, last.row + last.num_rows) == (place, row):
            moves[-1] = last._replace(num_rows=last.num_rows + 1)
        else:
            moves.append(Move(place, row, 1))
    return moves
