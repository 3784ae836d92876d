"""The CUDA kernel for the attention of a decode step, with left-padded rows.

It has two forms: `worker.mlx.backends.cuda_attention` only attends; `worker.mlx.backends.append_attention` also writes the step's keys and
values into the buffers (`APPEND` in the source).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

MAX_KEYS = 32_768
"""With so many keys and more MLX's own attention is used: one thread block per head was not measured there."""

LANES = {64: 8, 80: 8, 96: 8, 128: 16, 256: 32}
"""By head dimension: the number of threads that share a key."""

THREADS = 256

_MAX_HEADS = 8

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


class BlockShape(NamedTuple):
    """What a thread block computes.

    Attributes:
        num_heads: Query heads, which share a key head.
    """

    num_heads: int
    num_threads: int


class AttentionKernel:
    """One form of the kernel; compiled at first use for each type, head dimension, number of query heads per key head and block shape.

    Args:
        name: Names the form.
        input_names: The queries first.
        appends: Whether it writes the step's keys and values.
    """

    def __init__(self, name: str, input_names: Sequence[str], *, appends: bool) -> None:
        # MLX may cache compiled kernels by name alone.
        source_hash = hashlib.sha256((_HEADER + _SOURCE).encode()).hexdigest()[:8]
        self._scales: dict[float, mx.array] = {}
        self._kernel: Any = mx.fast.cuda_kernel(
            name=f"mlx_pool_{name}_{source_hash}",
            input_names=[*input_names, "scale"],
            output_names=["result"],
            source=_SOURCE,
            header=f"#define APPEND {int(appends)}" + _HEADER,
            ensure_row_contiguous=False,
        )

    def __call__(
        self, inputs: Sequence[mx.array], scale: float, num_key_heads: int, block: BlockShape
    ) -> mx.array:
        """Launch the kernel.

        Args:
            inputs: As `input_names`; the queries are (rows, query heads, 1, D).
            scale: Factor of the dot products.

        Returns:
            Shape and type of the queries.
        """
        queries = inputs[0]
        num_rows, num_heads, _, dim = queries.shape
        repeats = num_heads // num_key_heads
        if scale not in self._scales:
            self._scales[scale] = mx.array(scale, mx.float32)
        results: list[mx.array] = self._kernel(
            inputs=[*inputs, self._scales[scale]],
            template=[
                ("T", queries.dtype),
                ("D", dim),
                ("LANES", LANES[dim]),
                ("THREADS", block.num_threads),
                ("REPEATS", repeats),
                ("HEADS", block.num_heads),
            ],
            grid=(num_key_heads * block.num_threads, num_rows, repeats // block.num_heads),
            threadgroup=(block.num_threads, 1, 1),
            output_shapes=[queries.shape],
            output_dtypes=[queries.dtype],
        )
        return results[0]


def fits(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether the kernel supports arrays of these shapes and types."""
    return (
        queries.shape[2] == 1
        and queries.shape[3] in LANES
        and queries.shape[0] == keys.shape[0]
        and keys.shape == values.shape
        and keys.shape[2] < MAX_KEYS
        and queries.dtype == keys.dtype == values.dtype
    )


def max_block_heads(repeats: int) -> int:
    """The most query heads that a block can compute.

    Args:
        repeats: Query heads per key head.
    """
    return next(n for n in range(min(repeats, _MAX_HEADS), 0, -1) if repeats % n == 0)
