"""Sequences that join and leave a batch, of small random models with all kinds of caches: each generates the tokens that it generates alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from common.protocol import SamplingParams
from tests.model.mlx.random_models import (
    MODELS,
    VOCABULARY,
    batch_of,
    generate_alone,
    make_model,
    prompt,
    sequence_of,
)
from worker.mlx.batch import Batch, make_sampler
from worker.mlx.caches.kinds import CacheOffer
from worker.mlx.caches.kv_slots import SlotKVCache
from worker.mlx.decoding.decode_batch import BatchSequence
from worker.sampling.sequence_sampler import SequenceSampler

# Number of prompt tokens, number of tokens to generate, and the step before which the sequence is inserted.
SEQUENCES = [(9, 30, 0), (4, 12, 0), (1, 6, 2), (25, 9, 3), (3, 20, 8), (40, 5, 8), (1, 3, 9), (7, 7, 20)]


def own_prompt(number: int) -> list[int]:
    """The prompt of one of `SEQUENCES`."""
    return prompt(number, SEQUENCES[number][0])


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


STEPS = pytest.mark.parametrize(
    "step", [{}, {"on_device": True}, {"is_compiled": True}], ids=["CPU", "GPU", "CUDA"]
)


@STEPS
@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_sequences_of_a_model(model: Any, penalty: float, step: dict[str, bool]) -> None:
    """Short and long prompts, one token among them; one sequence is removed while it decodes, another before its first token.

    The second one may have a repetition penalty. The tokens are computed as on a CPU, on a GPU, and in compiled steps.
    """
    batch = batch_of(model, 8, **step)
    found: dict[int, list[int]] = {}
    inserted: dict[int, BatchSequence] = {}
    removed = {4: 5, 3: 0}  # after so many tokens
    num_steps = 0
    while len(inserted) < len(SEQUENCES) or len(batch):
        for number, (_, num_tokens, first_step) in enumerate(SEQUENCES):
            if first_step == num_steps:
                factor = penalty if number == 1 else 0.0
                inserted[number] = sequence_of(number, own_prompt(number), num_tokens, factor)
                batch.insert(inserted[number])
                found[number] = []
        for token in batch.step():
            found[int(token.job_id)].append(token.token_id)
        for number, num_tokens in removed.items():
            sequence = inserted.get(number)
            is_decoding = sequence in batch.decoding.sequences
            if sequence is not None and is_decoding and len(found[number]) == num_tokens:
                batch.remove(sequence)
        num_steps += 1
    for number, tokens in found.items():
        num_tokens = removed.get(number, SEQUENCES[number][1])
        assert len(tokens) == num_tokens
        factor = penalty if number == 1 else 0.0
        assert tokens == generate_alone(model, own_prompt(number), SEQUENCES[number][1], factor)[:num_tokens]
        assert inserted[number].token_ids == own_prompt(number) + tokens
    assert len({tuple(tokens) for tokens in found.values()}) == len(SEQUENCES)


@pytest.mark.parametrize("num_steps", range(5))
def test_removal_at_any_time(model: Any, num_steps: int) -> None:
    """A sequence that waits, prefills in pieces or decodes can be removed; a second removal is fine, others are not affected."""
    batch = batch_of(model, 4)
    lengths = (9, 150, 30, 5)
    sequences = [sequence_of(number, prompt(number, length), 8) for number, length in enumerate(lengths)]
    found: list[int] = []
    for number, sequence in enumerate(sequences):
        batch.insert(sequence)
        found += [token.token_id for token in batch.step() if token.job_id == "0"]
        if number == 0:
            continue
        for _ in range(num_steps if number == 1 else 0):
            found += [token.token_id for token in batch.step() if token.job_id == "0"]
        batch.remove(sequence)
        batch.remove(sequence)
        assert len(batch) <= 1
    while len(batch):
        found += [token.token_id for token in batch.step()]
    assert found == generate_alone(model, prompt(0, 9), 8)


@STEPS
def test_many_leave_at_once(model: Any, step: dict[str, bool]) -> None:
    """Every second sequence leaves: more than are copied one by one."""
    batch = batch_of(model, 32, **step)
    lengths = [4 if number % 2 == 0 and number < 24 else 9 for number in range(32)]
    for number, length in enumerate(lengths):
        batch.insert(sequence_of(number, prompt(number, 3 + number % 5), length))
    found: dict[str, list[int]] = {str(number): [] for number in range(32)}
    while len(batch):
        for token in batch.step():
            found[token.job_id].append(token.token_id)
    for number, length in enumerate(lengths):
        assert found[str(number)] == generate_alone(model, prompt(number, 3 + number % 5), length)


def test_which_layers_have_slots(model: Any) -> None:
    """Those that keep every token; the others have mlx-lm's caches."""
    batch = batch_of(model, 8)
    for number in (0, 1):
        batch.insert(sequence_of(number, own_prompt(number), 5))
    while not batch.step():
        pass
    has_slots = [isinstance(cache, SlotKVCache) for cache in batch.decoding.caches]
    assert has_slots == [isinstance(cache, KVCache) for cache in make_prompt_cache(model)]
    assert any(has_slots)
    assert batch.cache_bytes > 0


