"""Fused CPU ops: a leaner decode step for MLX's CPU back-end.

On a GPU MLX 0.32 has one kernel each for rotary embeddings, RMS norm and attention. On a CPU it composes them of many small operations; each
costs some microseconds on the thread that builds the graph, and again on the one that evaluates it, however little it computes. Here
they are composed of fewer operations, with the same results up to the rounding of sums. `worker.mlx.decoding.decode_batch` activates them while it builds a decode step.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

_ROPE_OPTIONS = {"base", "scale", "freqs"}


def _rotate(
    first: mx.array, second: mx.array, cosines: mx.array, sines: mx.array
) -> tuple[mx.array, mx.array]:
    return first * cosines - second * sines, first * sines + second * cosines


class FusedCpuOps:
    """A context manager that replaces `rope`, `rms_norm` and `scaled_dot_product_attention` of `mlx.core.fast`, which models call by these names.

    Calls with more than one token per row, or with options not supported here, are forwarded to MLX's own functions.
    """

    def __init__(self) -> None:
        self._mlx_rope: Any = mx.fast.rope
        self._mlx_rms_norm: Any = mx.fast.rms_norm
        self._mlx_attention: Any = mx.fast.scaled_dot_product_attention
        # Shapeless: compiled once, not again for each batch size.
        self._rotated: Any = mx.compile(_rotate, shapeless=True)
        self._normalized: Any = mx.compile(self._mlx_rms_norm, shapeless=True)
        self._offset: mx.array | None = None
        self._angles: dict[tuple[Any, ...], tuple[mx.array | None, mx.array, mx.array]] = {}

    def expect(self, offset: mx.array) -> None:
        """Compute the rotation angles at these positions once, until the context ends: all layers use them, and no layer modifies the array.

        Args:
            offset: (batch,) integers, the position of each row's token.
        """
        self._offset = offset

    def __enter__(self) -> None:
        mx.fast.rope = self._rope
        mx.fast.rms_norm = self._rms_norm
        mx.fast.scaled_dot_product_attention = self._attention

    def __exit__(self, *_error: object) -> None:
        mx.fast.rope = self._mlx_rope
        mx.fast.rms_norm = self._mlx_rms_norm
        mx.fast.scaled_dot_product_attention = self._mlx_attention
        self._offset = None
        self._angles.clear()

    def _rms_norm(self, x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
        # NOTE: the compiled norm does not check shapes, and writes out of bounds if the last axis is 1 (MLX 0.32).
        is_supported = x.shape[-1] > 1 and (weight is None or weight.shape == x.shape[-1:])
        norm = self._normalized if is_supported and not options else self._mlx_rms_norm
        result: mx.array = norm(x, weight, eps, **options)
        return result

    def _rope(
        self, a: mx.array, dims: int, *, traditional: bool, offset: int | mx.array, **options: Any
    ) -> mx.array:
        is_offset_per_row = isinstance(offset, mx.array) and offset.shape == a.shape[:1]
        is_one_token = a.shape[2:-1] == (1,) and 0 < dims <= a.shape[-1]
        has_angles = (options.get("base") is None) != (options.get("freqs") is None)
        if not (is_offset_per_row and is_one_token and has_angles) or options.keys() - _ROPE_OPTIONS:
            result: mx.array = self._mlx_rope(a, dims, traditional=traditional, offset=offset, **options)
            return result
        cosines, sines = self._cosines_and_sines(offset, dims, a.dtype, **options)
        rotating, rest = (a[..., :dims], [a[..., dims:]]) if dims < a.shape[3] else (a, [])
        if traditional:
            pairs = self._rotated(rotating[..., ::2], rotating[..., 1::2], cosines, sines)
            rotated = [mx.stack(pairs, axis=-1).reshape(rotating.shape)]
        else:
            rotated = self._rotated(*mx.split(rotating, 2, axis=-1), cosines, sines)
        parts = [*rotated, *rest]
        return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    def _cosines_and_sines(
        self,
        offset: Any,
        dims: int,
        dtype: mx.Dtype,
        *,
        base: float | None,
        scale: float,
        freqs: Any = None,
    ) -> tuple[mx.array, mx.array]:
        """Compute or look up the cosines and sines of the angles; each (batch, 1, 1, dims / 2)."""
        key = dims, dtype, base, scale, id(freqs)
        if offset is self._offset and key in self._angles:
            return self._angles[key][1:]
        if base is not None:
            half = dims // 2
            step = mx.array(math.log(base), mx.float32) / half  # rounded as in MLX
            frequencies = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * step)
        else:
            frequencies = mx.reciprocal(freqs.astype(mx.float32))
        angles = (offset[:, None, None, None].astype(mx.float32) * scale) * frequencies
        cosines, sines = mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)
        if offset is self._offset:
            self._angles[key] = freqs, cosines, sines
        return cosines, sines

    def _attention(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
    ) -> mx.array:
        is_padding = isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.shape[1:-1] == (1, 1)
        is_plain = q.dtype == k.dtype == v.dtype and not any(
            option is not None for option in options.values()
        )
        if q.shape[2] != 1 or not is_plain or not (mask is None or is_padding):
            result: mx.array = self._mlx_attention(q, k, v, scale=scale, mask=mask, **options)
            return result
        num_rows, num_heads, _, dim = q.shape
        num_key_heads = k.shape[1]
        # The query heads that share a key head become rows of one matrix product.
        queries = (q * scale).reshape(num_rows, num_key_heads, num_heads // num_key_heads, dim)
        scores = queries @ k.swapaxes(-1, -2)
        if mask is not None:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return (weights @ v).reshape(num_rows, num_heads, 1, v.shape[-1])
