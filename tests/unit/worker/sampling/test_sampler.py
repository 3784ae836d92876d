"""Sampling: each filter against its definition, draws against their probabilities, sequences independent of each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.protocol import SamplingParams
from worker.sampling.arrays import apply_mask
from worker.sampling.sampler import BatchSampler
from worker.sampling.sequence_sampler import SequenceSampler

VOCAB = 40


def sampler(xtc_special_token_ids: tuple[int, ...] = ()) -> BatchSampler:
    return BatchSampler(xtc_special_token_ids=xtc_special_token_ids)


def sample(batch: BatchSampler, rows: list[SequenceSampler], values: Any) -> list[int]:
    """The tokens of one step, which the sequences observe, as in a batch."""
    found, _ = batch.sample(rows, values)
    token_ids = (values.argmax(axis=-1) if found is None else found).tolist()
    for row, token_id in zip(rows, token_ids, strict=True):
        if row.depends_on_history:
            row.observe([token_id])
    return token_ids


def logprobs(seed: int, num_rows: int = 1, spread: float = 2.0, vocab: int = VOCAB) -> Any:
    logits = np.random.default_rng(seed).normal(0, spread, (num_rows, vocab))
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)


def drawn(
    params: SamplingParams, values: Any, num: int, *, xtc_special_token_ids: tuple[int, ...] = ()
) -> list[int]:
    """The tokens that `num` positions of one sequence draw from the same log-probabilities."""
    row, batch = SequenceSampler(params), sampler(xtc_special_token_ids)
    return [sample(batch, [row], values)[0] for _ in range(num)]


def allowed(params: SamplingParams, values: Any) -> set[int]:
    """The tokens that min_p, top_k and top_p keep, directly from their definitions."""
    scaled = values[0].astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    order = [int(i) for i in np.argsort(-scaled, kind="stable")]
    kept = [i for i in order if probs[i] >= params.min_p * probs.max()]
    kept = kept[: params.top_k or None]
    total, mass, nucleus = sum(probs[i] for i in kept), 0.0, []
    for i in kept:
        if nucleus and mass >= params.top_p * total:
            break
        nucleus.append(i)
        mass += probs[i]
    return set(nucleus)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.2, 2.0),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 0.999)),
    top_k=st.integers(0, VOCAB + 5),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
def test_filters_match_their_definitions(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    """No draw is excluded by the filters' definitions, and there always is one."""
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    values = logprobs(seed)
    wanted = allowed(params, values)
    # A border that rounding decides may fall to either side.
    loose = allowed(
        SamplingParams(
            temperature=temperature, top_p=min(1.0, top_p + 1e-4), top_k=top_k, min_p=min_p * (1 - 1e-4)
        ),
        values,
    )
    assert wanted
    assert set(drawn(params, values, 60)) <= wanted | loose


@pytest.mark.parametrize("vocab", [255, 256, 257, 5000])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=4),
        SamplingParams(temperature=1.0, top_p=0.6, seed=4),
        SamplingParams(temperature=2.0, top_p=0.9, seed=4),  # more tokens than are sorted first
        SamplingParams(temperature=1.0, top_p=0.99, min_p=0.001, seed=4),
        SamplingParams(temperature=1.0, top_k=2000, seed=4),
    ],
)
def test_a_large_vocabulary(params: SamplingParams, vocab: int) -> None:
    """Only tokens that the definitions keep are drawn, the likely ones with their probabilities."""
    values, num = logprobs(11, spread=1.5, vocab=vocab), 1500
    kept = sorted(allowed(params, values))
    mass = np.exp(values[0, kept].astype(np.float64) / params.temperature)
    probs = np.zeros(vocab)
    probs[kept] = mass / mass.sum()
    counts = np.bincount(drawn(params, values, num), minlength=vocab)
    assert counts[probs == 0].sum() <= 1  # where rounding decides what is kept
    assert (np.abs(counts - num * probs) < 5 * np.sqrt(num * probs) + 5).all()


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_rounding_does_not_change_draws(temperature: float) -> None:
    """Seeds are reproducible in a batch, where log-probabilities are rounded differently, also at high temperatures."""
    values = logprobs(12, spread=2.5, vocab=30_000)
    noise = np.random.default_rng(13).normal(0, 3e-5, values.shape).astype(np.float32)
    params = SamplingParams(temperature=temperature, seed=6)
    exact, rounded = drawn(params, values, 300), drawn(params, values + noise, 300)
    assert len(set(exact)) > 100
    assert sum(one != other for one, other in zip(exact, rounded, strict=True)) <= 1


