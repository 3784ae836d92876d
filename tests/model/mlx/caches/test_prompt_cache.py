"""Keys and values of prompts that prefill together: the same as in mlx-lm's own caches, without reading from the device."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from worker.mlx.caches.prompt_cache import PromptKVCache

HEADS, SIZE, VALUE_SIZE = 2, 3, 5


def array(rows: list[list[float]], size: int = SIZE) -> mx.array:
    """(rows, heads, columns, size) with these numbers in the columns."""
    columns = mx.array(rows)[:, None, :, None]
    return mx.broadcast_to(columns, (len(rows), HEADS, len(rows[0]), size))


def cache_of(history: list[float]) -> KVCache:
    """A sequence's own cache."""
    cache = KVCache()
    if history:
        cache.update_and_fetch(array([history]), array([history], VALUE_SIZE))
    return cache


class Prompts:
    """A cache, and what each sequence's keys must be."""

    def __init__(self, seed: int, num_columns: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 (the same each time)
        self.num_columns = num_columns
        self.cache = PromptKVCache([])
        self.histories: list[list[float]] = []
        self.kept: list[tuple[KVCache, list[float]]] = []
        self._next = 0.0

    def join(self) -> None:
        """Add up to three sequences, each with some tokens or none."""
        histories = [
            self._numbers(self.chance.choice([0, 0, 1, 4, 7])) for _ in range(self.chance.randint(1, 3))
        ]
        own = [cache_of(history) for history in histories]
        self.kept += zip(own, [list(history) for history in histories], strict=True)
        merged = PromptKVCache.merge(own)
        if self.histories:
            self.cache.extend(merged)
        else:
            self.cache = merged
        self.cache.num_columns = self.num_columns
        self.histories += histories

    def prefill(self) -> None:
        """Write one to four tokens of each sequence, with padding at the end."""
        new = [self._numbers(self.chance.randint(1, 4)) for _ in self.histories]
        longest = max(map(len, new))
        padding = [longest - len(each) for each in new]
        if any(padding):
            self.cache.prepare(lengths=[len(each) for each in new], right_padding=padding)
        rows = [each + [-1.0] * rest for each, rest in zip(new, padding, strict=True)]
        keys, values = self.cache.update_and_fetch(array(rows), array(rows, VALUE_SIZE))
        assert keys.shape[2] == values.shape[2] == self.cache.size()
        if any(padding):
            self.cache.finalize()
        for history, each in zip(self.histories, new, strict=True):
            history.extend(each)

    def leave(self) -> None:
        """Remove some sequences, and change the order of the others."""
        order = list(range(len(self.histories)))
        self.chance.shuffle(order)
        order = order[: self.chance.randint(1, len(order))]
        self.cache.filter(order)
        self.histories = [self.histories[index] for index in order]

    def check(self) -> None:
        """Check keys, values and the attributes that models and slots use; the sequences' first caches have not changed."""
        longest = max(map(len, self.histories))
        lengths = [len(history) for history in self.histories]
        assert self.cache.size() == longest
        assert mx.array_equal(
            mx.array(self.cache.offset) + mx.zeros(len(lengths), mx.int32), mx.array(lengths)
        )
        assert self.cache.left_padding.tolist() == [longest - length for length in lengths]
        for index, history in enumerate(self.histories):
            own = self.cache.extract(index)
            assert own.offset == len(history)
            if self.cache.keys is not None:
                assert own.keys[0, 0, :, 0].tolist() == history
                assert own.values[0, -1, :, -1].tolist() == history
        for cache, tokens in self.kept:
            assert cache.offset == len(tokens)
            assert not tokens or cache.keys_and_values()[0][0, 0, :, 0].tolist() == tokens

    def _numbers(self, count: int) -> list[float]:
        numbers = [self._next + 1 + i for i in range(count)]
        self._next += count
        return numbers


@pytest.mark.parametrize("num_columns", [0, 64])
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_changes(seed: int, num_columns: int) -> None:
    """Sequences with and without cached tokens join, prefill with padding and leave; with room for all columns and without."""
    prompts = Prompts(seed, num_columns)
    prompts.join()
    for _ in range(12):
        prompts.chance.choice([prompts.join, prompts.prefill, prompts.prefill, prompts.leave])()
        prompts.check()


@pytest.mark.parametrize("lengths", [[0], [3], [0, 0], [4, 4], [5, 2], [0, 3]])
@pytest.mark.parametrize("window", [None, 4])
def test_masks(lengths: list[int], window: int | None) -> None:
    """Without padding there is no array, unless the model asks for one or has a window; otherwise the mask is mlx-lm's."""
    histories = [[1.0] * length for length in lengths]
    made = PromptKVCache.merge([cache_of(history) for history in histories])
    padding = [max(lengths) - length for length in lengths]
    mlx_lm = BatchKVCache(padding)
    mlx_lm._idx = max(lengths)
    is_even = len(set(lengths)) == 1
    for num_queries in (1, 3):
        mask: Any = made.make_mask(num_queries, window_size=window)
        if is_even and window is None:
            assert mask == (None if num_queries == 1 else "causal")
            mask = made.make_mask(num_queries, return_array=True)
        expected = mlx_lm.make_mask(num_queries, window_size=window)
        assert mx.array_equal(*mx.broadcast_arrays(mask, expected))


def test_a_single_prefix_is_not_copied() -> None:
    """Its arrays are shared until the next tokens are written."""
    own = cache_of([1.0, 2.0, 3.0])
    own.trim(1)
    merged = PromptKVCache.merge([own])
    mx.eval(merged.keys, own.keys)
    assert merged.keys.tolist() == own.keys[:, :, :2].tolist()
    merged.update_and_fetch(array([[9.0]]), array([[9.0]], VALUE_SIZE))
    assert own.keys[0, 0, :3, 0].tolist() == [1.0, 2.0, 3.0]
    assert merged.keys[0, 0, :3, 0].tolist() == [1.0, 2.0, 9.0]


def test_padding_of_a_single_prompt() -> None:
    """It is cut off, and nothing moves; slots get no columns that they have not chosen themselves."""
    made = PromptKVCache([0])
    made.prepare(lengths=[3], right_padding=[2])
    made.update_and_fetch(
        array([[1.0, 2.0, 3.0, -1.0, -1.0]]), array([[1.0, 2.0, 3.0, -1.0, -1.0]], VALUE_SIZE)
    )
    made.finalize()
    assert made.keys[0, 0, :, 0].tolist() == [1.0, 2.0, 3.0]
    assert (made.starts, made.offset, made.values.shape[2]) == ([0], 3, 3)
