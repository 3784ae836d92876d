"""Which kept sequence serves a query, compared with a search of all of them."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.mlx.prefixes.prefix_index import PrefixIndex, num_common

SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def naive_common(one: list[int], other: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


@given(SEQUENCES, SEQUENCES)
def test_num_common(one: list[int], other: list[int]) -> None:
    """The length of the common prefix, compared with a naive count."""
    assert num_common(one, other) == naive_common(one, other)
    assert num_common(one, one + other) == len(one)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(SEQUENCES, st.booleans()), max_size=25), SEQUENCES)
def test_nearest_is_the_nearest(added: list[tuple[list[int], bool]], query: list[int]) -> None:
    """No other entry serves a longer prefix of the query; an indivisible one serves only queries that begin with all of it."""
    index: PrefixIndex[int] = PrefixIndex(10**6, 1000)
    for number, (token_ids, is_divisible) in enumerate(added):
        index.add(token_ids, number, 1, is_divisible=is_divisible)
    best = max(
        (
            naive_common(token_ids, query)
            for token_ids, is_divisible in added
            if is_divisible or token_ids == query[: len(token_ids)]
        ),
        default=0,
    )
    found = index.nearest(query)
    assert (found.num_shared if found else 0) == best
    if found:
        kept = found.entry
        assert kept.token_ids == added[kept.value][0]
        assert kept.is_divisible or kept.token_ids == query[: len(kept.token_ids)]
        assert naive_common(kept.token_ids, query) == found.num_shared


@settings(deadline=None)
@given(st.lists(SEQUENCES, max_size=30), st.integers(0, 12), st.integers(1, 6))
def test_bounds(added: list[list[int]], max_bytes: int, max_entries: int) -> None:
    """Bytes and entries stay within their bounds and are counted correctly, whatever is added."""
    index: PrefixIndex[int] = PrefixIndex(max_bytes, max_entries)
    for token_ids in added:
        index.add(token_ids, 0, len(token_ids), is_divisible=True)
        assert index.num_bytes <= max_bytes
        assert len(index) <= max_entries
    kept = {id(n.entry): n.entry for query in added if (n := index.nearest(query))}
    assert index.num_bytes == sum(len(entry.token_ids) for entry in kept.values())
    index.shrink_to(0)
    assert (len(index), index.num_bytes) == (0, 0)


def test_the_least_recently_used_is_evicted() -> None:
    """Finding an entry counts as use: of three, the oldest one that was not found again is evicted."""
    index: PrefixIndex[str] = PrefixIndex(100, 3)
    for name, token_ids in (("a", [1, 1]), ("b", [2, 2]), ("c", [3, 3])):
        index.add(token_ids, name, 1, is_divisible=True)
    assert index.nearest([1, 1, 5])
    index.add([4, 4], "d", 1, is_divisible=True)
    assert index.nearest([2, 2]) is None
    found = index.nearest([1, 1])
    assert found is not None
    assert found.entry.value == "a"


def test_a_longer_entry_replaces_its_prefixes() -> None:
    """A divisible value replaces entries of its prefixes, which it serves; an indivisible one is kept next to them."""
    index: PrefixIndex[str] = PrefixIndex(100, 10)
    index.add([1, 2], "short", 2, is_divisible=True)
    index.add([1, 2, 3], "long", 3, is_divisible=True)
    assert (len(index), index.num_bytes) == (1, 3)
    index.add([1, 2, 3, 4], "whole", 4, is_divisible=False)
    assert len(index) == 2
    found = index.nearest([1, 2, 3, 9])
    assert found is not None
    assert found.entry.value == "long"