def test_adjacent_seeds_and_positions_are_independent() -> None:
    """Draws of two sequences or positions agree as often as by chance."""
    values, num = np.zeros((1, VOCAB), dtype=np.float32), 4000
    one = drawn(SamplingParams(temperature=1.0, seed=1), values, num + 1)
    other = drawn(SamplingParams(temperature=1.0, seed=2), values, num)
    for agreeing in (np.equal(one[:num], other), np.equal(one[1:], one[:num])):
        assert abs(agreeing.sum() - num / VOCAB) < 5 * math.sqrt(num / VOCAB)


def test_all_kept_tokens_are_drawn() -> None:
    """Each token that the definitions keep is drawn eventually."""
    params = SamplingParams(temperature=2.0, top_p=0.9, top_k=12, seed=5)
    values = logprobs(3, spread=0.3)
    assert set(drawn(params, values, 2000)) == allowed(params, values)


def test_draws_have_their_probabilities() -> None:
    """Frequencies are the probabilities at the temperature, within four standard deviations; a seed fixes the draws."""
    values, num = logprobs(1, spread=1.0), 8000
    probs = np.exp(values[0] / 1.3)
    probs /= probs.sum()
    counts = np.bincount(drawn(SamplingParams(temperature=1.3, seed=9), values, num), minlength=VOCAB)
    assert (np.abs(counts - num * probs) < 4 * np.sqrt(num * probs) + 4).all()


def test_xtc() -> None:
    """Probability 1: only the least likely token above the threshold, and all below it. Probability 0: all. Special tokens stay."""
    probs = np.array([[0.4, 0.3, 0.2, 0.06, 0.04]])
    values = np.log(probs).astype(np.float32)
    always = SamplingParams(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.1, seed=1)
    assert set(drawn(always, values, 300)) == {2, 3, 4}
    assert set(drawn(always, values, 300, xtc_special_token_ids=(0, 99))) == {0, 2, 3, 4}
    half = SamplingParams(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.1, seed=1)
    counts = np.bincount(drawn(half, values, 4000), minlength=5) / 4000
    # Half of the time with the model's probabilities; else 2, 3 and 4 share all of it.
    expected = 0.5 * probs[0] + 0.5 * np.array([0, 0, 0.2, 0.06, 0.04]) / 0.3
    assert np.abs(counts - expected).max() < 0.03
    one_above = SamplingParams(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.35, seed=1)
    assert set(drawn(one_above, values, 300)) == {0, 1, 2, 3, 4}


def test_penalties_and_bias() -> None:
    """As in OpenAI's API, for sampled tokens only: presence once, frequency times the count, plus the bias; greedy sampling uses them too."""
    row = SequenceSampler(
        SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1.0}),
        num_top_logprobs=0,
    )
    row.observe([1, 1, 3])
    added: dict[int, float] = {}
    for ids, amounts in row.sparse_adjustments():
        for token_id, amount in zip(ids.tolist(), amounts.tolist(), strict=True):
            added[token_id] = added.get(token_id, 0.0) + amount
    assert added == {1: -1.0, 3: 0.25}
    values = np.log(np.array([[0.1, 0.5, 0.2, 0.2]])).astype(np.float32)
    token_ids, reported = sampler().sample([row], values)
    adjusted = np.log([0.1, 0.5, 0.2, 0.2]) + np.array([0, -1.0, 0, 0.25])
    assert token_ids is not None
    assert int(token_ids[0]) == int(adjusted.argmax())
    expected = adjusted - math.log(np.exp(adjusted).sum())
    assert reported[0] == pytest.approx(expected, abs=1e-5)


