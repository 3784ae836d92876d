"""Which CPUs the processes of a contest get."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.contest import placement
from bench.contest.placement import siblings, spread, without_siblings

CPUS = range(16)


@pytest.mark.parametrize("num", [2, 3, 4, 5])
def test_no_two_are_siblings(num: int) -> None:
    """However the machine numbers hyper-threads: neighbors, or the second half of all CPUs. Each round has other CPUs."""
    chosen = [spread(CPUS, num, number) for number in range(len(CPUS))]
    for own in chosen:
        assert len(own) == num
        for i in range(8):
            assert not {2 * i, 2 * i + 1} <= own
            assert not {i, i + 8} <= own
    assert len({frozenset(own) for own in chosen}) == len(CPUS)


def test_all_cpus_may_be_taken() -> None:
    """A small machine has no choice."""
    assert spread(range(4), 4, 5) == {0, 1, 2, 3}


def test_siblings_stay_idle() -> None:
    """The processes around the model do not run on the other half of its cores, if there are other CPUs."""
    known = {0: {0, 8}, 3: {3, 11}}
    assert without_siblings(CPUS, {0, 3}, known) == set(CPUS) - {0, 3, 8, 11}
    assert without_siblings(range(2), {0}, {0: {0, 1}}) == {1}
    assert without_siblings(range(2), {0, 1}, {}) == {0, 1}


@pytest.mark.parametrize(("text", "expected"), [("0-1\n", {0, 1}), ("0,8\n", {0, 8}), ("0\n", {0})])
def test_the_system_names_siblings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: set[int]
) -> None:
    """Linux writes them as a list or as a range; without the file a CPU has no known sibling."""
    monkeypatch.setattr(placement, "_SIBLINGS", str(tmp_path / "cpu{cpu}"))
    (tmp_path / "cpu0").write_text(text)
    assert siblings(0) == expected
    assert siblings(5) == {5}
