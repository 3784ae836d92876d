"""Prompts that prefill together as on CUDA, computed on a CPU: each sequence generates the tokens that it generates alone."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest

from tests.model.mlx.random_models import VOCABULARY, batch_of, generate_alone, make_model, sequence_of
from worker.mlx.backends.prompt_attention import PromptAttention
from worker.mlx.batch import Batch
from worker.mlx.caches import kinds as kv
from worker.mlx.decoding.decode_batch import BatchSequence
from worker.mlx.prefill.prompts import PromptBatches, grouped

NUM_TOKENS = 6
LENGTHS = (9, 70, 300, 33, 2, 129)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "lfm2"])
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def prompts(seed: int = 1) -> list[list[int]]:
    """Random prompts without common prefixes."""
    chance = random.Random(seed)  # noqa: S311 (the same each time)
    return [[chance.randrange(VOCABULARY) for _ in range(length)] for length in LENGTHS]


def cuda_batch(model: Any, attention: PromptAttention, step_tokens: int) -> Batch:
    """A batch that prefills as on CUDA, with a budget of so many tokens from the start."""
    batch = batch_of(model, 8)
    batch._budget.set_max_tokens(step_tokens)
    batch._budget.num_tokens = batch._budget.piece_tokens = step_tokens
    batch._prompts = PromptBatches(model, attention)
    return batch


def generate(batch: Batch, sequences: list[BatchSequence], per_step: int) -> None:
    """Insert so many sequences before each step, and generate all."""
    left = list(sequences)
    while left or len(batch):
        for sequence in left[:per_step]:
            batch.insert(sequence)
        left = left[per_step:]
        batch.step()


@pytest.mark.parametrize("per_step", [1, 8])
@pytest.mark.parametrize("step_tokens", [64, 1024])
@pytest.mark.parametrize("small", [0, 2**12, 2**40])
def test_first_and_second_turns(model: Any, small: int, step_tokens: int, per_step: int) -> None:
    """Prompts, and their continuations after cached prefixes: in one step or one by one, complete or in pieces, padded or not."""
    firsts = [sequence_of(number, prompt, NUM_TOKENS) for number, prompt in enumerate(prompts())]
    batch = cuda_batch(model, PromptAttention(2**14, small), step_tokens)
    generate(batch, firsts, per_step)
    seconds = []
    for number, (first, prompt) in enumerate(zip(firsts, prompts(), strict=True)):
        assert first.token_ids == prompt + generate_alone(model, prompt, NUM_TOKENS)
        second = sequence_of(number, [*first.token_ids, *prompts(2)[number][:40]], NUM_TOKENS)
        if number:  # the last one's prompt is complete in its caches, but for one token
            second.num_cached = len(second.token_ids) - 1 if number == len(LENGTHS) - 1 else len(prompt)
            second.caches = prefilled(model, second.token_ids[: second.num_cached])
        seconds.append(second)
    expected = [each.token_ids + generate_alone(model, each.token_ids, NUM_TOKENS) for each in seconds]
    generate(batch, seconds, per_step)
    assert [each.token_ids for each in seconds] == expected


def prefilled(model: Any, token_ids: list[int]) -> kv.Caches:
    """A sequence's own caches with these tokens."""
    caches = kv.new(model)
    model(mx.array([token_ids]), cache=caches)
    mx.eval([cache.state for cache in caches])
    return caches


def test_removed_while_prefilling() -> None:
    """Sequences that leave in the middle of their prompts do not change the others."""
    model = make_model("llama")
    all_prompts = prompts()
    sequences = [sequence_of(number, list(prompt), NUM_TOKENS) for number, prompt in enumerate(all_prompts)]
    batch = cuda_batch(model, PromptAttention(2**14, 0), 64)
    for sequence in sequences:
        batch.insert(sequence)
    batch.step()
    assert sequences[1] in batch.prefilling
    batch.remove(sequences[1])
    batch.step()
    batch.remove(sequences[2])
    assert not any(each in batch.prefilling for each in sequences[1:3])
    while len(batch):
        batch.step()
    for number in (0, 3, 4, 5):
        expected = all_prompts[number] + generate_alone(model, all_prompts[number], NUM_TOKENS)
        assert sequences[number].token_ids == expected


def test_groups() -> None:
    """On CUDA, prompts without a prefix, those with little left after one, and each other one; elsewhere all of them together."""
    attention = PromptAttention(2**30, max_small_scores=32 * 100 * 1000)
    made = [sequence_of(number, [1] * length, 1) for number, length in enumerate([5, 3000, 500, 900, 1000])]
    for sequence, num_cached in zip(made, [0, 1000, 490, 880, 500], strict=True):
        sequence.num_cached = num_cached
    fresh, long, *short, other = made
    assert grouped(made, attention) == [[fresh], short, [long], [other]]
    assert grouped(made, None) == [made]
    assert grouped([], attention) == grouped([], None) == []


def test_second_turns_are_one_step_without_padding() -> None:
    """Those that arrive together are prefilled together, in as many tokens as the longest has left."""
    model = make_model("llama")
    sequences = []
    for number, prompt in enumerate(prompts()):
        sequence = sequence_of(number, prompt, NUM_TOKENS)
        sequence.num_cached = max(0, len(prompt) - 3 - number)
        if sequence.num_cached:
            sequence.caches = prefilled(model, prompt[: sequence.num_cached])
        sequences.append(sequence)
    batches = PromptBatches(model, PromptAttention(2**30))
    cached = [each for each in sequences if each.num_cached > 10]
    batches.join(cached, 100)
    assert {each.num_left for each in cached} == {7}
    assert batches.prefill(100) == 7 * len(cached)
    ((taken, caches),) = batches.take_prefilled()
    assert taken == cached
    assert caches[0].starts == [300 - len(each.token_ids) for each in cached]
    assert not batches.sequences


@pytest.mark.parametrize("attention", [None, PromptAttention(2**30)], ids=["elsewhere", "CUDA"])
def test_a_second_turn_does_not_wait_for_the_pieces_of_another(attention: PromptAttention | None) -> None:
    """Prefixes are not cut if the longest one takes several steps: on a slow CPU the others would wait for seconds."""
    model = make_model("llama")
    sequences = []
    for number, num_left in enumerate([200, 3]):
        sequence = sequence_of(number, prompts(number)[2], NUM_TOKENS)
        sequence.num_cached = 300 - 1 - num_left
        sequence.caches = prefilled(model, sequence.token_ids[: sequence.num_cached])
        sequences.append(sequence)
    batches = PromptBatches(model, attention)
    batches.join(sequences, 32)
    batches.prefill(32)
    assert [taken for taken, _ in batches.take_prefilled()] == [[sequences[1]]]


def test_limits_follow_the_share() -> None:
    """When the memory of a worker on CUDA changes, so do the memory for scores, the freed memory that is kept, and the steps."""
    batch = batch_of(make_model("llama"), 8)
    batch._prompt_attention = PromptAttention(2**20)
    num_alone = batch._prompt_attention._max_part_scores
    batch.set_limits(16, 2**30, 2**19)
    assert batch._prompt_attention._max_part_scores == num_alone // 2
    assert batch._prompts.limit_bytes == 2**30 - 2**19
    assert batch._budget.num_tokens == 16
