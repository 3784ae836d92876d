"""How workers on one machine share its memory: each has a claim, a file that is locked while its process lives.

A worker registers its claim before it loads a model (`worker.mlx.memory.memory_share`) and reads the others' periodically: its limit
follows from all of them, so a worker that starts or ends changes everyone's. `make up` does the same arithmetic before it starts
any. The kernel drops the lock of a process that was killed, and the next reader removes its file. Each host has a folder of its
own: on a network file system, locks may not be seen by other hosts. Independent of MLX.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import socket
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from common.errors import StartupError

log = logging.getLogger(__name__)

GB = 2**30

WORKING_SHARE = 0.05
WORKING_BYTES = 256 * 2**20
"""What a step needs in addition to weights and caches: a share of the limit, and at least so many bytes."""

MIN_CACHE_BYTES = 64 * 2**20
"""Below this much room for caches, a worker is not worth starting."""

READ_SECONDS = 2.0
"""How often a running worker reads the others' claims."""

_SUFFIX = ".json"


class Claim(msgspec.Struct, frozen=True):
    """What one worker needs.

    Attributes:
        device: Whose memory it is; only claims on the same device share.
        weight_bytes: Of its model.
        limit_bytes: As set with --memory-limit-gb; None: a fair share.
    """

    pid: int
    model: str
    device: str
    weight_bytes: int
    limit_bytes: int | None = None

    @property
    def min_bytes(self) -> int:
        """The least that a worker can run with."""
        if self.limit_bytes is not None:
            return self.limit_bytes
        return needed_bytes(self.weight_bytes, MIN_CACHE_BYTES)


class Machine(msgspec.Struct, frozen=True):
    """The device that a worker computes on, and how much of its memory all workers may use together."""

    device: str
    limit_bytes: int


def working_bytes(limit_bytes: float) -> float:
    """What a step may take in addition to weights and caches, in a worker that may use `limit_bytes`."""
    return max(WORKING_BYTES, WORKING_SHARE * limit_bytes)


def room_bytes(limit_bytes: float, weight_bytes: int) -> float:
    """The room for caches in a worker that may use `limit_bytes`; below 0 if that is too little for its weights."""
    return limit_bytes - weight_bytes - working_bytes(limit_bytes)


def needed_bytes(weight_bytes: int, cache_bytes: int) -> int:
    """The smallest limit with this room for caches: the inverse of `room_bytes`."""
    fixed_bytes = weight_bytes + cache_bytes
    return max(fixed_bytes + WORKING_BYTES, math.ceil(fixed_bytes / (1 - WORKING_SHARE)))


def share_bytes(own: Claim, others: Sequence[Claim], machine: Machine) -> int:
    """The memory that a worker may use.

    One that was given a limit has that. The rest is shared by the others: each has its weights, what its steps need, and the
    same room for caches.
    """
    if own.limit_bytes is not None:
        return own.limit_bytes
    sharing = [own, *(claim for claim in others if claim.limit_bytes is None)]
    fixed_bytes = sum(claim.limit_bytes or 0 for claim in others)
    shared_bytes = machine.limit_bytes - fixed_bytes
    cache_bytes = _equal_room_bytes(sharing, shared_bytes)
    # Rounding leaves a few bytes; if not even the weights fit, each lacks the same amount.
    rest_bytes = shared_bytes - sum(needed_bytes(claim.weight_bytes, cache_bytes) for claim in sharing)
    return needed_bytes(own.weight_bytes, cache_bytes) + rest_bytes // len(sharing)


def _equal_room_bytes(claims: Sequence[Claim], shared_bytes: int) -> int:
    """The most room for caches that each of these workers can have; 0 if there is none."""
    low, high = 0, max(0, shared_bytes)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(needed_bytes(claim.weight_bytes, middle) for claim in claims) <= shared_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def misfit(claims: Sequence[Claim], machine: Machine) -> str | None:
    """Why these workers do not fit on the machine together, as a sentence; None if they do.

    If they do, the share of each worker without a limit has room for MIN_CACHE_BYTES at least.
    """
    if sum(claim.min_bytes for claim in claims) <= machine.limit_bytes:
        return None
    each = Counter((claim.model, claim.min_bytes) for claim in claims)
    listed = " + ".join(
        (f"{num} × " if num > 1 else "") + f"{model} {num_bytes / GB:.1f} GB"
        for (model, num_bytes), num in each.items()
    )
    total = sum(claim.min_bytes for claim in claims)
    return f"{listed} = {total / GB:.1f} GB, and workers may use {machine.limit_bytes / GB:.1f} GB of this machine's memory"


