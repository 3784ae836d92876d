"""Operations on the rows of an array, for NumPy and for MLX: the module comes as `xp`. Independent of sampling parameters.

Used by the sampler. Written twice only if the two differ: NumPy changes a copy in place, MLX makes new arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any
"""A NumPy or an MLX array."""

IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float32]]

BANNED_LOGPROB = -1e9
"""Added to the log-probability of a token that may not be chosen. Far from any real value; unlike infinity it cannot become NaN."""


def take_rows(xp: Any, values: Array, indices: list[int], num_rows: int) -> Array:
    """`values[indices]`; `values` itself if that is all of its rows."""
    return values if len(indices) == num_rows else values[xp.array(indices)]


def replace_rows(xp: Any, values: Array, indices: list[int], rows: Array) -> Array:
    """A copy of `values` with `rows` at `indices`; `rows` itself if they are all."""
    if len(indices) == len(values):
        return rows
    values = xp.array(values)  # MLX copies lazily: assigning below rebinds the copy only
    values[xp.array(indices)] = rows
    return values


def column(xp: Any, values: Sequence[float], dtype: Any = np.float32) -> Array:
    return xp.array(np.array(values, dtype=dtype)[:, None])


def add_sparse(xp: Any, values: Array, adjustments: list[list[tuple[IntArray, FloatArray]]]) -> Array:
    """Add to single tokens of each row; a token may occur in several pairs.

    Args:
        adjustments: For each row: pairs of token ids and amounts.
    """
    flat = [(row, ids, amounts) for row, pairs in enumerate(adjustments) for ids, amounts in pairs]
    if not flat:
        return values
    if xp is np:
        values = values.copy()
        for row, ids, amounts in flat:
            values[row, ids] += amounts
        return values
    rows = xp.array(np.concatenate([np.full(len(ids), row) for row, ids, _ in flat]))
    columns = xp.array(np.concatenate([ids for _, ids, _ in flat]))
    return values.at[rows, columns].add(xp.array(np.concatenate([amounts for *_, amounts in flat])))


def apply_mask(xp: Any, words: np.ndarray[Any, Any], values: Array) -> Array:
    """Make the tokens that a mask forbids impossible to choose.

    Args:
        words: (rows, num_words) uint32, as `Matcher.fill` writes them.
        values: Log-probabilities or logits, (rows, vocab).

    Returns:
        `values` where the bit is 1, less 1e9 where it is 0.
    """
    vocab_size = values.shape[-1]
    if xp is np:
        bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[:, :vocab_size]
        return np.where(bits, values, values + np.float32(BANNED_LOGPROB))
    shifts = xp.arange(32, dtype=xp.uint32)
    bits = (xp.array(words)[:, :, None] >> shifts) & 1
    allowed = bits.reshape(words.shape[0], -1)[:, :vocab_size] > 0
    return xp.where(allowed, values, values + BANNED_LOGPROB)


def log_softmax(xp: Any, values: Array) -> Array:
    top = xp.max(values, axis=-1, keepdims=True)
    return values - top - xp.log(xp.sum(xp.exp(values - top), axis=-1, keepdims=True))
