"""Workers on one machine share its memory; what does not fit is refused before anything loads."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StartupError
from common.machine import memory_claims
from common.machine.memory_claims import GB, READ_SECONDS, Claim, Machine, Registration

MACHINE = Machine("gpu 0", 12 * GB)
MB = 2**20


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def claim(model: str = "a", *, gb: float = 4, limit_gb: float | None = None, device: str = "gpu 0") -> Claim:
    limit_bytes = None if limit_gb is None else int(limit_gb * GB)
    return Claim(pid=1, model=model, device=device, weight_bytes=int(gb * GB), limit_bytes=limit_bytes)


def test_a_worker_alone_has_all() -> None:
    """Without other workers, the share is all that the machine has for workers."""
    assert memory_claims.share_bytes(claim(), [], MACHINE) == 12 * GB


def test_each_has_its_weights_and_the_same_room() -> None:
    """Shares add up to the machine's memory; after weights and what steps need, each has the same left."""
    small, large = claim(gb=1), claim(gb=5)
    shares = [
        memory_claims.share_bytes(small, [large], MACHINE),
        memory_claims.share_bytes(large, [small], MACHINE),
    ]
    assert sum(shares) == pytest.approx(12 * GB, abs=2)
    rooms = [memory_claims.room_bytes(share, gb * GB) for share, gb in zip(shares, (1, 5), strict=True)]
    assert rooms[0] == pytest.approx(rooms[1], abs=4)
    assert rooms[0] > 2.6 * GB


@pytest.mark.parametrize("gigabytes", [(40, 7), (40, 5.2), (40, 4), (30, 16.5), (22, 22, 2), (1,) * 36])
def test_workers_that_fit_have_room_for_caches(gigabytes: tuple[float, ...]) -> None:
    """If models fit on a machine together, each worker's share has room for caches; otherwise some have too little."""
    machine = Machine("gpu 0", 48 * GB)
    claims = [claim(gb=each) for each in gigabytes]
    rooms = []
    for index, own in enumerate(claims):
        share = memory_claims.share_bytes(own, claims[:index] + claims[index + 1 :], machine)
        rooms.append(memory_claims.room_bytes(share, own.weight_bytes))
    has_room = min(rooms) >= memory_claims.MIN_CACHE_BYTES
    assert (memory_claims.misfit(claims, machine) is None) == has_room
    assert has_room == (gigabytes in {(40, 5.2), (40, 4), (1,) * 36})


@given(weight_bytes=st.integers(0, 64 * GB), cache_bytes=st.integers(0, 64 * GB))
def test_a_needed_limit_is_the_smallest_one(weight_bytes: int, cache_bytes: int) -> None:
    """`needed_bytes` is the inverse of `room_bytes`, to within a byte's rounding."""
    needed = memory_claims.needed_bytes(weight_bytes, cache_bytes)
    assert memory_claims.room_bytes(needed + 1, weight_bytes) >= cache_bytes
    assert memory_claims.room_bytes(needed - 2, weight_bytes) < cache_bytes


def test_a_limit_is_honored() -> None:
    """A worker with a limit has that; the others share what it leaves."""
    limited = claim(gb=2, limit_gb=6)
    others = [claim(gb=1), claim(gb=1)]
    assert memory_claims.share_bytes(limited, others, MACHINE) == 6 * GB
    assert memory_claims.share_bytes(others[0], [others[1], limited], MACHINE) == 3 * GB


def test_a_second_worker_halves_the_room_of_the_first(tmp_path: Path) -> None:
    """A running worker sees another start and end, within READ_SECONDS."""
    clock = Clock()
    first = memory_claims.register(claim("a", gb=4), MACHINE, tmp_path, clock)
    assert first.share_bytes() == 12 * GB
    second = memory_claims.register(claim("b", gb=4), MACHINE, tmp_path, clock)
    assert second.share_bytes() == 6 * GB
    assert first.share_bytes() == 12 * GB  # claims are read periodically
    clock.now += READ_SECONDS
    assert first.share_bytes() == 6 * GB
    second.close()
    clock.now += READ_SECONDS
    assert first.share_bytes() == 12 * GB


