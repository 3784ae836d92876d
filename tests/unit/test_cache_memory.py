"""How many rows fit: arithmetic on caches of different kinds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.cache_memory import EXPECTED_TOKENS, CacheCost, CacheMemory, expected_tokens


def test_row_bytes() -> None:
    """Whole steps of 256 tokens, one ahead; a window stops growing; a state of fixed size does not grow."""
    assert CacheCost(10.0).row_bytes(255) == 2560
    assert CacheCost(10.0).row_bytes(256) == 5120
    assert CacheCost(10.0, bytes_per_row=7, windows=((1.0, 300),)).row_bytes(1000) == 10240 + 7 + 300
    assert CacheCost(0.0, bytes_per_row=7).row_bytes(10**9) == 7


def test_a_batch_is_as_long_as_its_longest_row() -> None:
    """One long row makes all the others cost as much."""
    memory = CacheMemory(CacheCost(1.0), 4 * 256)
    assert memory.fits([])
    assert memory.fits([100] * 4)
    assert not memory.fits([100] * 5)
    assert not memory.fits([100, 100, 300])
    assert memory.fits([100, 300])


@given(most=st.integers(0, 10_000), room=st.integers(0, 20_000))
def test_longest_row(most: int, room: int) -> None:
    """The longest that fits, and one longer does not."""
    memory = CacheMemory(CacheCost(2.0), room)
    longest = memory.longest_row(most)
    assert longest == 0 or memory.fits([longest])
    assert longest == most or not memory.fits([longest + 1])


def test_expected_tokens() -> None:
    """A short limit is believed, a long one only as far as answers usually go, and what is there counts."""
    assert expected_tokens(10, 0, 5) == 15
    assert expected_tokens(10, 0, 100_000) == 10 + EXPECTED_TOKENS
    assert expected_tokens(10, 4000, 100_000) == 4010
