"""Sequences of token ids with a value each, found by their common prefixes; the least recently used are evicted.

Pure; used by `worker.mlx.prefixes.prefix_cache`. Built on sorted lists: of all sequences, one of a query's two neighbours in their order
shares the longest prefix with it, and lists compare at C's speed. mlx-lm's trie (0.32) walks everything below the point where two
sequences part: with a thousand that begin with one system prompt, 70 % of a GPU worker's time.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """A sequence and what is kept for it.

    Attributes:
        is_divisible: Whether the value serves shorter prefixes of the sequence, too.
    """

    token_ids: list[int]
    value: T
    num_bytes: int
    is_divisible: bool


class Nearest(NamedTuple):
    """An entry, and how many tokens of a query it serves."""

    entry: Entry[Any]
    num_shared: int


class PrefixIndex(Generic[T]):
    """See the module.

    Attributes:
        num_bytes: The size of all values.

    Args:
        max_bytes: Limit of `num_bytes`.
        max_entries: Limit of the number of entries.
    """

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        # Sequences in order: those whose values serve shorter prefixes too, and those whose values do not.
        self._divisible: list[list[int]] = []
        self._indivisible: list[list[int]] = []
        # By the identity of their lists, the most recently used at the end.
        self._entries: OrderedDict[int, Entry[T]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def nearest(self, token_ids: list[int]) -> Nearest | None:
        """The entry that serves the longest prefix of a query; it counts as used."""
        index = bisect.bisect_right(self._divisible, token_ids)
        candidates = self._divisible[max(0, index - 1) : index + 1]
        candidates += _prefixes(self._indivisible, token_ids)[:1]
        shared = [num_common(token_ids, candidate) for candidate in candidates]
        if not any(shared):
            return None
        num_shared = max(shared)
        entry = self._entries[id(candidates[shared.index(num_shared)])]
        self._entries.move_to_end(id(entry.token_ids))
        return Nearest(entry, num_shared)

    def add(self, token_ids: list[int], value: T, num_bytes: int, *, is_divisible: bool) -> None:
        """Keep a value; entries that it replaces are dropped, and the least recently used are evicted if there is too much."""
        served = _prefixes(self._indivisible, token_ids)
        if is_divisible:
            served += _prefixes(self._divisible, token_ids)
        else:
            served = [prefix for prefix in served if len(prefix) == len(token_ids)]
        for prefix in served:
            self._drop(self._entries[id(prefix)])
        entry = Entry(list(token_ids), value, num_bytes, is_divisible)
        bisect.insort(self._order_of(entry), entry.token_ids)
        self._entries[id(entry.token_ids)] = entry
        self.num_bytes += num_bytes
        self.shrink_to(self._max_bytes)
        while len(self._entries) > self._max_entries:
            self._evict_oldest()

    def shrink_to(self, num_bytes: int) -> None:
        """Evict the least recently used until at most `num_bytes` are kept."""
        while self.num_bytes > max(0, num_bytes):
            self._evict_oldest()

    def _order_of(self, entry: Entry[T]) -> list[list[int]]:
        return self._divisible if entry.is_divisible else self._indivisible

    def _evict_oldest(self) -> None:
        self._drop(next(iter(self._entries.values())))

    def _drop(self, entry: Entry[T]) -> None:
        ordered = self._order_of(entry)
        del ordered[bisect.bisect_left(ordered, entry.token_ids)], self._entries[id(entry.token_ids)]
        self.num_bytes -= entry.num_bytes


def _prefixes(ordered: list[list[int]], token_ids: list[int]) -> list[list[int]]:
    """The sequences that are prefixes of a query, the longest first."""
    found = []
    index = bisect.bisect_right(ordered, token_ids)
    while index:
        before = ordered[index - 1]
        num_shared = num_common(token_ids, before)
        if num_shared == len(before):
            found.append(before)
            index -= 1
        else:
            # Nothing between the common part and this one is a prefix.
            index = bisect.bisect_right(ordered, token_ids[:num_shared], hi=index - 1)
    return found


def num_common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:  # slices compare at C's speed
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
