"""Operations on the rows of a NumPy array of log-probabilities. Used by `worker.sampling.sampler`; independent of sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any
"""A NumPy array, of floats unless a docstring says otherwise."""

IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float32]]

BANNED_LOGPROB = -1e9
"""Added to the log-probability of a token that may not be chosen. Far from any real value; unlike infinity it cannot become NaN."""


def take_rows(values: Array, indices: list[int]) -> Array:
    """`values[indices]`; `values` itself if that is all of its rows."""
    return values if len(indices) == len(values) else values[indices]


def replace_rows(values: Array, indices: list[int], rows: Array) -> Array:
    """A copy of `values` with `rows` at `indices`; `rows` itself if they are all."""
    if len(indices) == len(values):
        return rows
    values = np.array(values)
    values[indices] = rows
    return values


def column(values: Sequence[float], dtype: Any = np.float32) -> Array:
    return np.array(values, dtype=dtype)[:, None]


def add_sparse(values: Array, adjustments: list[list[tuple[IntArray, FloatArray]]]) -> Array:
    """Add to single tokens of each row; a token may occur in several pairs.

    Args:
        adjustments: For each row: pairs of token ids and amounts.
    """
    if not any(adjustments):
        return values
    values = values.copy()
    for row, pairs in enumerate(adjustments):
        for ids, amounts in pairs:
            values[row, ids] += amounts
    return values


def apply_mask(words: np.ndarray[Any, Any], values: Array) -> Array:
    """Make the tokens that a mask forbids impossible to choose.

    Args:
        words: (rows, num_words) uint32, as `Matcher.fill` writes them.
        values: Log-probabilities or logits, (rows, vocab).

    Returns:
        `values` where the bit is 1, less 1e9 where it is 0.
    """
    vocab_size = values.shape[-1]
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[:, :vocab_size]
    return np.where(bits, values, values + np.float32(BANNED_LOGPROB))


def log_softmax(values: Array) -> Array:
    top = np.max(values, axis=-1, keepdims=True)
    return values - top - np.log(np.sum(np.exp(values - top), axis=-1, keepdims=True))