def test_offered_caches(model: Any) -> None:
    """A prompt's when it is prefilled and a sequence's when it is finished, extracted from the batch: generation from them continues as the batch did."""
    offered: dict[int, list[tuple[list[int], Any]]] = {}

    def offer(offers: Sequence[CacheOffer]) -> None:
        for token_ids, extract in offers:
            caches = extract()
            mx.eval([cache.state for cache in caches])
            offered.setdefault(token_ids[0], []).append((token_ids, caches))

    batch = Batch(
        model,
        eos_token_ids=[],
        max_sequences=4,
        step_tokens=64,
        sampler=make_sampler(VOCABULARY, on_device=False),
        on_cpu=True,
        offer_caches=offer,
    )
    inserted = {number: sequence_of(number, own_prompt(number), 6) for number in (0, 1, 3)}
    for sequence in inserted.values():
        batch.insert(sequence)
    while len(batch):
        batch.step()
    for number, sequence in inserted.items():
        (prefix, caches), (all_ids, _) = offered[own_prompt(number)[0]]
        assert all_ids == sequence.token_ids
        assert prefix in (own_prompt(number)[:-1], own_prompt(number))
        rest = sequence_of(
            9, own_prompt(number) + ([] if len(prefix) < SEQUENCES[number][0] else all_ids[-6:-5]), 5
        )
        rest.caches, rest.num_cached = caches, len(prefix)
        batch.insert(rest)
        while len(batch):
            batch.step()
        assert rest.token_ids == all_ids[: len(rest.token_ids)]


def test_penalties_of_a_model(model: Any) -> None:
    """Sequences with frequency and presence penalties and draws, which join one by one and leave: the same tokens as with NumPy."""
    samplings = [
        SamplingParams(temperature=0, frequency_penalty=4.0, presence_penalty=2.0),
        SamplingParams(temperature=0),
        SamplingParams(temperature=2.0, seed=3, presence_penalty=6.0),
    ]
    found: list[dict[str, list[int]]] = []
    for on_device in (False, True):
        batch = batch_of(model, 8, on_device=on_device)
        tokens: dict[str, list[int]] = {}
        for number in range(9):
            sampler = SequenceSampler(samplings[number % 3], num_top_logprobs=1 if number % 2 else None)
            batch.insert(BatchSequence(str(number), own_prompt(number % 8), 5 + 3 * (number % 4), sampler))
            for token in batch.step() + batch.step():
                tokens.setdefault(token.job_id, []).append(token.token_id)
                assert (token.score is None) == (int(token.job_id) % 2 == 0)
        while len(batch):
            for token in batch.step():
                tokens.setdefault(token.job_id, []).append(token.token_id)
        found.append(tokens)
    assert found[0] == found[1]
    assert [len(found[0][str(number)]) for number in range(9)] == [5 + 3 * (n % 4) for n in range(9)]
    assert len(set(found[0]["0"])) > len(found[0]["0"]) // 2


def test_a_dropped_batch_is_freed_at_once() -> None:
    """The engine drops a batch whose step failed, often for lack of memory. The collector never frees the first one: it is frozen."""
    batch = batch_of(make_model("llama"), 8)
    sequence = sequence_of(0, prompt(0, 9), 40)
    batch.insert(sequence)
    while not batch.decoding.sequences:
        batch.step()
    keys = weakref.ref(batch.decoding.caches[0])
    gc.disable()
    try:
        del batch
        assert keys() is None
    finally:
        gc.enable()
