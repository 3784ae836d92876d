"""What one layer's attention of a decode step costs: MLX's own with a mask, without one, and the worker's kernel.

`python -m bench.attention` needs MLX's CUDA back-end. Heads as those of the 1B shape (32 queries, 8 keys, 64 numbers each,
bfloat16); rows begin at up to 23 different places. A call's time is that of 64 calls one after another, CPU and GPU together.
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
    """Of one of many calls."""
    mx.eval([call() for _ in range(4)])
    began = time.perf_counter()
    mx.eval([call() for _ in range(NUM_CALLS)])
    return (time.perf_counter() - began) / NUM_CALLS


def calls(num_rows: int, num_keys: int) -> list[Callable[[], mx.array]]:
    """The three ways for rows of that shape."""
    kernel, own = CudaKernel(), mx.fast.scaled_dot_product_attention
    q = mx.random.normal((num_rows, 32, 1, 64)).astype(mx.bfloat16)
    buffers = mx.random.normal((2, num_rows, 8, 4096, 64)).astype(mx.bfloat16)
    k, v = buffers[0][:, :, :num_keys], buffers[1][:, :, :num_keys]
    start = mx.array([i % MAX_PADDING for i in range(num_rows)], dtype=mx.int32)
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
        sys.exit("bench.attention measures a kernel for MLX's CUDA back-end, which is not here.")
    table = Table(["rows", "keys", "with a mask, µs", "without", "the kernel"])
    for num_rows, num_keys in SHAPES:
        rounds = [[seconds(call) for call in calls(num_rows, num_keys)] for _ in range(ROUNDS)]
        middle = [statistics.median(way) for way in zip(*rounds, strict=True)]
        table.add([str(num_rows), str(num_keys), *(f"{1e6 * each:.0f}" for each in middle)])
    say(f"medians of {ROUNDS} rounds of {NUM_CALLS} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
