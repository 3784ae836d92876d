"""A decode step of fewer operations, for MLX's CPU back-end.

On a GPU MLX 0.32 has one kernel each for rotary embeddings, RMS norms and attention. On a CPU it composes them of many small
operations, of which each takes some microseconds on the thread that builds the step and again on the one that computes it,
however little it computes. Here they are composed of fewer, to the same results (sums may round otherwise). `mlx_decoding` has them used while it builds
a step.
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
    """A context in which models have these operations for those of `mlx.core.fast`, which they call by their names there.

    Rotations and attention of more than one token a row, and what has options that are not known here, go to MLX's own.
    """

    def __init__(self) -> None:
        self._own_rope: Any = mx.fast.rope
        self._own_rms_norm: Any = mx.fast.rms_norm
        self._own_attention: Any = mx.fast.scaled_dot_product_attention
        # Without shapes: compiled once, not again for each number of rows.
        self._rotated: Any = mx.compile(_rotate, shapeless=True)
        self._normalized: Any = mx.compile(self._own_rms_norm, shapeless=True)
        self._offset: mx.array | None = None
        self._angles: dict[tuple[Any, ...], tuple[mx.array | None, mx.array, mx.array]] = {}

    def expect(self, offset: mx.array) -> None:
        """Compute the angles at `offset` (rows,) once until the context ends: many layers have it, and none changes it in place."""
        self._offset = offset

    def __enter__(self) -> None:
        mx.fast.rope = self._rope
        mx.fast.rms_norm = self._rms_norm
        mx.fast.scaled_dot_product_attention = self._attention

    def __exit__(self, *_error: object) -> None:
        mx.fast.rope = self._own_rope
        mx.fast.rms_norm = self._own_rms_norm
        mx.fast.scaled_dot_product_attention = self._own_attention
        self._offset = None
        self._angles.clear()

    def _rms_norm(self, x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
        # What is compiled checks no shapes, and writes where it must not for a last axis of one (MLX 0.32).
        is_sound = x.shape[-1] > 1 and (weight is None or weight.shape == x.shape[-1:])
        norm = self._normalized if is_sound and not options else self._own_rms_norm
        found: mx.array = norm(x, weight, eps, **options)
        return found

    def _rope(
        self, a: mx.array, dims: int, *, traditional: bool, offset: int | mx.array, **options: Any
    ) -> mx.array:
        has_offsets = isinstance(offset, mx.array) and offset.shape == a.shape[:1]
        is_one_token = a.shape[2:-1] == (1,) and 0 < dims <= a.shape[-1]
        has_angles = (options.get("base") is None) != (options.get("freqs") is None)
        if not (has_offsets and is_one_token and has_angles) or options.keys() - _ROPE_OPTIONS:
            found: mx.array = self._own_rope(a, dims, traditional=traditional, offset=offset, **options)
            return found
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
        """Each (rows, 1, 1, dims / 2)."""
        key = dims, dtype, base, scale, id(freqs)
        if offset is self._offset and key in self._angles:
            return self._angles[key][1:]
        if base is not None:
            half = dims // 2
            step = mx.array(math.log(base), mx.float32) / half  # rounded as MLX does
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
            found: mx.array = self._own_attention(q, k, v, scale=scale, mask=mask, **options)
            return found
        num_rows, num_heads, _, dim = q.shape
        num_key_heads = k.shape[1]
        # Query heads of one key head are rows of one product.
        queries = (q * scale).reshape(num_rows, num_key_heads, num_heads // num_key_heads, dim)
        scores = queries @ k.swapaxes(-1, -2)
        if mask is not None:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return (weights @ v).reshape(num_rows, num_heads, 1, v.shape[-1])
