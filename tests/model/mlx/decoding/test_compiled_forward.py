"""Compiled decode steps: which models have them, when they are traced, and what becomes of a model that has none.

That sequences generate the same tokens in compiled steps is tested in `test_batch_of_models.py`.
"""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import pytest

from tests.model.mlx.backends.wrong_attention import WrongAttention
from tests.model.mlx.random_models import (
    batch_of,
    generate_alone,
    make_model,
    prompt,
    sequence_of,
)
from worker.mlx.backends.append_attention import FunctionalAppendAttention
from worker.mlx.batch import Batch
from worker.mlx.decoding.compiled_forward import CompiledForward
from worker.mlx.memory.cache_memory import EXPECTED_TOKENS, columns


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


def generate(batch: Batch, *lengths: int, num_tokens: int = 8) -> list[list[int]]:
    """The tokens of sequences that begin together, with prompts of these lengths."""
    found: dict[str, list[int]] = {str(number): [] for number in range(len(lengths))}
    for number, length in enumerate(lengths):
        batch.insert(sequence_of(number, prompt(number, length), num_tokens))
    while len(batch):
        for token in batch.step():
            found[token.job_id].append(token.token_id)
    return list(found.values())


def traced_shapes(batch: Batch) -> list[tuple[int, int]]:
    """Numbers of slots and columns for which there are compiled steps."""
    assert batch.decoding.compiled is not None
    return list(batch.decoding.compiled._traces)


def test_a_shape_is_traced_once(llama: Any) -> None:
    """Other sequences in as many slots use the same trace; more columns need another."""
    short, long = columns(1), columns(260)
    batch = batch_of(llama, 4, is_compiled=True)
    generate(batch, 5, 9)
    generate(batch, 20, 3)
    assert traced_shapes(batch) == [(2, short)]
    generate(batch, 5)
    found = generate(batch, 5, num_tokens=260)
    assert traced_shapes(batch) == [(2, short), (1, short), (1, long)]
    assert found == [generate_alone(llama, prompt(0, 5), 260)]


def test_buffers_have_room_for_the_answers(llama: Any) -> None:
    """A step is traced once for a long answer, and again when a sequence outgrows what is expected of an answer."""
    batch = batch_of(llama, 4, is_compiled=True)
    generate(batch, 9, num_tokens=500)
    assert traced_shapes(batch) == [(1, columns(9 + 500))]
    generate(batch, 9, num_tokens=EXPECTED_TOKENS + 300)
    assert traced_shapes(batch) == [(1, columns(9 + 500)), (1, columns(777))]


