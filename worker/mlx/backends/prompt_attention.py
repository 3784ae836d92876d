"""The attention of prompts on CUDA.

MLX 0.32 computes it with cuDNN, which makes a plan for each new combination of shapes: 42 ms on an H100, against 12 ms for a complete
piece of 2,048 tokens of a 1B model. So few shapes should reach cuDNN. Small pieces, such as the second turn of a
conversation, are computed with matrix products; large ones are padded to multiples of `PromptAttention.multiple`. With a mask array, cuDNN is
slower than matrix products, and with either a long context takes gigabytes for the scores: here they are computed in parts.
`worker.mlx.prefill.prompts` uses this in place of MLX's own attention. Metal's kernels have none of these costs.
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx

_MULTIPLE = 256

_MAX_SMALL_SCORES = 2**25
"""Up to so many scores (rows x heads x queries x keys), matrix products take no longer than a plan for a few layers."""

_MAX_PART_SCORES = 2**27
"""How many scores are computed at a time, at most."""

_BYTES_PER_SCORE = 16
"""In half precision: as products, with the mask, as weights, and of another layer."""

_MAX_CUDNN_DIM = 128
_CUDNN_TYPES = (mx.float16, mx.bfloat16)
_DEFAULT_HEADS = 32


class PromptAttention:
    """A context manager in which models compute the attention of prompts as the module says.

    Models call `mlx.core.fast.scaled_dot_product_attention` by this name.

    Attributes:
        multiple: Numbers of queries and keys of large pieces should be multiples of this.

    Args:
        working_bytes: The memory that scores may take.
        max_small_scores: See `_MAX_SMALL_SCORES`.
    """

    def __init__(self, working_bytes: float, max_small_scores: int = _MAX_SMALL_SCORES) -> None:
        self.multiple = _MULTIPLE
        self.set_working_bytes(working_bytes)
        self._max_small_scores = max_small_scores
        self._num_heads = _DEFAULT_HEADS
        self._has_cudnn = os.environ.get("MLX_CUDA_USE_CUDNN_SDPA", "1") != "0"
        self._mlx_attention: Any = mx.fast.scaled_dot_product_attention
        # The layers of a model share it.
        self._causal: tuple[tuple[int, int], mx.array] | None = None

    def set_working_bytes(self, working_bytes: float) -> None:
        """Change the memory that scores may take."""
        self._max_part_scores = min(_MAX_PART_SCORES, max(1, int(working_bytes / _BYTES_PER_SCORE)))

    def is_large(self, num_rows: int, num_queries: int, num_keys: int) -> bool:
        """Whether cuDNN computes pieces of this size, if they need no mask array."""
        return num_rows * self._num_heads * num_queries * num_keys > self._max_small_scores

    def rounded_down(self, num_tokens: int, num_before: int) -> int:
        """How many tokens to prefill after `num_before`, at most `num_tokens`, so that the next piece begins at a multiple.

        Of a power of two, at most half of `num_tokens`: pieces of many prompts have the same shapes then.
        """
        excess = (num_before + num_tokens) % max(self.multiple, 1 << max(0, num_tokens.bit_length() - 2))
        return num_tokens - excess if num_tokens > excess else num_tokens

    def rounded_up(self, num_rows: int, num_queries: int, num_keys: int) -> int:
        """The number of queries of a piece, padding included."""
        if not self.is_large(num_rows, num_queries, num_keys):
            return num_queries
        return -(-num_queries // self.multiple) * self.multiple

    def __enter__(self) -> None:
        mx.fast.scaled_dot_product_attention = self._attend

    def __exit__(self, *_error: object) -> None:
        mx.fast.scaled_dot_product_attention = self._mlx_attention
        self._causal = None

    def _attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
    ) -> mx.array:
        num_rows, self._num_heads, num_queries, dim = q.shape
        num_keys = k.shape[2]
        is_array = isinstance(mask, mx.array)
        is_plain = not any(option is not None for option in options.values())
        if not is_plain or num_queries == 1 or not (is_array or isinstance(mask, str)):
            is_ours = False
        elif is_array:
            is_ours = mask.dtype == mx.bool_
        else:
            has_cudnn = self._has_cudnn and q.dtype in _CUDNN_TYPES and max(dim, v.shape[3]) <= _MAX_CUDNN_DIM
            is_ours = not (has_cudnn and self.is_large(num_rows, num_queries, num_keys))
        if not is_ours:
            result: mx.array = self._mlx_attention(q, k, v, scale=scale, mask=mask, **options)
            return result
        if not is_array:
            mask = self._causal_mask(num_queries, num_keys)
        return attention(q, k, v, mask=mask, scale=scale, max_scores=self._max_part_scores)

    def _causal_mask(self, num_queries: int, num_keys: int) -> mx.array:
        shape = num_queries, num_keys
        if self._causal is None or self._causal[0] != shape:
            queries = mx.arange(num_keys - num_queries, num_keys)[:, None]
            self._causal = shape, queries >= mx.arange(num_keys)[None]
        return self._causal[1]


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array, scale: float, max_scores: int
) -> mx.array:
    """Attention as matrix products, in parts.

    Args:
        q: (rows, heads, queries, size); the number of heads is a multiple of that of keys.
        k: (rows, key heads, keys, size), as `v`.
        mask: (queries, keys) or (rows or 1, 1 or heads, queries, keys), bool: which keys each query attends to.
        max_scores: How many scores are computed at a time; at least one query of one row is.
    """
    num_rows, num_heads, num_queries, _ = q.shape
    per_query = num_heads * k.shape[2]
    num_parts_rows = max(1, min(num_rows, max_scores // max(1, per_query * num_queries)))
    num_part_queries = max(1, min(num_queries, max_scores // (per_query * num_parts_rows)))
    mask = mask if mask.ndim == 4 else mask[(None,) * (4 - mask.ndim)]  # noqa: PLR2004
    rows = []
    for row in range(0, num_rows, num_parts_rows):
        some = slice(row, row + num_parts_rows)
        row_mask = mask if mask.shape[0] == 1 else mask[some]
        parts = []
        for first in range(0, num_queries, num_part_queries):
            queries = slice(first, first + num_part_queries)
            parts.append(_part(q[some, :, queries], k[some], v[some], row_mask[:, :, queries], scale))
        rows.append(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2))
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


def _part(q: mx.array, k: mx.array, v: mx.array, mask: mx.array, scale: float) -> mx.array:
    num_rows, num_heads, num_queries, _ = q.shape
    num_key_heads, num_keys = k.shape[1:3]
    repeats = num_heads // num_key_heads
    # The queries of all heads that share a key head, in one product.
    q = (q * scale).reshape(num_rows, num_key_heads, repeats * num_queries, -1)
    scores = (q @ k.swapaxes(-1, -2)).reshape(num_rows, num_key_heads, repeats, num_queries, num_keys)
    split = mask[:, :, None] if mask.shape[1] == 1 else mx.unflatten(mask, 1, (num_key_heads, repeats))
    scores = mx.where(split, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(
        num_rows, num_key_heads, repeats * num_queries, num_keys
    )
    return (weights @ v).reshape(num_rows, num_heads, num_queries, -1)
