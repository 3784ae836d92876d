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

from worker.mlx.backends.attention_kernel import THREADS, AttentionKernel, BlockShape, fits, max_block_heads

log = logging.getLogger(__name__)

_MANY_THREADS = 512
_MANY_COLUMNS = 512
"""Buffers with more columns get blocks of `_MANY_THREADS` threads if there are few blocks: a block takes as long as its threads have keys."""

_MIN_BLOCKS = 132
"""As many as an H100 has multiprocessors. If there are fewer, a block computes a single query head."""

_MAX_DIFFERENCE = 0.03

_MLX_ATTENTION: Any = mx.fast.scaled_dot_product_attention
"""MLX's own, also while a step is traced."""


class Step(NamedTuple):
    """What one layer's attention receives in a decode step.

    Attributes:
        queries: (slots, query heads, 1, D).
        new_keys: Of the step, (slots, key heads, 1, D), as `new_values`.
        keys: The buffer, (slots, key heads, columns, D), as `values`.
        start: (slots,) int32. A slot whose start is after `end` attends to the new key alone.
        end: (1,) int32, less than columns: the column to write.
        scale: Factor of the dot products.
    """

    queries: mx.array
    new_keys: mx.array
    new_values: mx.array
    keys: mx.array
    values: mx.array
    start: mx.array
    end: mx.array
    scale: float


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

    def __call__(self, step: Step) -> Appended:
        """Write the new keys and values into column `end`, and attend to the columns from `start` to it."""


class FunctionalAppendAttention:
    """`AppendAttention` in MLX's operations, for any device."""

    is_in_place = False

    def supports(self, queries: mx.array, _keys: mx.array, _values: mx.array) -> bool:
        """See `AppendAttention`."""
        return bool(queries.shape[2] == 1)

    def __call__(self, step: Step) -> Appended:
        """See `AppendAttention`."""
        keys, values = (
            mx.slice_update(buffer, column.astype(buffer.dtype), step.end, axes=(2,))
            for buffer, column in ((step.keys, step.new_keys), (step.values, step.new_values))
        )
        columns = mx.arange(keys.shape[2])
        is_visible = (columns >= mx.minimum(step.start, step.end)[:, None]) & (columns <= step.end)
        mask = is_visible[:, None, None, :]
        output = _MLX_ATTENTION(step.queries, keys, values, scale=step.scale, mask=mask)
        return Appended(output, keys, values)


class CudaAppendAttention:
    """`AppendAttention` on MLX's CUDA back-end, with one kernel.

    Before its first use with a type, head dimension and grouping all variants of the kernel are compiled and tested.

    NOTE: the kernel writes into arrays that MLX takes for its input. Nothing else may rely on the columns from `end` on, and what
    reads the buffers must be launched before the next step: launches are computed in order.
    """

    is_in_place = True

    def __init__(self) -> None:
        self._passed: dict[Kind, bool] = {}
        self._kernel = AttentionKernel(
            "append",
            ["queries", "new_keys", "new_values", "keys", "values", "start", "end"],
            appends=True,
        )

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """See `AppendAttention`; a failed test is not repeated."""
        if not fits(queries, keys, values):
            return False
        num_key_heads = keys.shape[1]
        kind = Kind(queries.dtype, queries.shape[3], num_key_heads, queries.shape[1] // num_key_heads)
        if kind not in self._passed:
            self._passed[kind] = all(
                self_test(partial(self.launch, block), kind) for block in block_shapes(kind.repeats)
            )
        return self._passed[kind]

    def __call__(self, step: Step) -> Appended:
        """See `AppendAttention`."""
        num_slots, num_key_heads, num_columns, _ = step.keys.shape
        repeats = step.queries.shape[1] // num_key_heads
        return self.launch(block_shape(num_slots * num_key_heads, repeats, num_columns), step)

    def launch(self, block: BlockShape, step: Step) -> Appended:
        """As a call, with thread blocks of this shape."""
        *inputs, scale = step
        output = self._kernel(inputs, scale, step.keys.shape[1], block)
        return Appended(output, step.keys, step.values)


def block_shapes(repeats: int) -> list[BlockShape]:
    """The shapes that `block_shape` chooses from: of few blocks, of few blocks over long buffers, and of many blocks.

    Args:
        repeats: Query heads per key head.
    """
    return [
        BlockShape(1, THREADS),
        BlockShape(1, _MANY_THREADS),
        BlockShape(max_block_heads(repeats), THREADS),
    ]


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
    step = Step(
        mx.repeat(queries[:, :, :1], kind.repeats, axis=1),
        new_keys[:, :, :1],
        new_values[:, :, :1],
        keys,
        values,
        start=mx.array([0, 7, 2**30], mx.int32),
        end=mx.array([21], mx.int32),
        scale=kind.dim**-0.5,
    )
    exact = {name: getattr(step, name).astype(mx.float32) for name in Step._fields[:5]}
    expected = FunctionalAppendAttention()(step._replace(**exact))
    mx.eval(step[:5], expected)
    try:
        found = attention(step)
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
