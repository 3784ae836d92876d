"""Rows that come and go in slots: what each of them keeps is its own, and nothing else is copied for it."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from worker.mlx.decode import _order
from worker.mlx.kv_slots import Move, SlotKVCache, moves_to

HEADS, SIZE, VALUE_SIZE = 2, 4, 6


class Rows:
    """A cache, and beside it what each row's keys must be."""

    def __init__(self, seed: int, max_rows: int = 8) -> None:
        self.chance = random.Random(seed)  # noqa: S311 (the same each time)
        self.max_rows = max_rows
        self.cache: SlotKVCache | None = None
        self.histories: list[list[float]] = []
        self.num_rebuilt = 0
        self._next = 0.0

    def join(self, *lengths: int) -> None:
        """Rows that were read together, as mlx-lm leaves them."""
        histories = [[self._number() for _ in range(length)] for length in lengths]
        read = BatchKVCache.merge([_kept(history) for history in histories])
        if self.cache is None:
            self.cache = SlotKVCache(read, self.max_rows, None)
            rebuild = self.cache._rebuild

            def counted(*arguments: Any, **options: Any) -> None:
                self.num_rebuilt += 1
                rebuild(*arguments, **options)

            self.cache._rebuild = counted  # type: ignore[method-assign]
        else:
            self.cache.extend(read)
        self.cache.count()
        self.histories += histories

    def step(self) -> None:
        """One more token of each."""
        assert self.cache is not None
        new = [self._number() for _ in self.histories]
        for history, number in zip(self.histories, new, strict=True):
            history.append(number)
        column = [[number] for number in new]
        self.cache.update_and_fetch(_array(column), _array(column, VALUE_SIZE))

    def leave(self, *rows: int, is_lifted: bool = True) -> None:
        """Some go."""
        assert self.cache is not None
        keep = [row for row in range(len(self.histories)) if row not in rows]
        order = _order(keep) if is_lifted else keep
        if is_lifted and not self.cache.is_wasteful(order):
            mx.async_eval(self.cache.lift(moves_to(order)))
        self.cache.filter(order)
        self.cache.count()
        self.histories = [self.histories[row] for row in order]

    def check(self) -> None:
        """Keys, values, what mlx-lm reads of a cache, and each row cut out."""
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
        for row, history in enumerate(self.histories):
            own = cache.extract(row)
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
    """(rows, HEADS, columns, size), all of a column the same."""
    return mx.broadcast_to(mx.array(rows)[:, None, :, None], (len(rows), HEADS, len(rows[0]), size))


def _kept(history: list[float]) -> KVCache:
    cache: Any = KVCache()
    if history:
        cache.update_and_fetch(_array([history]), _array([history], VALUE_SIZE))
    return cache


@pytest.mark.parametrize("seed", range(12))
def test_rows_come_and_go(seed: int) -> None:
    """In any order, short and long ones, one by one and many at once."""
    rows = Rows(seed)
    chance = rows.chance
    rows.join(*(chance.randrange(2, 30) for _ in range(3)))
    for _ in range(60):
        what, num_rows = chance.random(), len(rows.histories)
        if what < 0.35 and num_rows < rows.max_rows:
            most = chance.choice([5, 30, 300])
            rows.join(
                *(chance.randrange(1, most) for _ in range(chance.randint(1, rows.max_rows - num_rows)))
            )
        elif what < 0.6 and num_rows > 1:
            gone = chance.sample(range(num_rows), chance.randint(1, num_rows - 1))
            rows.leave(*gone, is_lifted=chance.random() < 0.7)
        for _ in range(chance.choice([1, 1, 3, 90])):
            rows.step()
        rows.check()


def test_one_row_costs_no_other() -> None:
    """Where there is a slot and a column, whoever comes or goes, there are no new buffers."""
    rows = Rows(seed=0)
    rows.join(*[20] * 8)
    rows.step()
    rows.num_rebuilt = 0
    for row in (0, 7, 3):
        rows.leave(row)
        rows.check()
        rows.join(9)
        rows.step()
        rows.check()
    assert rows.num_rebuilt == 0


