"""CUDA kernels for the attention of a decode step with left-padded rows.

MLX 0.32 has a CUDA kernel for one query that attends to all keys, but none with a mask: it launches five kernels then, and
launches limit the decode step of a small model. Metal's kernel supports masks, so this is for CUDA alone. `CudaKernel` takes the place of
MLX's own attention if the mask is the padding mask and nothing else (`worker.mlx.decoding.decode_batch`). With `APPEND` the
kernel also writes the step's keys and values into the buffers, see `worker.mlx.backends.append_attention`.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from typing import Any, Protocol, cast

import mlx.core as mx

log = logging.getLogger(__name__)

MAX_KEYS = 32_768
"""With more keys MLX's own attention is used: one thread block per head was not measured there."""

LANES = {64: 8, 80: 8, 96: 8, 128: 16, 256: 32}
"""By head dimension: the number of threads that share a key."""

THREADS = 256
MAX_HEADS = 8

_TEST_KEYS = 40
_MAX_DIFFERENCE = 0.03

HEADER = """
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

SOURCE = """
  // LANES threads share a key at a time; a block processes all keys of one row and key head, for HEADS of its queries.
  constexpr int PER_LANE = D / LANES;
  constexpr int GROUPS = THREADS / LANES;
  constexpr float MIN_SCORE = -1e30f;
  __shared__ float maxima[HEADS][GROUPS];
  __shared__ float sums[HEADS][GROUPS];
  __shared__ float outputs[GROUPS][D];

  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, in_warp = group % (32 / LANES);
  const int head = blockIdx.x, row = blockIdx.y, first_query = head * REPEATS + blockIdx.z * HEADS;
#if APPEND
  const int last = end[0], num_keys = last + 1;
  new_keys += row * new_keys_strides[0] + head * new_keys_strides[1];
  new_values += row * new_values_strides[0] + head * new_values_strides[1];
  if (blockIdx.z == 0) {
    // No thread of this launch reads these columns: all take the new key and value from where they come from.
    T* key_to = const_cast<T*>(keys) + row * keys_strides[0] + head * keys_strides[1] + last * keys_strides[2];
    T* value_to = const_cast<T*>(values) + row * values_strides[0] + head * values_strides[1] + last * values_strides[2];
    for (int d = threadIdx.x; d < D; d += THREADS) {
      key_to[d] = new_keys[d];
      value_to[d] = new_values[d];
    }
  }
#else
  const int num_keys = keys_shape[2];
#endif
  queries += row * queries_strides[0] + first_query * queries_strides[1] + lane * PER_LANE;
  keys += row * keys_strides[0] + head * keys_strides[1] + lane * PER_LANE;
  values += row * values_strides[0] + head * values_strides[1] + lane * PER_LANE;
  result += (static_cast<long long>(row) * gridDim.x * REPEATS + first_query) * D;

  float query[HEADS][PER_LANE], output[HEADS][PER_LANE], maximum[HEADS], sum[HEADS];
  #pragma unroll
  for (int h = 0; h < HEADS; h++) {
    maximum[h] = MIN_SCORE;
    sum[h] = 0.0f;
    #pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      query[h][i] = static_cast<float>(queries[h * queries_strides[1] + i]) * scale[0] * 1.44269504f;
      output[h][i] = 0.0f;
    }
  }

  // All threads of a warp run the same number of iterations: they shuffle together.
#if APPEND
  const int begin = min(start[row], last);  // a slot without a sequence sees its own key only
#else
  const int begin = start[row];
#endif
  for (int first = begin + group - in_warp; first < num_keys; first += GROUPS) {
    const bool is_key = first + in_warp < num_keys;
    const long long at = is_key ? first + in_warp : num_keys - 1;
    Numbers<T, PER_LANE> key, value;
#if APPEND
    key.read(at == last ? new_keys + lane * PER_LANE : keys + at * keys_strides[2]);
    value.read(at == last ? new_values + lane * PER_LANE : values + at * values_strides[2]);
#else
    key.read(keys + at * keys_strides[2]);
    value.read(values + at * values_strides[2]);
#endif
    #pragma unroll
    for (int h = 0; h < HEADS; h++) {
      float score = 0.0f;
      #pragma unroll
      for (int i = 0; i < PER_LANE; i++) score += query[h][i] * static_cast<float>(key.of[i]);
      #pragma unroll
      for (int other = LANES / 2; other > 0; other /= 2) score += __shfl_xor_sync(0xFFFFFFFF, score, other);
      const float higher = fmaxf(maximum[h], is_key ? score : MIN_SCORE);
      const float shrunk = exp2f(maximum[h] - higher);
      const float weight = is_key ? exp2f(score - higher) : 0.0f;
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
      float highest = MIN_SCORE, total = 0.0f, weights = 0.0f;
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


def kernel_name(purpose: str) -> str:
    """A name that changes with the source: MLX may cache compiled kernels by name alone."""
    return f"mlx_pool_{purpose}_" + hashlib.sha256((HEADER + SOURCE).encode()).hexdigest()[:8]


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


def fits(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether `CudaKernel` supports arrays of these shapes and types."""
    return (
        queries.shape[2] == 1
        and queries.shape[3] in LANES
        and queries.shape[0] == keys.shape[0]
        and keys.shape == values.shape
        and keys.shape[2] < MAX_KEYS
        and queries.dtype == keys.dtype == values.dtype
    )


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
    """`Kernel` on MLX's CUDA back-end; compiled at first use for each type, head dimension and number of query heads per key head."""

    def __init__(self) -> None:
        self._scales: dict[float, mx.array] = {}
        self._kernel: Any = mx.fast.cuda_kernel(
            name=kernel_name("attention"),
            input_names=["queries", "keys", "values", "start", "scale"],
            output_names=["result"],
            source=SOURCE,
            header="#define APPEND 0" + HEADER,
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
        heads = next(n for n in range(min(repeats, MAX_HEADS), 0, -1) if repeats % n == 0)
        if scale not in self._scales:
            self._scales[scale] = mx.array(scale, mx.float32)
        template = [
            ("T", queries.dtype),
            ("D", dim),
            ("LANES", LANES[dim]),
            ("THREADS", THREADS),
            ("REPEATS", repeats),
            ("HEADS", heads),
        ]
        results: list[mx.array] = self._kernel(
            inputs=[queries, keys, values, start, self._scales[scale]],
            template=template,
            grid=(num_key_heads * THREADS, num_rows, repeats // heads),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[queries.shape],
            output_dtypes=[queries.dtype],
        )
        return results[0]


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