class Evens:
    """A matcher that allows even token ids and records what it receives."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def advance(self, token_id: int) -> None:
        assert token_id % 2 == 0
        self.seen.append(token_id)

    is_open = False

    def fill(self, words: Any) -> None:
        words[:] = 0x55555555


def test_grammars() -> None:
    """Only tokens that the matcher allows are drawn."""
    matcher = Evens()
    row = SequenceSampler(SamplingParams(temperature=1.5, seed=2), matcher=matcher)
    batch, tokens = sampler(), []
    for position in range(50):
        assert matcher.seen == tokens
        tokens += sample(batch, [row], logprobs(position))
    assert len(set(tokens)) > 10
    assert row.error is None


class Broken:
    def advance(self, token_id: int) -> None:
        raise ValueError("no")

    is_open = False

    def fill(self, words: Any) -> None:
        words[:] = 0xFFFFFFFF


def test_a_matcher_that_raises_fails_its_sequence_alone() -> None:
    """Its sampler keeps the error; the other sequences draw what they would draw alone."""
    rows = [
        SequenceSampler(SamplingParams(seed=1), matcher=Broken()),
        SequenceSampler(SamplingParams(seed=2)),
    ]
    alone = SequenceSampler(SamplingParams(seed=2))
    batch = sampler()
    for position in range(3):
        values = logprobs(position, 2)
        assert sample(batch, rows, values)[1:] == sample(sampler(), [alone], values[1:])
    assert isinstance(rows[0].error, ValueError)
    assert rows[1].error is None


KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.2, top_k=5, min_p=0.05),
    SamplingParams(temperature=1.0, xtc_probability=0.6, xtc_threshold=0.1),
    SamplingParams(temperature=0, logit_bias={3: 5.0}),
    SamplingParams(temperature=1.0, frequency_penalty=1.0),
]


@given(kinds=st.lists(st.sampled_from(range(len(KINDS))), min_size=1, max_size=8), seed=st.integers(0, 2**63))
def test_sequences_are_independent(kinds: list[int], seed: int) -> None:
    """Each sequence draws exactly what it draws alone, whatever else is in the batch."""
    batch = sampler()
    rows = [SequenceSampler(_seeded(kind, seed + i)) for i, kind in enumerate(kinds)]
    singles = [(SequenceSampler(_seeded(kind, seed + i)), sampler()) for i, kind in enumerate(kinds)]
    for step in range(4):
        values = logprobs(step, len(kinds))
        together = sample(batch, rows, values)
        for i, (row, single) in enumerate(singles):
            assert sample(single, [row], values[i : i + 1]) == [together[i]]


def _seeded(kind: int, seed: int) -> SamplingParams:
    import msgspec

    return msgspec.structs.replace(KINDS[kind], seed=seed)


def test_apply_mask() -> None:
    """Values stay as they are if their bit is set; otherwise they become too small to be chosen, row by row."""
    words = np.array([[0b101, 1 << 31], [0, 0xFFFFFFFF]], np.uint32)
    values = np.arange(2 * 40, dtype=np.float32).reshape(2, 40)
    masked = apply_mask(words, values)
    assert np.flatnonzero(masked[0] >= 0).tolist() == [0, 2]
    assert np.flatnonzero(masked[1] >= 0).tolist() == [*range(32, 40)]
    assert (masked[1, 32:] == values[1, 32:]).all()
    assert masked[0, 1] < -1e8
    assert masked.dtype == np.float32


EOS = (3, 35)


def eos_sampler() -> BatchSampler:
    return BatchSampler(eos_token_ids=EOS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_bans_the_end(temperature: float) -> None:
    """Until there are so many tokens, the ends of text are not chosen, however likely; then they are."""
    values = np.full((1, VOCAB), -20.0, np.float32)
    values[0, list(EOS)] = (-0.1, -3.0)
    row, batch = SequenceSampler(SamplingParams(temperature=temperature, min_tokens=3, seed=5)), eos_sampler()
    tokens = [sample(batch, [row], values)[0] for _ in range(3)]
    assert not set(tokens) & set(EOS)
    last = sample(batch, [row], values)
    assert last[0] in EOS
    continued = SequenceSampler(SamplingParams(temperature=temperature, min_tokens=3, seed=5), num_sampled=3)
    assert sample(eos_sampler(), [continued], values) == last


def test_min_tokens_leaves_other_sequences_alone() -> None:
    """Only the row that asks for it is changed, and only its reported log-probabilities."""
    values = np.full((2, VOCAB), -20.0, np.float32)
    values[:, EOS[0]] = 0.0
    values[:, 7] = -1.0
    asking = SequenceSampler(SamplingParams(temperature=0, min_tokens=1), num_top_logprobs=0)
    other = SequenceSampler(SamplingParams(temperature=0), num_top_logprobs=0)
    token_ids, reported = eos_sampler().sample([asking, other], values)
    assert token_ids is not None
    assert token_ids.tolist() == [7, EOS[0]]
    assert list(reported) == [0]
    assert reported[0][7] == pytest.approx(0.0, abs=1e-3)


def test_min_tokens_with_a_grammar() -> None:
    """The end is banned while the grammar allows anything else; where it allows nothing else, the end comes."""

    class EndOnly(Evens):
        def fill(self, words: Any) -> None:
            words[:] = 0
            words[EOS[0] // 32] = np.uint32(1 << EOS[0])

    class EndToo(Evens):
        def fill(self, words: Any) -> None:
            words[:] = 0
            words[0] = np.uint32(1 << EOS[0] | 1 << 8)

    values = np.full((1, VOCAB), -20.0, np.float32)
    values[0, EOS[0]] = 0.0
    params = SamplingParams(temperature=0, min_tokens=5)
    chosen = [
        sample(eos_sampler(), [SequenceSampler(params, matcher=matcher)], values)[0]
        for matcher in (EndOnly(), EndToo())
    ]
    assert chosen == [EOS[0], 8]


def test_an_open_matcher_costs_no_mask() -> None:
    """While any token may come, neither mask nor copy is made; it still receives every token."""

    class Open(Evens):
        is_open = True

        def __init__(self) -> None:
            self.seen: list[int] = []

        def fill(self, words: Any) -> None:
            raise AssertionError

        def advance(self, token_id: int) -> None:
            self.seen.append(token_id)

    matcher = Open()
    row, batch = SequenceSampler(SamplingParams(temperature=0), matcher=matcher), sampler()
    for seed in range(3):
        sample(batch, [row], logprobs(seed))
    assert len(matcher.seen) == 3


def test_min_tokens_bans_stop_tokens_too() -> None:
    """As in vLLM; after them, a stop token may come."""
    values = np.full((1, VOCAB), -20.0, np.float32)
    values[0, 7], values[0, 9] = -0.1, -3.0
    row = SequenceSampler(
        SamplingParams(temperature=0, min_tokens=1, stop_token_ids=[7], logit_bias={11: 0.0})
    )
    batch = eos_sampler()
    assert [sample(batch, [row], values)[0] for _ in range(2)] == [9, 7]


def test_a_grammar_with_stop_tokens() -> None:
    """They are banned from its mask until there are enough tokens."""

    class Two(Evens):
        def fill(self, words: Any) -> None:
            words[:] = 0
            words[0] = np.uint32(1 << 6 | 1 << 8)

    values = np.full((1, VOCAB), -20.0, np.float32)
    values[0, 6] = 0.0
    row = SequenceSampler(SamplingParams(temperature=0, min_tokens=1, stop_token_ids=[6]), matcher=Two())
    batch = eos_sampler()
    assert [sample(batch, [row], values)[0] for _ in range(2)] == [8, 6]
