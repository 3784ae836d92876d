"""What was read before is not read again: caches of finished rows and of prompts, by their tokens.

Owned by `mlx_engine`. `prefix_index` finds the nearest one and drops the oldest; here is decided what is put in, how a row
gets caches of its own from it, and which rows had better wait for another that reads the same beginning.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from worker.mlx.prefix_index import PrefixIndex, num_common

_MIN_CACHED_TOKENS = 16
"""A shorter beginning is never worth it."""

_MIN_SHARED_TOKENS = 64
"""A shorter beginning is not worth waiting for."""

_MAX_ENTRIES = 4096


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

    Attributes:
        min_tokens: A shorter beginning is read again rather than kept, found and copied.

    Args:
        limit_bytes: 0: nothing is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.min_tokens = _MIN_CACHED_TOKENS
        self._limit_bytes = limit_bytes
        self._index: PrefixIndex[list[Any]] = PrefixIndex(limit_bytes, _MAX_ENTRIES)

    @property
    def num_bytes(self) -> int:
        """Kept now."""
        return self._index.num_bytes

    def expect(self, copy_tokens: int) -> None:
        """Go by how many tokens are read in the time of a copy."""
        self.min_tokens = max(_MIN_CACHED_TOKENS, copy_tokens)

    def wants(self, token_ids: list[int]) -> bool:
        """Whether such a row is worth a `put`."""
        return self._limit_bytes > 0 and len(token_ids) >= self.min_tokens

    def find(self, token_ids: list[int]) -> Found:
        """The longest beginning of a row that was read before; at least one token is left to read."""
        if len(token_ids) <= self.min_tokens:
            return Found(None, 0)
        nearest = self._index.nearest(token_ids[:-1])
        if nearest is None or nearest.num_shared < self.min_tokens:
            return Found(None, 0)
        from mlx_lm.models.cache import trim_prompt_cache

        caches = copy.deepcopy(
            nearest.entry.value
        )  # new names for the same numbers: what is kept stays as it is
        if num_behind := len(nearest.entry.token_ids) - nearest.num_shared:
            trim_prompt_cache(caches, num_behind)
        return Found(caches, nearest.num_shared)

    def put(self, token_ids: list[int], caches: list[Any]) -> None:
        """Keep a row's caches.

        Args:
            token_ids: What is in them; `wants` has been asked.
            caches: Cut out of a batch's.
        """
        import mlx.core as mx
        from mlx_lm.models.cache import can_trim_prompt_cache

        # Until it is computed, a part holds on to the whole batch's arrays. Nobody waits for it.
        mx.async_eval([cache.state for cache in caches])
        num_bytes = sum(cache.nbytes for cache in caches)
        self._index.add(token_ids, caches, num_bytes, is_divisible=can_trim_prompt_cache(caches))

    def shrink_to(self, num_bytes: float) -> None:
        """Make room for rows: the oldest go first."""
        self._index.shrink_to(int(num_bytes))


def should_wait_for(
    token_ids: list[int], num_cached: int, being_read: list[list[int]], min_tokens: int
) -> int | None:
    """Which of the prompts that are being read has so much in common with a new one that it is worth waiting for.

    Args:
        num_cached: Tokens of the new one that need not be read anyway.
        min_tokens: `PrefixCache.min_tokens`.

    Returns:
        Its place in `being_read`; None where there is none.
    """
    best, best_shared = None, num_cached + max(_MIN_SHARED_TOKENS, min_tokens)
    for place, other in enumerate(being_read):
        # A slice of both first: most have nothing in common, and a burst asks this of each with each.
        if len(token_ids) >= best_shared and token_ids[:best_shared] == other[:best_shared]:
            best, best_shared = place, num_common(token_ids, other) + 1
    return best
