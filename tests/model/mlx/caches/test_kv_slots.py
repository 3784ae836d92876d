"""Sequences that join and leave KV slots: each keeps its own keys and values, and no others are copied for it."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from worker.mlx.caches.kv_slots import Move, SlotKVCache, moves_to
from worker.mlx.decoding.decode_batch import fill_gaps

HEADS, SIZE, VALUE_SIZE = 2, 4, 6


class Slots:
    """A cache, and what each sequence's keys must be."""

    def __init__(self, seed: int, max_sequences: int = 8) -> None:
        self.chance = random.Random(seed)  # noqa: S311 (the same each time)
        self.max_sequences = max_sequences
        self.cache: SlotKVCache | None = None
        self.histories: list[list[float]] = []
        self.num_rebuilt = 0
        self._next = 0.0

    def join(self, *lengths: int) -> None:
        """Add sequences that were prefilled together, as mlx-lm does it."""
        histories = [[self._number() for _ in range(length)] for length in lengths]
        prefilled = BatchKVCache.merge([_cache_of(history) for history in histories])
        if self.cache is None:
            self.cache = SlotKVCache(prefilled, self.max_sequences, None)
            rebuild = self.cache._rebuild

            def counted(*arguments: Any, **options: Any) -> None:
                self.num_rebuilt += 1
                rebuild(*arguments, **options)

            self.cache._rebuild = counted  # type: ignore[method-assign]
        else:
            self.cache.extend(prefilled)
        self.cache.update_positions()
        self.histories += histories

    def step(self) -> None:
        """Write one more token of each sequence."""
        assert self.cache is not None
        new = [self._number() for _ in self.histories]
        for history, number in zip(self.histories, new, strict=True):
            history.append(number)
        column = [[number] for number in new]
        self.cache.update_and_fetch(_array(column), _array(column, VALUE_SIZE))

    def leave(self, *indices: int, is_lifted: bool = True) -> None:
        """Remove sequences."""
        assert self.cache is not None
        keep = [index for index in range(len(self.histories)) if index not in indices]
        order = fill_gaps(keep) if is_lifted else keep
        if is_lifted and not self.cache.is_wasteful(order):
            mx.async_eval(self.cache.lift(moves_to(order)))
        self.cache.filter(order)
        self.cache.update_positions()
        self.histories = [self.histories[index] for index in order]

    def check(self) -> None:
        """Check keys, values, the attributes that models use, and each sequence's extracted cache."""
        cache = self.cache
        assert cache is not None
        longest = max(map(len, self.histories))
        assert cache._idx == longest
        assert cache.offset.tolist() == [len(history) for history in self.histories]
        assert cache.left_padding.tolist() == [longest - len(history) for history in self.histories]
        padded = [[0.0] * (longest - len(history)) + history for history in self.histories]
        keys, values = cache.keys_and_values()
        assert mx.array_equal(keys, _array(padded))
        assert mx.array_equal(values, _array(padded, VALUE_SIZE))
        for index, history in enumerate(self.histories):
            own = cache.extract(index)
            assert own.offset == len(history)
            assert mx.array_equal(own.keys, _array([history]))
            assert mx.array_equal(own.values, _array([history], VALUE_SIZE))
        mask = cache.make_mask(1)
        if all(len(history) == longest for history in self.histories):
            assert mask is None
        else:
            hidden = [[False] * (longest - len(h)) + [True] * (len(h) + 1) for h in self.histories]
            assert mask[:, 0, 0].tolist() == hidden

    def _number(self) -> float:
        self._next += 1.0
        return self._next


def _array(rows: list[list[float]], size: int = SIZE) -> mx.array:
    """Shape (sequences, HEADS, columns, size), with equal values within a column."""
    return mx.broadcast_to(mx.array(rows)[:, None, :, None], (len(rows), HEADS, len(rows[0]), size))


def _cache_of(history: list[float]) -> KVCache:
    cache: Any = KVCache()
    if history:
        cache.update_and_fetch(_array([history]), _array([history], VALUE_SIZE))
    return cache


@pytest.mark.parametrize("seed", range(12))
def test_sequences_join_and_leave(seed: int) -> None:
    """In any order, short and long ones, one by one and many at once."""
    slots = Slots(seed)
    chance = slots.chance
    slots.join(*(chance.randrange(2, 30) for _ in range(3)))
    for _ in range(60):
        what, num_sequences = chance.random(), len(slots.histories)
        if what < 0.35 and num_sequences < slots.max_sequences:
            most = chance.choice([5, 30, 300])
            slots.join(
                *(
                    chance.randrange(1, most)
                    for _ in range(chance.randint(1, slots.max_sequences - num_sequences))
                )
            )
        elif what < 0.6 and num_sequences > 1:
            gone = chance.sample(range(num_sequences), chance.randint(1, num_sequences - 1))
            slots.leave(*gone, is_lifted=chance.random() < 0.7)
        for _ in range(chance.choice([1, 1, 3, 90])):
            slots.step()
        slots.check()


