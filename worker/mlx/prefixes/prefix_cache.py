"""Cached prefixes: the caches of prefilled prompts and of finished sequences, by their token ids.

Owned by `worker.mlx.engine`. `prefix_index` finds the nearest one and evicts the least recently used; this file decides
what is kept, how a sequence gets its own caches from it, and which sequences wait for one that is prefilling the same prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, trim_prompt_cache

from worker.mlx.caches import kinds as kv
from worker.mlx.prefixes.prefix_index import PrefixIndex, num_common

_MIN_CACHED_TOKENS = 16
"""A shorter prefix is never worth it."""

_MIN_SHARED_TOKENS = 64
"""A shorter prefix is not worth waiting for."""

_MAX_ENTRIES = 4096


class CachedPrefix(NamedTuple):
    """Where a sequence can begin.

    Attributes:
        caches: The sequence's own copy; None: it begins at the start.
        num_tokens: How many of its tokens are in them.
    """

    caches: kv.Caches | None
    num_tokens: int


class PrefixCache:
    """See the module.

    Attributes:
        is_enabled: Whether anything is kept.
        min_tokens: A shorter prefix is prefilled again rather than kept, found and copied.

    Args:
        limit_bytes: 0: nothing is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.min_tokens = _MIN_CACHED_TOKENS
        self.is_enabled = limit_bytes > 0
        self._index: PrefixIndex[kv.Caches] = PrefixIndex(limit_bytes, _MAX_ENTRIES)

    @property
    def num_bytes(self) -> int:
        """The memory of all kept caches."""
        return self._index.num_bytes

    def set_copy_tokens(self, copy_tokens: int) -> None:
        """Adapt `min_tokens` to how many tokens are prefilled in the time of a copy."""
        self.min_tokens = max(_MIN_CACHED_TOKENS, copy_tokens)

    def find(self, token_ids: list[int]) -> CachedPrefix:
        """The longest cached prefix of a sequence; at least one token is left to compute."""
        if len(token_ids) <= self.min_tokens:
            return CachedPrefix(None, 0)
        nearest = self._index.nearest(token_ids[:-1])
        if nearest is None or nearest.num_shared < self.min_tokens:
            return CachedPrefix(None, 0)
        caches = _copied(nearest.entry.value)
        if num_after := len(nearest.entry.token_ids) - nearest.num_shared:
            trim_prompt_cache(caches, num_after)
        return CachedPrefix(caches, nearest.num_shared)

    def offer(self, offers: Sequence[kv.CacheOffer]) -> None:
        """Keep the caches of sequences if that is worth it."""
        if not self.is_enabled:
            return
        kept = [(each.token_ids, each.extract()) for each in offers if len(each.token_ids) >= self.min_tokens]
        # Until they are evaluated, they keep all of the batch's arrays alive. Nothing waits for the evaluation.
        mx.async_eval([kv.states(caches) for _, caches in kept])
        for token_ids, caches in kept:
            is_divisible = can_trim_prompt_cache(caches)
            self._index.add(token_ids, caches, kv.num_bytes(caches), is_divisible=is_divisible)

    def shrink_to(self, num_bytes: float) -> None:
        """Make room for sequences: the least recently used caches are evicted."""
        self._index.shrink_to(int(num_bytes))


def _copied(caches: kv.Caches) -> kv.Caches:
    """New objects that share the arrays: kept caches do not change."""
    if all(type(cache) is KVCache for cache in caches):
        return [copy.copy(cache) for cache in caches]  # their arrays are merged into others, never written
    return copy.deepcopy(caches)


def should_wait_for(
    token_ids: list[int], num_cached: int, prefilling: list[list[int]], min_tokens: int
) -> int | None:
    """Which of the prompts that are prefilling shares a prefix with a new one that is worth waiting for.

    Args:
        num_cached: Tokens of the new one that are cached anyway.
        min_tokens: `PrefixCache.min_tokens`.

    Returns:
        Its index in `prefilling`; None if there is none.
    """
    best, best_shared = None, num_cached + max(_MIN_SHARED_TOKENS, min_tokens)
    for index, other in enumerate(prefilling):
        # Slices are compared first: most prompts have nothing in common, and a burst compares each with each.
        if len(token_ids) >= best_shared and token_ids[:best_shared] == other[:best_shared]:
            best, best_shared = index, num_common(token_ids, other) + 1
    return best
