"""Scores that are computed on the device: log-probabilities and most likely tokens, compared with NumPy's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from worker.mlx.sampling.top_tokens import own_token_ids, scores, unpack
from worker.sampling.scores import score


@pytest.mark.parametrize("vocab_size", [40, 1500, 4096, 20_011, 49_152])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_scores(vocab_size: int, dtype: mx.Dtype) -> None:
    """Those of NumPy, in groups of any size or none, if the model's log-probabilities are rounded to its dtype."""
    logits = mx.random.normal((3, vocab_size), scale=3, key=mx.random.key(vocab_size)).astype(dtype)
    logprobs = np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.float32))
    for num_top in (0, 1, 2, 20):
        columns = mx.arange(num_top + 1, dtype=mx.uint32)[None, :]
        packed = scores(logits, mx.array([5, 0, 39], mx.uint32), num_top, columns, dtype=dtype)
        assert own_token_ids(np.array(packed)) == [5, 0, 39]
        found = unpack(np.array(packed), [num_top] * 3)
        wanted = [score(row, token_id, num_top) for row, token_id in zip(logprobs, (5, 0, 39), strict=True)]
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.logprob == theirs.logprob
            assert ours.top_logprobs == theirs.top_logprobs
            assert len(set(ours.top_ids)) == num_top


def test_scores_of_a_row_without_likely_tokens() -> None:
    """Logits of minus infinity, or none that are numbers: token ids of the vocabulary, log-probabilities that JSON has."""
    logits = np.full((2, 20_011), -np.inf, np.float32)
    logits[0, 20_000], logits[1] = 1.0, np.nan
    columns = mx.arange(21, dtype=mx.uint32)[None, :]
    packed = scores(mx.array(logits), mx.array([20_000, 3], mx.uint32), 20, columns, dtype=mx.float32)
    first, second = unpack(np.array(packed), [20, 20])
    assert (first.logprob, first.top_ids[0], first.top_logprobs[:2]) == (0.0, 20_000, [0.0, -9999.0])
    assert second.logprob == -9999.0
    assert all(0 <= token_id < 20_011 for token_id in first.top_ids + second.top_ids)
