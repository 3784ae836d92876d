"""Scores that are computed on the device: log-probabilities and most likely tokens, compared with NumPy's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from common.protocol import SamplingParams
from worker.mlx.batch import make_sampler
from worker.mlx.decoding.decode_batch import BatchSequence
from worker.mlx.sampling.chosen import PreviousTokens
from worker.mlx.sampling.top_tokens import own_token_ids, scores, unpack
from worker.sampling.scores import score
from worker.sampling.sequence_sampler import SequenceSampler


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


@pytest.mark.parametrize("vocab_size", [40, 4096, 20_011])
def test_equally_likely_tokens(vocab_size: int) -> None:
    """The first of them comes first, so that a greedy token is the first of the most likely ones."""
    logits = mx.random.normal((8, vocab_size), key=mx.random.key(vocab_size)).round().astype(mx.float16)
    token_ids = mx.argmax(logits, axis=-1)
    for num_top in (1, 5):
        columns = mx.arange(num_top + 1, dtype=mx.uint32)[None, :]
        packed = scores(logits, token_ids.astype(mx.uint32), num_top, columns, dtype=mx.float16)
        found = unpack(np.array(packed), [num_top] * 8)
        assert [each.top_ids[0] for each in found] == token_ids.tolist()


@pytest.mark.parametrize("vocab_size", [3, 20])
def test_a_small_vocabulary(vocab_size: int) -> None:
    """A token is reported once, the most likely ones first."""
    sampler = make_sampler(vocab_size, on_device=True)
    own = SequenceSampler(SamplingParams(temperature=0), num_top_logprobs=20)
    sequence = BatchSequence("0", [1, 2], 9, own, num_cached=1)
    logits = mx.arange(vocab_size, dtype=mx.float32)[None, :]
    chosen = sampler.choose([sequence], mx.array([2], mx.uint32), logits, PreviousTokens([own], [None]))
    ((token_id, found),) = chosen.read()
    assert found is not None
    assert token_id == vocab_size - 1
    assert found.top_ids == list(range(vocab_size - 1, 0, -1))