class Registration:
    """This process's claim; it holds until `close`, until this object is gone, or until the process ends.

    Args:
        path: The claim's file.
        descriptor: Of the same file; open, it keeps the file locked.
        clock: In seconds, monotonic.
    """

    def __init__(
        self, claim: Claim, machine: Machine, path: Path, descriptor: int, clock: Callable[[], float]
    ) -> None:
        self._claim = claim
        self._machine = machine
        self._path = path
        self._unlock = weakref.finalize(self, os.close, descriptor)
        self._clock = clock
        self._read_mono = -math.inf
        self._share_bytes = 0

    def share_bytes(self) -> int:
        """The memory that this worker may use, as of READ_SECONDS ago at most."""
        if self._clock() - self._read_mono >= READ_SECONDS:
            self._read_mono = self._clock()
            if not self._path.exists():
                self._register_again()
            others = read(self._path.parent, self._claim.device, exclude=self._path)
            self._share_bytes = share_bytes(self._claim, others, self._machine)
        return self._share_bytes

    def _register_again(self) -> None:
        """Replace a file that was removed by a cleaner or by hand: without it, the other workers would use this one's memory."""
        folder = self._path.parent
        try:
            with _locked(folder):
                path, descriptor = _write(self._claim, folder)
        except OSError as error:
            log.warning("other workers on this machine cannot see how much memory this one takes: %s", error)
            return
        self._unlock()
        self._path, self._unlock = path, weakref.finalize(self, os.close, descriptor)
        log.warning("the file with this worker's memory claim was removed; it is written again")

    def close(self) -> None:
        """Release the memory to the other workers."""
        self._path.unlink(missing_ok=True)
        self._unlock()


def register(
    claim: Claim, machine: Machine, folder: Path, clock: Callable[[], float] = time.monotonic
) -> Registration:
    """Register a claim if it fits next to those of the running workers.

    Raises:
        StartupError: It does not fit; names the others.
        OSError: The folder cannot be written.
    """
    with _locked(folder):
        others = read(folder, claim.device)
        if complaint := misfit([*others, claim], machine):
            if claim.limit_bytes is not None:
                log.warning("memory may run short: %s", complaint)
            elif others:
                running = ", ".join(f"{other.model} in process {other.pid}" for other in others)
                raise StartupError(
                    f"{claim.model} does not fit in memory next to the workers that run on this machine ({running}): "
                    f"{complaint}; end one of them, or take a smaller model"
                )
        return Registration(claim, machine, *_write(claim, folder), clock)


def read(folder: Path, device: str, exclude: Path | None = None) -> list[Claim]:
    """The claims of the running workers on a device, oldest first; files of ended workers are removed."""
    claims = [_read_one(path) for path in sorted(folder.glob("*" + _SUFFIX)) if path != exclude]
    return [claim for claim in claims if claim is not None and claim.device == device]


def folder(state_folder: Path) -> Path:
    """Where the claims of this machine's workers are; a state folder may be shared by several hosts."""
    # Without the domain: on a Mac it changes with the network.
    return state_folder / "workers" / (socket.gethostname().partition(".")[0] or "localhost")


def weight_bytes(folder: Path) -> int:
    """The size of a model's weights on disk, which is about what they take in memory."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create the folder if necessary, and keep other workers from registering meanwhile."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_one(path: Path) -> Claim | None:
    """A claim; None if its process has ended, or if it cannot be read."""
    try:
        with path.open() as file:
            if _is_locked(file):
                return msgspec.json.decode(file.read(), type=Claim)
            path.unlink()
    except (OSError, ValueError):  # removed meanwhile, or written by another version
        pass
    return None


def _is_locked(file: IO[str]) -> bool:
    try:
        # Shared: of two processes that look at once, neither takes the other for the owner.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _write(claim: Claim, folder: Path) -> tuple[Path, int]:
    """A claim's path, and the descriptor that keeps it locked. The file gets its name only when it is locked and complete."""
    path = folder / f"{time.time_ns()}-{claim.pid}{_SUFFIX}"
    unnamed = folder / "new"
    descriptor = os.open(unnamed, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, msgspec.json.encode(claim))
        unnamed.rename(path)
    except OSError:
        os.close(descriptor)
        raise
    return path, descriptor
