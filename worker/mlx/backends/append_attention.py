"""Attention of a decode step that also writes the step's keys and values into the buffers of the slots.

Used by `worker.mlx.decoding.compiled_forward` while it traces a step. A compiled step has fixed shapes: the buffers come complete, and the
column to write is an array. `CudaAppendAttention` writes in place, with one launch; `FunctionalAppendAttention` makes new
arrays, which MLX writes in place if nothing else holds the old ones, with three launches or more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from worker.mlx.backends.cuda_attention import (
    HEADER,
    LANES,
    MAX_HEADS,
    MAX_KEYS,
    SOURCE,
    THREADS,
    kernel_name,
)

log = logging.getLogger(__name__)

_MANY_THREADS = 512
_MANY_COLUMNS = 512
"""Buffers with more columns get blocks of `_MANY_THREADS` threads if there are few blocks: a block takes as long as its threads have keys."""

_MIN_BLOCKS = 132
"""As many as an H100 has multiprocessors. If there are fewer, a block computes a single query head."""

_MAX_DIFFERENCE = 0.03

_MLX_ATTENTION: Any = mx.fast.scaled_dot_product_attention
"""MLX's own, also while a step is traced."""


class Appended(NamedTuple):
    """The result of a call.

    Attributes:
        output: (slots, query heads, 1, D).
        keys: The buffer with the new column, as `values`.
    """

    output: mx.array
    keys: mx.array
    values: mx.array


class AppendAttention(Protocol):
    """See the module.

    Attributes:
        is_in_place: Whether the buffers that come are also those that are returned.
    """

    is_in_place: bool

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """Whether arrays of these shapes and types are supported."""

    def __call__(
        self,
        queries: mx.array,
        new: tuple[mx.array, mx.array],
        buffers: tuple[mx.array, mx.array],
        start: mx.array,
        end: mx.array,
        *,
        scale: float,
    ) -> Appended:
        """Write the new keys and values into column `end`, and attend to the columns from `start` to it.

        Args:
            queries: (slots, query heads, 1, D).
            new: Keys and values of the step, (slots, key heads, 1, D) each.
            buffers: Keys and values, (slots, key heads, columns, D) each.
            start: (slots,) int32. A slot whose start is after `end` attends to the new key alone.
            end: (1,) int32, less than columns.
        """


class FunctionalAppendAttention:
    """`AppendAttention` in MLX's operations, for any device."""

    is_in_place = False

    def supports(self, queries: mx.array, _keys: mx.array, _values: mx.array) -> bool:
        """See `AppendAttention`."""
        return bool(queries.shape[2] == 1)

    def __call__(
        self,
        queries: mx.array,
        new: tuple[mx.array, mx.array],
        buffers: tuple[mx.array, mx.array],
        start: mx.array,
        end: mx.array,
        *,
        scale: float,
    ) -> Appended:
        """See `AppendAttention`."""
        keys, values = (
            mx.slice_update(buffer, column.astype(buffer.dtype), end, axes=(2,))
            for buffer, column in zip(buffers, new, strict=True)
        )
        columns = mx.arange(keys.shape[2])
        is_visible = (columns >= mx.minimum(start, end)[:, None]) & (columns <= end)
        output = _MLX_ATTENTION(queries, keys, values, scale=scale, mask=is_visible[:, None, None, :])
        return Appended(output, keys, values)


