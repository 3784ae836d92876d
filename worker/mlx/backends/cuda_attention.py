"""Attention of a decode step whose rows begin at different places, in one kernel of MLX's CUDA back-end.

MLX 0.32 has a kernel on CUDA for one query that attends to everything, and none for one with a mask: there it takes five, each of
which the CPU has to start, and that is what limits a decode step of a small model. Metal's kernel takes masks: this is for CUDA
alone. `mlx_decoding` has it computed in place of MLX's own where the mask is the padding's and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from typing import Any, Protocol, cast

import mlx.core as mx

log = logging.getLogger(__name__)

MAX_KEYS = 32_768
"""Of more MLX's own is used: how fast one block of threads for all keys of a head is there was not measured."""

_LANES = {64: 8, 80: 8, 96: 8, 128: 16, 256: 32}  # by size of a head: threads that share a key
_THREADS = 256
_MAX_HEADS = 8

_TRIAL_KEYS = 40
_MAX_DIFFERENCE = 0.03

_HEADER = """
template <typename T, int N>
struct Numbers {
  alignas(16) T of[N];

  __device__ void read(const T* from) {
    constexpr int BYTES = N * sizeof(T);
    if (BYTES % 16 == 0 && reinterpret_cast<unsigned long long>(from) % 16 == 0) {
      #pragma unroll
      for (int i = 0; i < BYTES / 16; i++)
        reinterpret_cast<uint4*>(of)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
      #pragma unroll
      for (int i = 0; i < N; i++) of[i] = from[i];
    }
  }
};
"""

_SOURCE = """
  // LANES threads together have a key at a time; a block has all keys of a row's head, for HEADS of its queries.
  constexpr int PER_LANE = D / LANES;
  constexpr int GROUPS = THREADS / LANES;
  constexpr float LEAST = -1e30f;
  __shared__ float maxima[HEADS][GROUPS];
  __shared__ float sums[HEADS][GROUPS];
  __shared__ float outputs[GROUPS][D];

  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, in_warp = group % (32 / LANES);
  const int head = blockIdx.x, row = blockIdx.y, first_query = head * REPEATS + blockIdx.z * HEADS;
  const int num_keys = keys_shape[2];
  queries += row * queries_strides[0] + first_query * queries_strides[1] + lane * PER_LANE;
  keys += row * keys_strides[0] + head * keys_strides[1] + lane * PER_LANE;
  values += row * values_strides[0] + head * values_strides[1] + lane * PER_LANE;
  result += (static_cast<long long>(row) * gridDim.x * REPEATS + first_query) * D;

  float query[HEADS][PER_LANE], output[HEADS][PER_LANE], maximum[HEADS], sum[HEADS];
  #pragma unroll
  for (int h = 0; h < HEADS; h++) {
    maximum[h] = LEAST;
    sum[h] = 0.0f;
    #pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      query[h][i] = static_cast<float>(queries[h * queries_strides[1] + i]) * scale[0] * 1.44269504f;
      output[h][i] = 0.0f;
    }
  }

  // The threads of a warp go round equally often: they shuffle together.
  for (int first = start[row] + group - in_warp; first < num_keys; first += GROUPS) {
    const bool is_there = first + in_warp < num_keys;
    const long long at = is_there ? first + in_warp : num_keys - 1;
    Numbers<T, PER_LANE> key, value;
    key.read(keys + at * keys_strides[2]);
    value.read(values + at * values_strides[2]);
    #pragma unroll
    for (int h = 0; h < HEADS; h++) {
      float score = 0.0f;
      #pragma unroll
      for (int i = 0; i < PER_LANE; i++) score += query[h][i] * static_cast<float>(key.of[i]);
      #pragma unroll
      for (int other = LANES / 2; other > 0; other /= 2) score += __shfl_xor_sync(0xFFFFFFFF, score, other);
      const float higher = fmaxf(maximum[h], is_there ? score : LEAST);
      const float shrunk = exp2f(maximum[h] - higher);
      const float weight = is_there ? exp2f(score - higher) : 0.0f;
      maximum[h] = higher;
      sum[h] = sum[h] * shrunk + weight;
      #pragma unroll
      for (int i = 0; i < PER_LANE; i++)
        output[h][i] = output[h][i] * shrunk + weight * static_cast<float>(value.of[i]);
    }
  }

  #pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (lane == 0) {
      maxima[h][group] = maximum[h];
      sums[h][group] = sum[h];
    }
    #pragma unroll
    for (int i = 0; i < PER_LANE; i++) outputs[group][lane * PER_LANE + i] = output[h][i];
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += THREADS) {
      float highest = LEAST, total = 0.0f, weights = 0.0f;
      for (int g = 0; g < GROUPS; g++) highest = fmaxf(highest, maxima[h][g]);
      for (int g = 0; g < GROUPS; g++) {
        const float share = exp2f(maxima[h][g] - highest);
        total += share * outputs[g][d];
        weights += share * sums[h][g];
      }
      result[h * D + d] = static_cast<T>(total / weights);
    }
    __syncthreads();
  }
"""


class Kernel(Protocol):
    """Attention of one query a row and head, of rows that begin at different places."""

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """Whether it can be used on such arrays."""

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, start: mx.array, scale: float
    ) -> mx.array:
        """What each row's query finds among the row's keys from `start` on.

        Args:
            queries: (rows, query heads, 1, D); the numbers of a head lie together, as in the others.
            keys: (rows, key heads, length, D), as are `values`; each key head serves equally many query heads.
            start: (rows,) int32, each less than length.
            scale: Of the products.

        Returns:
            As `queries`.
        """


