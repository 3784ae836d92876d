"""Time of one layer's attention in a decode step: MLX's own with a mask, without one, and the worker's CUDA kernel.

`python -m bench.attention` needs MLX's CUDA back-end. The heads are those of a 1B model (32 query heads, 8 key heads, head size 64,
bfloat16); sequences have up to 22 tokens of left padding. Reported is the mean over 64 consecutive calls, launch and kernel together.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx

from bench.harness.table import Table, say
from worker.mlx.backends.cuda_attention import CudaKernel

SHAPES = ((8, 300), (32, 600), (64, 600), (64, 2000), (8, 4000))
MAX_PADDING = 23
NUM_CALLS = 64
ROUNDS = 5
SCALE = 64**-0.5


def seconds(call: Callable[[], mx.array]) -> float:
    """Mean time of one call."""
    mx.eval([call() for _ in range(4)])
    began = time.perf_counter()
    mx.eval([call() for _ in range(NUM_CALLS)])
    return (time.perf_counter() - began) / NUM_CALLS


def calls(num_sequences: int, num_keys: int) -> list[Callable[[], mx.array]]:
    """The three implementations, on arrays of that shape."""
    kernel, own = CudaKernel(), mx.fast.scaled_dot_product_attention
    q = mx.random.normal((num_sequences, 32, 1, 64)).astype(mx.bfloat16)
    buffers = mx.random.normal((2, num_sequences, 8, 4096, 64)).astype(mx.bfloat16)
    k, v = buffers[0][:, :, :num_keys], buffers[1][:, :, :num_keys]
    start = mx.array([i % MAX_PADDING for i in range(num_sequences)], dtype=mx.int32)
    mask = (mx.arange(num_keys)[None, :] >= start[:, None])[:, None, None, :]
    mx.eval(q, k, v, start, mask)
    return [
        lambda: own(q, k, v, scale=SCALE, mask=mask),
        lambda: own(q, k, v, scale=SCALE),
        lambda: kernel(q, k, v, start, SCALE),
    ]


def main() -> int:
    """Measure and print a table."""
    if not mx.cuda.is_available():
        sys.exit("bench.attention needs MLX's CUDA back-end, which is not available on this machine.")
    table = Table(["sequences", "keys", "masked, µs", "unmasked, µs", "our kernel, µs"])
    for num_sequences, num_keys in SHAPES:
        rounds = [[seconds(call) for call in calls(num_sequences, num_keys)] for _ in range(ROUNDS)]
        medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
        table.add([str(num_sequences), str(num_keys), *(f"{1e6 * each:.0f}" for each in medians)])
    say(f"medians of {ROUNDS} rounds of {NUM_CALLS} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
