"""Results of checks of client text are cached without the text."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from common.digest_cache import DigestCache

MB = 10**6


def bytes_left_by(act: Callable[[], object]) -> int:
    """Growth of Python's heap, in bytes, after `act`."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_result_is_computed_once() -> None:
    """The same text is computed once, text and bytes alike; another text is another entry."""
    cache: DigestCache[str] = DigestCache(8)
    assert cache.get("a", lambda: "first") == cache.get(b"a", lambda: "second") == "first"
    assert cache.get("b", lambda: "third") == "third"
    assert cache.get("\ud800", lambda: "a lone surrogate") == "a lone surrogate"


def test_an_error_is_not_cached() -> None:
    """A computation that raised is repeated the next time."""
    cache: DigestCache[str] = DigestCache(8)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: str(1 // 0))
    assert cache.get("a", lambda: "now") == "now"


def test_the_least_recently_used_entry_is_evicted() -> None:
    """No more entries than allowed are kept."""
    cache: DigestCache[str] = DigestCache(2)
    for text in ("a", "b", "a", "c"):
        cache.get(text, lambda text=text: text)
    assert [cache.get(text, lambda: "again") for text in ("a", "c")] == ["a", "c"]
    assert cache.get("b", lambda: "again") == "again"


def test_the_text_is_not_kept() -> None:
    """Large texts leave nothing but their digests."""
    cache: DigestCache[None] = DigestCache(512)
    left = bytes_left_by(lambda: [cache.get(f"{i}" * MB, lambda: None) for i in range(10)])
    assert left < MB / 10