def test_joining_and_leaving_copies_no_others() -> None:
    """If there is a free slot and a free column, no new buffers are made."""
    slots = Slots(seed=0)
    slots.join(*[20] * 8)
    slots.step()
    slots.num_rebuilt = 0
    for index in (0, 7, 3):
        slots.leave(index)
        slots.check()
        slots.join(9)
        slots.step()
        slots.check()
    assert slots.num_rebuilt == 0


def test_values_of_earlier_sequences_are_not_attended_to() -> None:
    """A sequence takes the slot of a longer one that overflowed, and a longer one joins: the columns before it are zeros.

    Zero times infinity would be NaN.
    """
    slots = Slots(seed=0)
    slots.join(5, 6, 40, 40)
    slots.step()
    assert slots.cache is not None
    slots.cache.keys[2:] = slots.cache.values[2:] = mx.array(mx.inf)
    slots.num_rebuilt = 0
    slots.leave(2, 3)
    for length in (7, 38):
        slots.join(length)
        slots.step()
        slots.check()
    assert slots.num_rebuilt == 0


def test_buffers_shrink() -> None:
    """When a long sequence leaves many columns empty, and many sequences many slots."""
    slots = Slots(seed=0, max_sequences=16)
    slots.join(*[700] * 15, 3000)
    slots.step()
    cache = slots.cache
    assert cache is not None
    assert cache.keys.shape == (16, HEADS, 3336, SIZE)
    slots.leave(15)
    slots.check()
    assert cache.keys.shape == (16, HEADS, 1032, SIZE)
    slots.leave(*range(10))
    slots.check()
    assert cache.keys.shape == (5, HEADS, 1032, SIZE)


def test_buffers_are_written_in_place() -> None:
    """When a sequence leaves and another joins: MLX copies a buffer that is written while something else holds on to it."""
    cache = SlotKVCache(BatchKVCache.merge([_cache_of([1.0] * 9) for _ in range(8)]), 8, None)
    newcomer = BatchKVCache.merge([_cache_of([2.0] * 5)])
    cache.update_positions()
    column, value = mx.ones((8, HEADS, 1, SIZE)), mx.ones((8, HEADS, 1, VALUE_SIZE))
    for _ in range(3):
        cache.update_and_fetch(column, value)
    cache.keys, cache.values = (
        mx.contiguous(mx.pad(each, [(0, 0), (0, 0), (0, 200_000), (0, 0)]))
        for each in (cache.keys, cache.values)
    )
    mx.eval(column, value, newcomer.state)

    def step() -> None:
        num_sequences = len(cache.starts)
        keys, values = cache.update_and_fetch(column[:num_sequences], value[:num_sequences])
        mx.eval(keys.sum() + values.sum())

    step()  # writes into the buffers that were made above
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert cache.nbytes > 90 * 2**20
    mx.eval(cache.lift(moves_to([7, 1, 2, 3, 4, 5, 6])))
    cache.filter([7, 1, 2, 3, 4, 5, 6])
    cache.update_positions()
    step()
    cache.extend(newcomer)
    cache.update_positions()
    step()
    mx.synchronize()
    assert mx.get_peak_memory() - before < cache.nbytes / 4


def test_empty_prompts() -> None:
    """Sequences with no token in their caches before their first step, alone and with others."""
    slots = Slots(seed=0)
    slots.join(0, 0)
    slots.step()
    slots.check()
    slots.join(0)
    slots.step()
    slots.check()


def test_layers_share_their_positions() -> None:
    """Layers share the arrays if they have the same sequences."""
    one, other = (
        SlotKVCache(BatchKVCache.merge([_cache_of([1.0, 2.0]), _cache_of([3.0])]), 4, None) for _ in "ab"
    )
    one.update_positions()
    other.update_positions(one)
    assert other.offset is one.offset
    assert other.left_padding is one.left_padding
    other.filter([0])
    other.update_positions(one)
    assert other.offset.tolist() == [2]


def test_moves() -> None:
    """Adjacent sequences move together; a sequence that keeps its slot is not copied."""
    assert fill_gaps([0, 1, 2]) == [0, 1, 2]
    assert fill_gaps([1, 2, 4, 5]) == [4, 1, 2, 5]
    assert moves_to([0, 1, 2]) == []
    assert moves_to([6, 7, 2, 3, 8]) == [Move(0, 6, 2), Move(4, 8, 1)]