def test_other_devices_share_nothing(tmp_path: Path) -> None:
    """Two GPUs have memory of their own."""
    other = memory_claims.register(claim(gb=10, device="gpu 1"), Machine("gpu 1", 12 * GB), tmp_path)
    own = memory_claims.register(claim(gb=10), MACHINE, tmp_path)
    assert own.share_bytes() == other.share_bytes() == 12 * GB


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """The sentence names the workers that run and how much of what there is; the refused one leaves no claim."""
    first: Registration = memory_claims.register(claim("org/a", gb=9), MACHINE, tmp_path)
    with pytest.raises(
        StartupError, match=r"b does not fit .*org/a in process 1.*org/a 9\.5 GB \+ b 3\.3 GB"
    ) as refused:
        memory_claims.register(claim("b", gb=3), MACHINE, tmp_path)
    assert "workers may use 12.0 GB" in str(refused.value)
    assert [each.model for each in memory_claims.read(tmp_path, "gpu 0")] == ["org/a"]
    first.close()
    memory_claims.register(claim("b", gb=3), MACHINE, tmp_path)


def test_a_limit_beyond_the_machine_is_only_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was set explicitly is not refused."""
    first = memory_claims.register(claim("a", gb=4, limit_gb=8), MACHINE, tmp_path)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        second = memory_claims.register(claim("b", gb=4, limit_gb=8), MACHINE, tmp_path)
    assert "a 8.0 GB + b 8.0 GB = 16.0 GB" in caplog.text
    assert first.share_bytes() == second.share_bytes() == 8 * GB


REGISTER_AND_DIE = """
import os, signal, sys
from pathlib import Path
from common.machine.memory_claims import Claim, Machine, register
registration = register(Claim(os.getpid(), "m", "gpu 0", 9 * 2**30), Machine("gpu 0", 12 * 2**30), Path(sys.argv[1]))
print("registered", flush=True)
sys.stdin.read()
"""


def test_a_killed_worker_leaves_no_claim(tmp_path: Path) -> None:
    """Another process's claim holds while that process lives, and ends when it is killed."""
    command = [sys.executable, "-c", REGISTER_AND_DIE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "registered\n"
        assert [each.pid for each in memory_claims.read(tmp_path, "gpu 0")] == [other.pid]
        with pytest.raises(StartupError, match=f"m in process {other.pid}"):
            memory_claims.register(claim(), MACHINE, tmp_path)
        other.kill()
        other.wait()
    assert memory_claims.register(claim(), MACHINE, tmp_path).share_bytes() == 12 * GB
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_removed_claim_is_registered_again(tmp_path: Path) -> None:
    """Two workers never use the same memory because one's file, or the whole folder, was removed."""
    clock = Clock()
    first = memory_claims.register(claim("a"), MACHINE, tmp_path / "workers", clock)
    second = memory_claims.register(claim("b"), MACHINE, tmp_path / "workers", clock)
    for path in (tmp_path / "workers").iterdir():
        path.unlink()
    (tmp_path / "workers").rmdir()
    clock.now += READ_SECONDS
    first.share_bytes()
    second.share_bytes()
    clock.now += READ_SECONDS
    assert first.share_bytes() == second.share_bytes() == 6 * GB
    first.close()
    clock.now += READ_SECONDS
    assert second.share_bytes() == 12 * GB


def test_hosts_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a state folder that several hosts share, no host reads or removes another's claims; a Mac's domain may change."""
    folders = []
    for name in ("a.local", "a.example.com", "b"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        folders.append(memory_claims.folder(tmp_path))
    assert folders[0] == folders[1] != folders[2]
    own = memory_claims.register(claim(gb=10), MACHINE, folders[0])
    other = memory_claims.register(claim(gb=10), MACHINE, folders[2])
    assert own.share_bytes() == other.share_bytes() == 12 * GB


def test_an_unreadable_claim_is_ignored(tmp_path: Path) -> None:
    """A file that another version wrote stops no worker."""
    held = memory_claims.register(claim(), MACHINE, tmp_path)
    [path] = tmp_path.glob("*.json")
    path.write_text("[")
    assert memory_claims.read(tmp_path, "gpu 0") == []
    held.close()


def test_weights_are_measured_on_disk(tmp_path: Path) -> None:
    """All parts of the weights, and nothing else in the folder."""
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "adapters.safetensors",
    ):
        (tmp_path / name).write_bytes(b"x" * 100)
    assert memory_claims.weight_bytes(tmp_path) == 200