def test_few_traces_are_kept(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape that was used least recently is dropped, and traced again when it comes back."""
    monkeypatch.setattr("worker.mlx.decoding.compiled_forward._MAX_TRACES", 1)
    batch = batch_of(llama, 4, is_compiled=True)
    expected = generate_alone(llama, prompt(0, 5), 8)
    for lengths in ((5,), (5, 9), (5,)):
        assert generate(batch, *lengths)[0] == expected
        assert len(traced_shapes(batch)) == 1


def test_sequences_leave_slots_empty(llama: Any) -> None:
    """The steps go on with all slots when a sequence has left, and a newcomer takes its slot."""
    batch = batch_of(llama, 4, is_compiled=True)
    sequences = [sequence_of(number, prompt(number, 6 + number), 12) for number in range(3)]
    for sequence in sequences:
        batch.insert(sequence)
    for _ in range(4):
        batch.step()
    batch.remove(sequences[0])
    for _ in range(3):
        batch.step()
    assert traced_shapes(batch) == [(3, columns(1))]
    late = sequence_of(3, prompt(3, 4), 6)
    batch.insert(late)
    while len(batch):
        batch.step()
    for sequence in (*sequences[1:], late):
        length = len(sequence.token_ids) - sequence.num_generated
        answer = sequence.token_ids[length:]
        assert answer == generate_alone(llama, prompt(int(sequence.job_id), length), len(answer))


def test_longer_buffers_may_have_fewer_slots(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences have left without new buffers being made; then the others need more columns than were expected."""
    monkeypatch.setattr("worker.mlx.memory.cache_memory.EXPECTED_TOKENS", 8)
    batch = batch_of(llama, 16, is_compiled=True)
    sequences = [sequence_of(number, prompt(number, 4), 4 if number < 3 else 262) for number in range(8)]
    for sequence in sequences:
        batch.insert(sequence)
    while len(batch):
        batch.step()
    assert traced_shapes(batch) == [(8, columns(1)), (5, columns(262))]
    for number in (3, 7):
        assert sequences[number].token_ids[4:] == generate_alone(llama, prompt(number, 4), 262)


class OwnAttention:
    """A model that attends in its own way, to the same effect: with sinks, changed keys, or a mask of its own."""

    def __init__(self, model: Any, way: str) -> None:
        self._model = model
        self._way = way
        self.layers = model.layers

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        attention = mx.fast.scaled_dot_product_attention

        def changed(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
            if self._way == "sinks":
                options["sinks"] = mx.full((q.shape[1],), -1e4)  # without effect
            elif self._way == "changed keys":
                k = 1.0 * k
            elif options["mask"] is None:
                options["mask"] = mx.ones((1, 1, q.shape[2], k.shape[2]), mx.bool_)
            return attention(q, k, v, **options)

        mx.fast.scaled_dot_product_attention = changed
        try:
            logits: mx.array = self._model(tokens, cache=cache)
        finally:
            mx.fast.scaled_dot_product_attention = attention
        return logits


@pytest.mark.parametrize("way", ["sinks", "changed keys", "a mask"])
def test_a_model_with_its_own_attention(llama: Any, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its steps are not compiled, which is logged once; its tokens are the same."""
    batch = batch_of(OwnAttention(llama, way), 4, is_compiled=True)
    with caplog.at_level(logging.INFO):
        found = generate(batch, 5, 9)
        generate(batch, 5)
    assert batch.decoding.compiled is not None
    assert not batch.decoding.compiled.is_supported
    assert caplog.text.count("decode steps are not compiled") == 1
    assert found == [generate_alone(llama, prompt(number, n), 8) for number, n in enumerate((5, 9))]


def test_models_with_other_caches() -> None:
    """They have layers without slots, so that their steps are not compiled."""
    batch = batch_of(make_model("gemma3_text"), 4, is_compiled=True)
    generate(batch, 5)
    assert not traced_shapes(batch)


def test_the_self_test_while_a_step_is_traced(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    """If it fails, steps are not compiled."""
    batch = batch_of(llama, 4, is_compiled=True)
    batch.decoding.compiled = CompiledForward(llama, WrongAttention(raises=False))
    assert generate(batch, 5, 9) == [
        generate_alone(llama, prompt(number, n), 8) for number, n in enumerate((5, 9))
    ]
    assert not any(batch.decoding.compiled._traces.values())
    assert caplog.text.count("differs by") == 1


class ShortAttention(FunctionalAppendAttention):
    """Supports buffers up to a length."""

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        return super().supports(queries, keys, values) and keys.shape[2] <= columns(1)


def test_a_shape_without_attention(llama: Any) -> None:
    """Long buffers are decoded without it, and short ones are compiled before and after."""
    batch = batch_of(llama, 4, is_compiled=True)
    batch.decoding.compiled = CompiledForward(llama, ShortAttention())
    assert generate(batch, 5, 9, num_tokens=260) == [
        generate_alone(llama, prompt(number, n), 260) for number, n in enumerate((5, 9))
    ]
    assert batch.decoding.compiled.is_supported
    assert batch.decoding.compiled._traces[2, columns(260)] is None
    assert generate(batch, 5, 9)[1] == generate_alone(llama, prompt(1, 9), 8)
    assert batch.decoding.compiled._traces[2, columns(1)] is not None