def fits(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether `CudaKernel` is made for such arrays."""
    return (
        queries.shape[2] == 1
        and queries.shape[3] in _LANES
        and queries.shape[0] == keys.shape[0]
        and keys.shape == values.shape
        and keys.shape[2] < MAX_KEYS
        and queries.dtype == keys.dtype == values.dtype
    )


def works(kernel: Kernel, dtype: mx.Dtype, dim: int, repeats: int) -> bool:
    """Whether a kernel computes here what MLX does; where it does not, the log says why.

    Args:
        repeats: Query heads for each key head.
    """
    shape = (2, 2, _TRIAL_KEYS, dim)
    keys, values, queries = (
        mx.random.normal(shape, key=mx.random.key(number)).astype(dtype) for number in range(3)
    )
    queries = mx.repeat(queries[:, :, :1], repeats, axis=1)
    start = mx.array([0, 7], dtype=mx.int32)
    mask = (mx.arange(_TRIAL_KEYS)[None, :] >= start[:, None])[:, None, None, :]
    scale = dim**-0.5
    wide = [each.astype(mx.float32) for each in (queries, keys, values)]
    wanted = mx.fast.scaled_dot_product_attention(*wide, scale=scale, mask=mask)
    try:
        found = kernel(queries, keys, values, start, scale)
        difference: Any = mx.abs(found.astype(mx.float32) - wanted).max().item()
    except Exception:
        log.exception("the attention kernel cannot be used; padded rows have MLX's own attention")
        return False
    if not difference < _MAX_DIFFERENCE:
        log.error("the attention kernel is off by %s; padded rows have MLX's own attention", difference)
        return False
    return True


class CudaKernel:
    """`Kernel` on MLX's CUDA back-end; compiled for each kind of arrays when they first come."""

    def __init__(self) -> None:
        self._scales: dict[float, mx.array] = {}
        self._kernel: Any = mx.fast.cuda_kernel(
            # MLX may keep what it compiled by its name alone.
            name="mlx_pool_attention_" + hashlib.sha256((_HEADER + _SOURCE).encode()).hexdigest()[:8],
            input_names=["queries", "keys", "values", "start", "scale"],
            output_names=["result"],
            source=_SOURCE,
            header=_HEADER,
            ensure_row_contiguous=False,
        )

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """See `Kernel`."""
        return fits(queries, keys, values)

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, start: mx.array, scale: float
    ) -> mx.array:
        """See `Kernel`."""
        num_rows, num_heads, _, dim = queries.shape
        num_key_heads = keys.shape[1]
        repeats = num_heads // num_key_heads
        heads = next(n for n in range(min(repeats, _MAX_HEADS), 0, -1) if repeats % n == 0)
        if scale not in self._scales:
            self._scales[scale] = mx.array(scale, mx.float32)
        template = [
            ("T", queries.dtype),
            ("D", dim),
            ("LANES", _LANES[dim]),
            ("THREADS", _THREADS),
            ("REPEATS", repeats),
            ("HEADS", heads),
        ]
        results: list[mx.array] = self._kernel(
            inputs=[queries, keys, values, start, self._scales[scale]],
            template=template,
            grid=(num_key_heads * _THREADS, num_rows, repeats // heads),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[queries.shape],
            output_dtypes=[queries.dtype],
        )
        return results[0]


class TriedKernel:
    """A `Kernel` around another, which it tries with a few numbers for each kind of arrays when they first come."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._works: dict[tuple[mx.Dtype, int, int], bool] = {}

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        """See `Kernel`; what did not work once is not tried again."""
        if not self._kernel.supports(queries, keys, values):
            return False
        kind = queries.dtype, queries.shape[3], queries.shape[1] // keys.shape[1]
        if kind not in self._works:
            self._works[kind] = works(self._kernel, *kind)
        return self._works[kind]

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, start: mx.array, scale: float
    ) -> mx.array:
        """See `Kernel`."""
        return self._kernel(queries, keys, values, start, scale)


@cache
def cuda_kernel() -> TriedKernel:
    """This process's."""
    return TriedKernel(CudaKernel())


class PaddedAttention:
    """A context in which MLX's attention is `kernel` wherever the mask is the one that was expected.

    Models call `mlx.core.fast.scaled_dot_product_attention` by that name and hand the mask of their cache on to it. A model that
    makes another mask of it, or none, has MLX's own attention.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._own: Any = mx.fast.scaled_dot_product_attention
        self._mask: mx.array | None = None
        self._start: mx.array | None = None

    def expect(self, mask: mx.array, start: mx.array) -> None:
        """`mask` hides what is before `start` (rows,) in each row, and nothing else."""
        self._mask, self._start = mask, start

    def __enter__(self) -> None:
        mx.fast.scaled_dot_product_attention = self._attend

    def __exit__(self, *_error: object) -> None:
        mx.fast.scaled_dot_product_attention = self._own
        self._mask = self._start = None

    def _attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
    ) -> mx.array:
        is_ours = self._start is not None and mask is self._mask
        is_plain = not any(option is not None for option in options.values())
        if is_ours and is_plain and self._kernel.supports(q, k, v):
            return self._kernel(q, k, v, cast("mx.array", self._start), scale)
        found: mx.array = self._own(q, k, v, scale=scale, mask=mask, **options)
        return found
