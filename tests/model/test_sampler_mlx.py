"""MLX and NumPy sample the same tokens: a GPU samples where the log-probabilities are."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from common.protocol import SamplingParams
from worker.sampling.sampler import BatchSampler
from worker.sampling.sequence_sampler import SequenceSampler

VOCAB = 3001
KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.2, top_k=7, min_p=0.01),
    SamplingParams(temperature=1.0, top_p=0.0),
    SamplingParams(temperature=0.8, top_k=1),
    SamplingParams(temperature=1.0, top_k=10**12),
    SamplingParams(temperature=1.0, xtc_probability=0.7, xtc_threshold=0.02),
    SamplingParams(temperature=0, logit_bias={3: 50.0, 5: -100.0}),
    SamplingParams(temperature=1.0, frequency_penalty=1.0, presence_penalty=-0.5),
]


class Thirds:
    """A matcher that allows every third token."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def advance(self, token_id: int) -> None:
        assert token_id % 3 == 0
        self.seen.append(token_id)

    is_open = False

    def fill(self, words: Any) -> None:
        bits = np.zeros(32 * len(words), dtype=np.uint8)
        bits[:VOCAB:3] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.uint32)


def rows() -> list[SequenceSampler]:
    made = [
        SequenceSampler(msgspec.structs.replace(kind, seed=i), wants_logprobs=i % 2 == 0)
        for i, kind in enumerate(KINDS)
    ]
    held = [SequenceSampler(kind, matcher=Thirds(), wants_logprobs=True) for kind in KINDS[:4]]
    return [*made, *held]


@pytest.mark.parametrize("only", [None, "drawn", "adjusted", "filtered"])
def test_mlx_samples_as_numpy_does(only: str | None) -> None:
    """Over many steps, for any mixture of sequences: the same tokens, and the same adjusted log-probabilities."""
    import mlx.core as mx

    def chosen() -> list[SequenceSampler]:
        return [
            row
            for row in rows()
            if only is None
            or (only == "drawn" and not row.is_greedy)
            or (only == "adjusted" and row.has_adjustments)
            or (only == "filtered" and row.is_filtered)
        ]

    ours, theirs = chosen(), chosen()
    on_host = BatchSampler(np, async_eval=lambda _array: None, xtc_special_token_ids=(1, 2))
    on_device = BatchSampler(mx, async_eval=mx.async_eval, xtc_special_token_ids=(1, 2))
    random = np.random.default_rng(5)
    num_same = num_all = 0
    for _ in range(25):
        logits = random.normal(0, 3, (len(ours), VOCAB)).astype(np.float32)
        logprobs = mx.array(logits) - mx.logsumexp(mx.array(logits), axis=-1, keepdims=True)
        mine = on_host.sample(ours, np.array(logprobs))
        other = on_device.sample(theirs, logprobs)
        assert mine is not None
        assert other is not None
        same = np.array(other) == mine
        num_same, num_all = num_same + int(same.sum()), num_all + len(same)
        for row, twin in zip(ours, theirs, strict=True):
            assert len(row.logprobs) == len(twin.logprobs)
            while row.logprobs:
                np.testing.assert_allclose(
                    np.array(twin.logprobs.popleft()), row.logprobs.popleft(), rtol=1e-4, atol=1e-3
                )
    # A draw on the border between two tokens may be rounded to either.
    assert num_same >= num_all - 2
    assert all(row.error is None for row in [*ours, *theirs])
