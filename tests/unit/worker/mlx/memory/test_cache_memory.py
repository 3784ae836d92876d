"""How many sequences fit into the memory: arithmetic on caches of different kinds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.mlx.memory.cache_memory import (
    EXPECTED_TOKENS,
    CacheCost,
    CacheMemory,
    columns,
    expected_tokens,
    is_common_length,
)


def test_total_bytes() -> None:
    """Whole steps of 256 tokens and 8, at least 128 ahead; a window stops growing; a state of fixed size does not grow."""
    assert CacheCost(10.0).total_bytes(1, 127) == 2640
    assert CacheCost(10.0).total_bytes(1, 128) == 5200
    assert CacheCost(10.0, bytes_per_sequence=7, windows=((1.0, 300),)).total_bytes(1, 800) == 10320 + 7 + 300
    assert CacheCost(0.0, bytes_per_sequence=7).total_bytes(1, 10**9) == 7


def test_spare_slots() -> None:
    """Layers that keep every token have spare slots, from eight sequences on."""
    assert CacheCost(1.0).total_bytes(7, 100) == 7 * 264
    assert CacheCost(1.0).total_bytes(16, 100) == 18 * 264
    assert CacheCost(0.0, bytes_per_sequence=7, windows=((1.0, 10),)).total_bytes(16, 100) == 16 * 17


def test_a_batch_is_as_long_as_its_longest_sequence() -> None:
    """One long sequence makes all the others cost as much."""
    memory = CacheMemory(CacheCost(1.0), 4 * 264)
    assert memory.fits([])
    assert memory.fits([100] * 4)
    assert not memory.fits([100] * 5)
    assert not memory.fits([100, 100, 300])
    assert memory.fits([100, 300])


def test_held_memory_counts() -> None:
    """If caches hold more than the sequences need, since others have left, that counts."""
    memory = CacheMemory(CacheCost(1.0), 1000)
    assert memory.left_bytes([100], 10) == 736
    assert memory.left_bytes([100], 900) == 100
    assert memory.left_bytes([], 900) == 100


@given(most=st.integers(0, 10_000), room=st.integers(0, 20_000))
def test_longest_sequence(most: int, room: int) -> None:
    """It fits, and a sequence with one more token does not."""
    memory = CacheMemory(CacheCost(2.0), room)
    longest = memory.longest_sequence(most)
    assert longest == 0 or memory.fits([longest])
    assert longest == most or not memory.fits([longest + 1])


def test_expected_tokens() -> None:
    """A small limit counts in full, a large one only up to the usual length of answers, and at least the tokens that exist."""
    assert expected_tokens(10, 0, 5) == 15
    assert expected_tokens(10, 0, 100_000) == 10 + EXPECTED_TOKENS
    assert expected_tokens(10, 4000, 100_000) == 4010


@given(st.integers(0, 100_000))
def test_columns(num_tokens: int) -> None:
    """Buffers have free columns, and never a multiple of 256: MLX's CUDA back-end would use cuDNN for decode steps then."""
    found = columns(num_tokens)
    assert num_tokens + 128 <= found <= num_tokens + 128 + 256 + 8
    assert found % 256
    assert is_common_length(found)
    assert not is_common_length(found + 1)
