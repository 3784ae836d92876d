"""Keys and values of decoding sequences, in buffers with a slot for each, so that sequences come and go one by one.

mlx-lm 0.32 makes new arrays of all sequences whenever one joins a batch or leaves it: with many short answers a batch spends most of
its time on that. Here each sequence has a slot of a buffer that is written in place. A newcomer is written into the next free slot;
if one leaves, the last one is copied into its slot. New buffers are made only when slots or columns are short. Created by
`worker.mlx.caches.kinds`; `worker.mlx.decoding.decode_batch` owns the order of the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from worker.mlx.backends.cuda_attention import PaddedAttention
from worker.mlx.caches.prompt_cache import row_cache
from worker.mlx.memory.cache_memory import columns, common_size, is_common_length, slots


class Move(NamedTuple):
    """Adjacent sequences that move to other slots, and stay adjacent.

    Attributes:
        target: The first one's slot afterwards.
        source: Its slot before.
    """

    target: int
    source: int
    num_slots: int


class SlotKVCache(BatchKVCache):
    """One layer's keys and values.

    Sequence i is in slot i. All sequences end at the same column and each begins at its own. Between the first column that
    attention sees, `_first`, and its sequence's own first column, a slot holds zeros, or values computed for the prompt's padding.
    `offset`, `left_padding` and `_idx` are mlx-lm's, counted from `_first`; call `update_positions` after `extend` and `filter`.

    Args:
        cache: Prefilled sequences; its arrays are taken over.
        max_sequences: How many sequences there will be at most.
        attention: Computes the attention of sequences that begin at different columns; None: MLX does.

    Attributes:
        keys: (slots, heads, columns, size), as `values`; None if a layer keeps nothing.
        starts: By slot: the first column of its sequence.
        expected_tokens: New buffers have room for so many tokens, and buffers with room for them are not wasteful.
    """

    def __init__(self, cache: BatchKVCache, max_sequences: int, attention: PaddedAttention | None) -> None:
        super().__init__([])
        self.attention = attention
        self.expected_tokens = 0
        self._max_sequences = max_sequences
        self.keys: Any = cache.keys
        self.values: Any = cache.values
        padding: Any = cache.left_padding.tolist()
        self.starts: list[int] = padding
        self._end = cache.size()
        self._first = min(self.starts)
        self._lifted: list[tuple[mx.array, mx.array]] = []

    @property
    def num_slots(self) -> int:
        """How many sequences the buffers have room for."""
        return len(self.starts) if self.keys is None else int(self.keys.shape[0])

    @property
    def num_columns(self) -> int:
        """How many tokens the buffers have room for. Only if there are keys."""
        return int(self.keys.shape[2])

    @property
    def end(self) -> int:
        """The column that the next step writes."""
        return int(self._end)

    def make_room(self, num_columns: int, *, has_common_shape: bool = False) -> None:
        """Make new buffers if these have fewer free columns; none if there are no keys.

        Args:
            has_common_shape: Also if their shape is not one that many buffers have, such as that of a prefilled batch's, or if
                they have no room for `expected_tokens`.
        """
        if self.keys is None:
            return
        num_slots = self.num_slots
        is_common_size = num_slots in (common_size(num_slots), self._max_sequences)
        is_long_enough = self.num_columns >= columns(self.expected_tokens)
        is_common = is_common_size and is_common_length(self.num_columns) and is_long_enough
        if self._end + num_columns > self.num_columns or (has_common_shape and not is_common):
            num_sequences = len(self.starts)
            self._rebuild(range(num_sequences), self._first, num_sequences, num_columns)

    def advance(self, num_columns: int) -> None:
        """Record that columns were written, with no new `offset`: it is out of date until `update_positions`."""
        self._end += num_columns
        self._idx = self._end - self._first

    def is_parallel_to(self, other: SlotKVCache) -> bool:
        """Whether both have the same sequences in the same slots and columns."""
        return (
            self.keys is not None
            and other.keys is not None
            and (self.starts, self._end) == (other.starts, other._end)
            and self.num_slots == other.num_slots
            and self.num_columns == other.num_columns
        )

    def is_wasteful(self, indices: Sequence[int]) -> bool:
        """Whether these sequences alone would leave more than half of the slots or columns empty."""
        if self.keys is None:
            return False
        num_tokens = max(self._end - min(self.starts[index] for index in indices), self.expected_tokens)
        return 2 * slots(len(indices)) < self.num_slots or 2 * columns(num_tokens) < self.keys.shape[2]

    def update_positions(self, like: SlotKVCache | None = None) -> None:
        """Compute where each sequence begins, or share the arrays of `like`, a layer, if it has the same sequences."""
        self._idx = self._end - self._first
        if like is not None and (like.starts, like._end) == (self.starts, self._end):  # noqa: SLF001 (another of its kind)
            self.offset, self.left_padding = like.offset, like.left_padding
            return
        self.offset = mx.array([self._end - start for start in self.starts], mx.int32)
        self.left_padding = mx.array([start - self._first for start in self.starts], mx.int32)

    def share_offset(self, like: SlotKVCache) -> None:
        """After a step: share the new offset of a layer with as many tokens, so that this layer's own is never computed."""
        if self._idx == like._idx:
            self.offset = like.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the next columns of all sequences; returns the keys and values that attention sees, including the new ones."""
        num_sequences, num_new = keys.shape[0], keys.shape[2]
        if self.keys is None:
            self.keys, self.values = (_empty(each, num_sequences) for each in (keys, values))
        self.make_room(num_new)
        end = self._end + num_new
        self.keys[:num_sequences, :, self._end : end] = keys
        self.values[:num_sequences, :, self._end : end] = values
        self._end, self._idx = end, end - self._first
        self.offset = self.offset + num_new
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all sequences, from the first column that attention sees."""
        used, visible = slice(len(self.starts)), slice(self._first, self._end)
        return self.keys[used, :, visible], self.values[used, :, visible]

    def make_mask(self, N: int, return_array: bool = False, **options: Any) -> Any:  # noqa: N803 (as mlx-lm calls it)
        """None if each sequence's next token may attend to everything: MLX's CUDA back-end has one kernel for that, and launches several with a mask."""
        is_decoding = N == 1 and options.get("window_size") is None
        is_padded = any(start != self._first for start in self.starts)
        if is_decoding and not return_array and not is_padded:
            return None
        mask: Any = super().make_mask(N, return_array, **options)
        if is_decoding and self.attention is not None:
            self.attention.expect(mask, self.left_padding)
        return mask

    def extend(self, other: Any) -> None:
        """Append prefilled sequences, from a `BatchKVCache`."""
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
            for buffer, prefilled in ((self.keys, other.keys), (self.values, other.values)):
                if first < self._first:
                    buffer[:num_old, :, first : self._first] = 0
                if first < begin:
                    buffer[newcomers, :, first:begin] = 0
                if begin < self._end:
                    buffer[newcomers, :, begin : self._end] = prefilled[:, :, begin - left : other.size()]
        self._first = first
        self.starts += [left + each for each in padding]

    def lift(self, moves: Sequence[Move]) -> list[mx.array]:
        """Copy sequences that `filter` will write into other slots.

        Returns:
            The copies. Compute them before `filter`: until then they hold on to the buffers, and MLX copies a buffer that is
            written while something else holds on to it.
        """
        if self.keys is None:
            return []
        visible = slice(self._first, self._end)
        for _, source, num_slots in moves:
            moving = slice(source, source + num_slots)
            copies = (mx.contiguous(buffer[moving, :, visible]) for buffer in (self.keys, self.values))
            self._lifted.append((next(copies), next(copies)))
        return [copy for both in self._lifted for copy in both]

    def filter(self, order: Sequence[int]) -> None:
        """Keep these sequences, in this order; the others leave.

        New buffers are made if sequences move that were not lifted, or if half of the buffers would be empty.
        """
        moves, first = moves_to(order), min(self.starts[index] for index in order)
        if self._lifted:
            visible = slice(self._first, self._end)
            for (target, _, num_slots), (keys, values) in zip(moves, self._lifted, strict=True):
                self.keys[target : target + num_slots, :, visible] = keys
                self.values[target : target + num_slots, :, visible] = values
            self._lifted = []
        elif self.keys is not None and (moves or self.is_wasteful(order)):
            self._rebuild(order, first, len(order))
            return
        self.starts = [self.starts[index] for index in order]
        self._first = first

    def extract(self, index: int) -> KVCache:
        """One sequence's own cache, not evaluated yet."""
        return row_cache(self.keys, self.values, index, self.starts[index], self._end)

    def _rebuild(self, indices: Sequence[int], first: int, num_sequences: int, num_more: int = 0) -> None:
        """Make new buffers with room for `num_sequences`, the given ones first, and `num_more` columns; some of both are spare.

        Args:
            first: The column that becomes column 0; what is before it is dropped. It may be negative.
        """
        begin = max(first, self._first)
        num_slots = max(num_sequences, min(self._max_sequences, slots(num_sequences)))
        num_columns = columns(max(self._end - first + num_more, self.expected_tokens))
        padding = [
            (0, num_slots - len(indices)),
            (0, 0),
            (begin - first, num_columns - (self._end - first)),
            (0, 0),
        ]
        chosen: Any = mx.array(list(indices)) if moves_to(indices) else slice(len(indices))
        self.keys, self.values = (
            mx.pad(buffer[chosen, :, begin : self._end], padding) for buffer in (self.keys, self.values)
        )
        self.starts = [self.starts[index] - first for index in indices]
        self._end, self._first = self._end - first, 0


def _empty(like: mx.array, num_slots: int) -> mx.array:
    """A buffer without columns."""
    return mx.zeros((num_slots, like.shape[1], 0, like.shape[3]), like.dtype)


def moves_to(order: Sequence[int]) -> list[Move]:
    """The moves that bring sequences into this order."""
    moves: list[Move] = []
    for target, source in enumerate(order):
        if target == source:
            continue
        last = moves[-1] if moves else Move(-1, -1, 0)
        if (last.target + last.num_slots, last.source + last.num_slots) == (target, source):
            moves[-1] = last._replace(num_slots=last.num_slots + 1)
        else:
            moves.append(Move(target, source, 1))
    return moves