def test_what_rows_leave_behind_is_not_looked_at() -> None:
    """Someone sits where a longer row has overflowed, and then a longer one joins: before its beginning there are zeros.

    Zero times what overflowed would be no number.
    """
    rows = Rows(seed=0)
    rows.join(5, 6, 40, 40)
    rows.step()
    assert rows.cache is not None
    rows.cache.keys[2:] = rows.cache.values[2:] = mx.array(mx.inf)
    rows.num_rebuilt = 0
    rows.leave(2, 3)
    for length in (7, 38):
        rows.join(length)
        rows.step()
        rows.check()
    assert rows.num_rebuilt == 0


def test_buffers_shrink() -> None:
    """Where a long row leaves few columns behind, and many rows few slots."""
    rows = Rows(seed=0, max_rows=16)
    rows.join(*[700] * 15, 3000)
    rows.step()
    cache = rows.cache
    assert cache is not None
    assert cache.keys.shape == (16, HEADS, 3328, SIZE)
    rows.leave(15)
    rows.check()
    assert cache.keys.shape == (16, HEADS, 1024, SIZE)
    rows.leave(*range(10))
    rows.check()
    assert cache.keys.shape == (5, HEADS, 1024, SIZE)


def test_buffers_are_written_in_place() -> None:
    """When a row leaves and another joins: MLX copies what is written while anybody else holds on to it, and nobody does."""
    cache = SlotKVCache(BatchKVCache.merge([_kept([1.0] * 9) for _ in range(8)]), 8, None)
    newcomer = BatchKVCache.merge([_kept([2.0] * 5)])
    cache.count()
    column, value = mx.ones((8, HEADS, 1, SIZE)), mx.ones((8, HEADS, 1, VALUE_SIZE))
    for _ in range(3):
        cache.update_and_fetch(column, value)
    cache.keys, cache.values = (
        mx.contiguous(mx.pad(each, [(0, 0), (0, 0), (0, 200_000), (0, 0)]))
        for each in (cache.keys, cache.values)
    )
    mx.eval(column, value, newcomer.state)

    def step() -> None:
        num_rows = len(cache.starts)
        keys, values = cache.update_and_fetch(column[:num_rows], value[:num_rows])
        mx.eval(keys.sum() + values.sum())

    step()  # into the buffers that were made here
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert cache.nbytes > 90 * 2**20
    mx.eval(cache.lift(moves_to([7, 1, 2, 3, 4, 5, 6])))
    cache.filter([7, 1, 2, 3, 4, 5, 6])
    cache.count()
    step()
    cache.extend(newcomer)
    cache.count()
    step()
    mx.synchronize()
    assert mx.get_peak_memory() - before < cache.nbytes / 4


def test_empty_prompts() -> None:
    """Rows of which nothing was read before their first step, alone and beside others."""
    rows = Rows(seed=0)
    rows.join(0, 0)
    rows.step()
    rows.check()
    rows.join(0)
    rows.step()
    rows.check()


def test_layers_share_what_they_count() -> None:
    """Where their rows are the same."""
    one, other = (SlotKVCache(BatchKVCache.merge([_kept([1.0, 2.0]), _kept([3.0])]), 4, None) for _ in "ab")
    one.count()
    other.count(one)
    assert other.offset is one.offset
    assert other.left_padding is one.left_padding
    other.filter([0])
    other.count(one)
    assert other.offset.tolist() == [2]


def test_moves() -> None:
    """Neighbours move together; who stays is not moved."""
    assert _order([0, 1, 2]) == [0, 1, 2]
    assert _order([1, 2, 4, 5]) == [4, 1, 2, 5]
    assert moves_to([0, 1, 2]) == []
    assert moves_to([6, 7, 2, 3, 8]) == [Move(0, 6, 2), Move(4, 8, 1)]
