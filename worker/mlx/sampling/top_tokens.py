"""Log-probabilities of tokens and the most likely tokens of each row, computed on the device and copied to the host in one array.

Used for the tokens of a decode step (`worker.mlx.sampling.choose`) and for prompts (`worker.mlx.scoring`). `worker.sampling.scores`
computes the same with NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from worker.sampling.scores import Score, finite

MAX_GROUP = 256
"""How many adjacent tokens are compared at first, at most."""

_MIN_GROUP = 16


def scores(
    values: mx.array,
    token_ids: mx.array,
    num_top: int,
    columns: mx.array,
    *,
    dtype: mx.Dtype,
    is_adjusted: mx.array | None = None,
) -> mx.array:
    """The scores of a token of each row.

    Args:
        values: Logits, (rows, vocab).
        token_ids: (rows,) uint32.
        columns: 0 to `num_top`, (1, num_top + 1) uint32.
        dtype: The model's own: its log-probabilities are rounded to it.
        is_adjusted: Rows whose logits are not the model's own: their log-probabilities are not rounded, (rows, 1) bool.

    Returns:
        (rows, num_top + 1) uint64: token ids in the upper half, log-probabilities as the bits of a float32 in the lower half. The `num_top`
        most likely tokens, best first, then the token itself.
    """
    token_ids = token_ids[:, None]
    ids = mx.where(columns == num_top, token_ids, _top_ids(values, num_top)) if num_top else token_ids
    picked = mx.take_along_axis(values, ids, axis=-1)
    total = mx.logsumexp(values, axis=-1, keepdims=True)
    logprobs = (picked.astype(dtype) - total.astype(dtype)).astype(mx.float32)
    if is_adjusted is not None:
        logprobs = mx.where(is_adjusted, picked.astype(mx.float32) - total.astype(mx.float32), logprobs)
    return (ids.astype(mx.uint64) << 32) | logprobs.view(mx.uint32).astype(mx.uint64)


def unpack(packed: Any, num_top: Sequence[int]) -> list[Score]:
    """Scores on the host.

    Args:
        packed: NumPy's copy of what `scores` returns, or some rows of it.
        num_top: How many of the most likely tokens each row reports, at most as many as were computed.
    """
    ids = (packed >> np.uint64(32)).tolist()
    logprobs = finite(packed.astype(np.uint32).view(np.float32)).tolist()
    return [
        Score(row_logprobs[-1], row_ids[:k], row_logprobs[:k])
        for row_ids, row_logprobs, k in zip(ids, logprobs, num_top, strict=True)
    ]


def own_token_ids(packed: Any) -> list[int]:
    """The tokens that were scored, from NumPy's copy of what `scores` returns."""
    return (packed[:, -1] >> np.uint64(32)).tolist()  # type: ignore[no-any-return]


def group_size(vocab_size: int, num_top: int) -> int:
    """How many adjacent tokens to compare at first; 0: no groups, as the vocabulary is too small."""
    size = MAX_GROUP
    while size > _MIN_GROUP and (vocab_size % size or vocab_size < 4 * size * num_top):
        size //= 2
    if vocab_size % size:
        size = MAX_GROUP  # the vocabulary is padded
    return size if vocab_size >= 4 * size * num_top else 0


def _top_ids(values: mx.array, num_top: int) -> mx.array:
    """Token ids of the most likely tokens, best first, (rows, num_top + 1); the last column is arbitrary.

    Of equally likely ones the first comes first, as in `argmax`: with 16 bits they are not rare. MLX's sorts are stable.
    Exact: the groups with the largest maxima contain the most likely tokens. Sorting the complete vocabulary takes many times as long.
    """
    rows, vocab_size = values.shape
    size = group_size(vocab_size, num_top)
    if not size:
        return mx.argsort(-values, axis=-1)[:, : num_top + 1].astype(mx.uint32)
    if vocab_size % size:
        values = mx.pad(values, [(0, 0), (0, size - vocab_size % size)], constant_values=-float("inf"))
    grouped = values.reshape(rows, -1, size)
    groups = mx.argsort(-mx.max(grouped, axis=-1), axis=-1)[:, :num_top]
    candidates = mx.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(rows, -1)
    order = mx.argsort(-candidates, axis=-1)[:, : num_top + 1]
    ids = mx.take_along_axis(groups, order // size, axis=-1) * size + order % size
    return mx.minimum(ids, vocab_size - 1)  # padding may win only against logits of minus infinity
