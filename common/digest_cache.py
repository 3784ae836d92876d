"""A cache for what is computed from client text: keyed by a digest, so that it never holds the text.

Used by the grammar checks of the API (`common.schema.grammar`) and the grammar compiler of a worker. Independent of both.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_DIGEST_BYTES = 32


class DigestCache(Generic[T]):
    """The last `max_entries` results, least recently used evicted first. Any thread may call it.

    An entry costs its digest and its result, however long the text was: a result must be small, or `max_entries` few.
    """

    def __init__(self, max_entries: int) -> None:
        # functools' cache has its own lock, in C. It holds a slot for each digest, which `get` fills.
        self._slot: Callable[[bytes], list[T]] = functools.lru_cache(maxsize=max_entries)(_empty_slot)

    def get(self, text: str | bytes, compute: Callable[[], T]) -> T:
        """The result for `text`; `compute` makes it the first time. What it raises is not cached."""
        data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        slot = self._slot(hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest())
        if not slot:
            slot.append(compute())  # two threads may both compute it: both return the first result
        return slot[0]


def _empty_slot(_digest: bytes) -> list[T]:
    return []
