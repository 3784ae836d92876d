"""The attention of a decode step with left-padded rows on CUDA.

MLX 0.32 has a CUDA kernel for one query that attends to all keys, but none with a mask: it launches five kernels then, and
launches limit the decode step of a small model. Metal's kernel supports masks, so this is for CUDA alone. `CudaKernel` takes the place of
MLX's own attention if the mask is the padding mask and nothing else (`worker.mlx.decoding.decode_batch`).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Protocol, cast

import mlx.core as mx

from worker.mlx.backends.attention_kernel import THREADS, AttentionKernel, BlockShape, fits, max_block_heads

log = logging.getLogger(__name__)

_TEST_KEYS = 40
_MAX_DIFFERENCE = 0.03


class Kernel(Protocol):
    """Attention with one query per row and head, over rows whose keys begin at different positions."""

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """Whether the kernel supports arrays of these shapes and types."""

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, start: mx.array, scale: float
    ) -> mx.array:
        """Compute each row's attention over its keys from `start` on.

        Args:
            queries: (batch, query heads, 1, D); the last axis is contiguous in all three arrays.
            keys: (batch, key heads, length, D), as is `values`; the number of query heads is a multiple of that of key heads.
            start: (batch,) int32, each less than length.
            scale: Factor of the dot products.

        Returns:
            Shape and type of `queries`.
        """


def self_test(kernel: Kernel, dtype: mx.Dtype, dim: int, repeats: int) -> bool:
    """Compare a kernel's result with MLX's own attention on this device; a failure is logged.

    Args:
        dim: Head dimension.
        repeats: Query heads per key head.
    """
    shape = (2, 2, _TEST_KEYS, dim)
    keys, values, queries = (
        mx.random.normal(shape, key=mx.random.key(number)).astype(dtype) for number in range(3)
    )
    queries = mx.repeat(queries[:, :, :1], repeats, axis=1)
    start = mx.array([0, 7], dtype=mx.int32)
    mask = (mx.arange(_TEST_KEYS)[None, :] >= start[:, None])[:, None, None, :]
    scale = dim**-0.5
    inputs = [each.astype(mx.float32) for each in (queries, keys, values)]
    expected = mx.fast.scaled_dot_product_attention(*inputs, scale=scale, mask=mask)
    try:
        result = kernel(queries, keys, values, start, scale)
        difference: Any = mx.abs(result.astype(mx.float32) - expected).max().item()
    except Exception:
        log.exception("the attention kernel cannot be used; padded sequences use MLX's own attention")
        return False
    if not difference < _MAX_DIFFERENCE:
        log.error("the attention kernel differs by %s; padded sequences use MLX's own attention", difference)
        return False
    return True


class CudaKernel:
    """`Kernel` on MLX's CUDA back-end."""

    def __init__(self) -> None:
        self._kernel = AttentionKernel("attention", ["queries", "keys", "values", "start"], appends=False)

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """See `Kernel`."""
        return fits(queries, keys, values)

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, start: mx.array, scale: float
    ) -> mx.array:
        """See `Kernel`."""
        num_key_heads = keys.shape[1]
        block = BlockShape(max_block_heads(queries.shape[1] // num_key_heads), THREADS)
        return self._kernel([queries, keys, values, start], scale, num_key_heads, block)


class CheckedKernel:
    """A `Kernel` that runs `self_test` on another one before its first use with each type, head dimension and grouping."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._passed: dict[tuple[mx.Dtype, int, int], bool] = {}

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """See `Kernel`; a failed self-test is not repeated."""
        if not self._kernel.supports(queries, keys, values):
            return False
        kind = queries.dtype, queries.shape[3], queries.shape[1] // keys.shape[1]
        if kind not in self._passed:
            self._passed[kind] = self_test(self._kernel, *kind)
        return self._passed[kind]

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, start: mx.array, scale: float
    ) -> mx.array:
        """See `Kernel`."""
        return self._kernel(queries, keys, values, start, scale)


@cache
def cuda_kernel() -> CheckedKernel:
    """The kernel of this process."""
    return CheckedKernel(CudaKernel())


class PaddedAttention:
    """A context manager in which attention with the expected padding mask is computed by `kernel`.

    Models call `mlx.core.fast.scaled_dot_product_attention` by this name and pass it the mask of their cache. With any other mask, or
    none, MLX's own attention is used.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._mlx_attention: Any = mx.fast.scaled_dot_product_attention
        self._mask: mx.array | None = None
        self._start: mx.array | None = None

    def expect(self, mask: mx.array, start: mx.array) -> None:
        """Announce the padding mask: it hides the keys before `start`, (batch,) int32, in each row, and nothing else."""
        self._mask, self._start = mask, start

    def __enter__(self) -> None:
        mx.fast.scaled_dot_product_attention = self._attend

    def __exit__(self, *_error: object) -> None:
        mx.fast.scaled_dot_product_attention = self._mlx_attention
        self._mask = self._start = None

    def _attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
    ) -> mx.array:
        is_padding_mask = self._start is not None and mask is self._mask
        is_plain = not any(option is not None for option in options.values())
        if is_padding_mask and is_plain and self._kernel.supports(q, k, v):
            return self._kernel(q, k, v, cast("mx.array", self._start), scale)
        result: mx.array = self._mlx_attention(q, k, v, scale=scale, mask=mask, **options)
        return result
