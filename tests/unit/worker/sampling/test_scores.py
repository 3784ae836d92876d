"""Scores of tokens with NumPy: exact for any vocabulary, and numbers that JSON has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.sampling.scores import Score, score


def logprobs(seed: int, vocab_size: int) -> Any:
    values = np.random.default_rng(seed).permutation(vocab_size).astype(np.float32)
    return -values / vocab_size


@given(
    vocab_size=st.one_of(st.integers(1, 300), st.sampled_from([5120, 5121, 12_807, 49_152])),
    num_top=st.integers(0, 20),
    seed=st.integers(0, 100),
)
def test_the_most_likely_tokens(vocab_size: int, num_top: int, seed: int) -> None:
    """Those of a complete sort, best first, and the token's own."""
    values = logprobs(seed, vocab_size)
    order = np.argsort(-values)[:num_top].tolist()
    token_id = seed % vocab_size
    assert score(values, token_id, num_top) == Score(
        float(values[token_id]), order, [float(values[i]) for i in order]
    )


@pytest.mark.parametrize("bad", [math.nan, -math.inf, -1e9])
@pytest.mark.parametrize("vocab_size", [40, 20_000])
def test_numbers_that_json_lacks(bad: float, vocab_size: int) -> None:
    """They become a log-probability of 0 in effect; the others stay as they are."""
    values = np.full(vocab_size, bad, np.float32)
    found = score(values, 3, 5)
    assert found.logprob == -9999.0
    assert found.top_logprobs == [-9999.0] * 5
    assert len(set(found.top_ids)) == 5
    values[7] = -0.5
    assert score(values, 7, 0) == Score(-0.5, [], [])
