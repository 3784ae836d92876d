"""Random numbers of draws, computed on the device: the same as `worker.sampling.sampler` computes with NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from worker.sampling.sampler import MIXER_FACTORS, TOKEN_HASH_FACTOR
from worker.sampling.sequence_sampler import SPLITMIX_FACTORS, SPLITMIX_INCREMENT


def token_hashes(vocab_size: int) -> mx.array:
    """A constant for each token, (1, vocab) uint32."""
    return mx.array((np.arange(vocab_size, dtype=np.uint32) * TOKEN_HASH_FACTOR)[None, :])


def next_states(states: mx.array) -> mx.array:
    """The states for the next position, (rows,) uint64."""
    return states + _uint64(SPLITMIX_INCREMENT)


def random_bits(states: mx.array) -> mx.array:
    """64 random bits for each row (SplitMix64), (rows,) uint64."""
    z = (states ^ (states >> 30)) * _uint64(SPLITMIX_FACTORS[0])
    z = (z ^ (z >> 27)) * _uint64(SPLITMIX_FACTORS[1])
    return z ^ (z >> 31)


def log_times(keys: mx.array, hashes: mx.array) -> mx.array:
    """Logarithms of exponentially distributed times with mean 1, by row and token.

    Args:
        keys: 64 random bits for each row, (rows,) uint64.
        hashes: See `token_hashes`.

    Returns:
        (rows, vocab) float32, finite.
    """
    halves = keys[:, None].view(mx.uint32)  # all of MLX's devices are little-endian
    low, high = halves[:, :1], halves[:, 1:]
    bits = hashes + low
    bits = (bits ^ (bits >> 16)) * int(MIXER_FACTORS[0]) + high
    bits = (bits ^ (bits >> 15)) * int(MIXER_FACTORS[1])
    bits = bits ^ (bits >> 15)
    uniform = bits.astype(mx.float32) * 2.0**-32 + 2.0**-33
    return mx.log(-mx.log1p(-mx.minimum(uniform, 1 - 2.0**-24)))


def _uint64(value: int) -> mx.array:
    """An array, as MLX's scalars have 63 bits; not made when this module is imported, which is no time to start a GPU."""
    return mx.array(np.array(value, np.uint64))