class CudaAppendAttention:
    """`AppendAttention` on MLX's CUDA back-end, with one kernel.

    Before its first use with a type, head dimension and grouping all variants of the kernel are compiled and tested.

    NOTE: the kernel writes into arrays that MLX takes for its input. Nothing else may rely on the columns from `end` on, and what
    reads the buffers must be launched before the next step: launches are computed in order.
    """

    is_in_place = True

    def __init__(self) -> None:
        self._scales: dict[float, mx.array] = {}
        self._passed: dict[Kind, bool] = {}
        self._kernel: Any = mx.fast.cuda_kernel(
            name=kernel_name("append"),
            input_names=["queries", "new_keys", "new_values", "keys", "values", "start", "end", "scale"],
            output_names=["result"],
            source=SOURCE,
            header="#define APPEND 1" + HEADER,
            ensure_row_contiguous=False,
        )

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """See `AppendAttention`; a failed test is not repeated."""
        if not (
            queries.shape[2] == 1
            and queries.shape[3] in LANES
            and queries.shape[0] == keys.shape[0]
            and keys.shape == values.shape
            and keys.shape[2] <= MAX_KEYS
            and queries.dtype == keys.dtype == values.dtype
        ):
            return False
        num_key_heads = keys.shape[1]
        kind = Kind(queries.dtype, queries.shape[3], num_key_heads, queries.shape[1] // num_key_heads)
        if kind not in self._passed:
            self._passed[kind] = all(
                self_test(partial(self.launch, block), kind) for block in block_shapes(kind.repeats)
            )
        return self._passed[kind]

    def __call__(
        self,
        queries: mx.array,
        new: tuple[mx.array, mx.array],
        buffers: tuple[mx.array, mx.array],
        start: mx.array,
        end: mx.array,
        *,
        scale: float,
    ) -> Appended:
        """See `AppendAttention`."""
        num_slots, num_key_heads, num_columns, _ = buffers[0].shape
        block = block_shape(num_slots * num_key_heads, queries.shape[1] // num_key_heads, num_columns)
        return self.launch(block, queries, new, buffers, start, end, scale=scale)

    def launch(  # noqa: PLR0917 (those of `AppendAttention`)
        self,
        block: BlockShape,
        queries: mx.array,
        new: tuple[mx.array, mx.array],
        buffers: tuple[mx.array, mx.array],
        start: mx.array,
        end: mx.array,
        *,
        scale: float,
    ) -> Appended:
        """As a call, with thread blocks of this shape."""
        keys, values = buffers
        num_slots, num_heads, _, dim = queries.shape
        num_key_heads = keys.shape[1]
        repeats = num_heads // num_key_heads
        if scale not in self._scales:
            self._scales[scale] = mx.array(scale, mx.float32)
        template = [
            ("T", queries.dtype),
            ("D", dim),
            ("LANES", LANES[dim]),
            ("THREADS", block.num_threads),
            ("REPEATS", repeats),
            ("HEADS", block.num_heads),
        ]
        results: list[mx.array] = self._kernel(
            inputs=[queries, *new, keys, values, start, end, self._scales[scale]],
            template=template,
            grid=(num_key_heads * block.num_threads, num_slots, repeats // block.num_heads),
            threadgroup=(block.num_threads, 1, 1),
            output_shapes=[queries.shape],
            output_dtypes=[queries.dtype],
        )
        return Appended(results[0], keys, values)


class BlockShape(NamedTuple):
    """What a thread block of the kernel computes.

    Attributes:
        num_heads: Query heads, which share a key head.
    """

    num_heads: int
    num_threads: int


def block_shapes(repeats: int) -> list[BlockShape]:
    """The shapes that `block_shape` chooses from: of few blocks, of few blocks over long buffers, and of many blocks.

    Args:
        repeats: Query heads per key head.
    """
    most = next(n for n in range(min(repeats, MAX_HEADS), 0, -1) if repeats % n == 0)
    return [BlockShape(1, THREADS), BlockShape(1, _MANY_THREADS), BlockShape(most, THREADS)]


def block_shape(num_key_rows: int, repeats: int, num_columns: int) -> BlockShape:
    """The shape of a launch's thread blocks: with few of them, each has little to do.

    Args:
        num_key_rows: Slots times key heads.
        repeats: Query heads per key head.
        num_columns: Of the buffers.
    """
    few, few_long, many = block_shapes(repeats)
    if num_key_rows * repeats // many.num_heads >= _MIN_BLOCKS:
        return many
    is_long = num_columns > _MANY_COLUMNS and num_key_rows * repeats < 2 * _MIN_BLOCKS
    return few_long if is_long else few


class Kind(NamedTuple):
    """What variants of the kernel are compiled for.

    Attributes:
        dim: Head dimension.
        repeats: Query heads per key head.
    """

    dtype: mx.Dtype
    dim: int
    num_key_heads: int
    repeats: int


def self_test(attention: Callable[..., Appended], kind: Kind) -> bool:
    """Compare with `FunctionalAppendAttention` in float32 on this device: output, and what was written; a difference is logged.

    Args:
        attention: Called as an `AppendAttention`.
    """
    shape = (3, kind.num_key_heads, 40, kind.dim)
    keys, values, new_keys, new_values, queries = (
        mx.random.normal(shape, key=mx.random.key(number)).astype(kind.dtype) for number in range(5)
    )
    new = new_keys[:, :, :1], new_values[:, :, :1]
    queries = mx.repeat(queries[:, :, :1], kind.repeats, axis=1)
    start, end = mx.array([0, 7, 2**30], mx.int32), mx.array([21], mx.int32)
    exact = [each.astype(mx.float32) for each in (queries, *new, keys, values)]
    scale = kind.dim**-0.5
    expected = FunctionalAppendAttention()(
        exact[0], (exact[1], exact[2]), (exact[3], exact[4]), start, end, scale=scale
    )
    mx.eval(queries, new, keys, values, expected)
    try:
        found = attention(queries, new, (keys, values), start, end, scale=scale)
        mx.eval(found)
        differences = [mx.abs(a.astype(mx.float32) - b).max() for a, b in zip(found, expected, strict=True)]
        largest: Any = mx.max(mx.stack(differences)).item()
    except Exception:
        log.exception("the attention kernel of compiled steps cannot be used")
        return False
    if not largest < _MAX_DIFFERENCE:
        log.error("the attention kernel of compiled steps differs by %s and is not used", largest)
        return False
    return True
