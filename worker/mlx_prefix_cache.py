"""What was read before is not read again: caches of finished rows and of prompts, by their tokens.

Owned by `mlx_engine`. mlx-lm's `LRUPromptCache` finds the nearest one and drops the oldest; here is decided what is put
in, how much memory it may take, and which rows had better wait for another that reads the same beginning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_LEAST_CACHED_TOKENS = 16
"""A shorter beginning is read again as soon as it is found and copied."""

_LEAST_SHARED_TOKENS = 64
"""A shorter beginning is not worth waiting for."""

_MOST_ENTRIES = 4096

_MODEL = "model"  # mlx-lm's cache can hold several models' entries; a worker has one


class Found(NamedTuple):
    """Where a row can begin.

    Attributes:
        caches: One a layer, the row's own; None: from the start.
        num_cached: Tokens that are in them.
    """

    caches: list[Any] | None
    num_cached: int


class PrefixCache:
    """See the module.

    Args:
        limit_bytes: 0: nothing is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        from mlx_lm.models.cache import LRUPromptCache

        self._limit_bytes = limit_bytes
        self._entries = LRUPromptCache(max_size=_MOST_ENTRIES, max_bytes=limit_bytes)

    @property
    def num_bytes(self) -> int:
        """Kept now."""
        return int(self._entries.nbytes)

    def find(self, token_ids: list[int]) -> Found:
        """The longest beginning of a row that was read before; at least one token is left to read."""
        if not self._limit_bytes or len(token_ids) <= _LEAST_CACHED_TOKENS:
            return Found(None, 0)
        caches, rest = self._entries.fetch_nearest_cache(_MODEL, token_ids)
        if not rest:
            caches, rest = self._entries.fetch_nearest_cache(_MODEL, token_ids[:-1])
            rest = [*rest, token_ids[-1]]
        num_cached = len(token_ids) - len(rest)
        if caches is None or num_cached < _LEAST_CACHED_TOKENS:
            return Found(None, 0)
        return Found(caches, num_cached)

    def num_cached(self, token_ids: list[int]) -> int:
        """How much of a row `find` would find."""
        return self.find(token_ids).num_cached  # copies are lazy and cost nothing while nobody looks at them

    def put(self, token_ids: list[int], caches: list[Any]) -> None:
        """Keep a row's caches.

        Args:
            token_ids: What is in them.
            caches: Cut out of a batch's.
        """
        if not self._limit_bytes or len(token_ids) < _LEAST_CACHED_TOKENS:
            return
        import mlx.core as mx

        # Until it is computed, a part holds on to the whole batch's arrays.
        mx.eval([cache.state for cache in caches])
        self._entries.insert_cache(_MODEL, list(token_ids), caches)

    def shrink_to(self, num_bytes: float) -> None:
        """Make room for rows: the oldest go first."""
        if self._entries.nbytes > num_bytes:
            self._entries.trim_to(n_bytes=int(max(0, num_bytes)))


def had_better_wait(token_ids: list[int], num_cached: int, being_read: list[list[int]]) -> int | None:
    """Which of the prompts that are being read has so much in common with a new one that it is worth waiting for.

    Args:
        num_cached: Tokens of the new one that need not be read anyway.

    Returns:
        Its place in `being_read`; None where there is none.
    """
    best, best_shared = None, num_cached + _LEAST_SHARED_TOKENS
    for place, other in enumerate(being_read):
        if (shared := _num_shared(token_ids, other)) >= best_shared:
            best, best_shared = place, shared + 1
    return best


def _num_shared(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:  # slices compare at C's speed
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
