"""CPU usage during a measurement: of each role of the pool, of this process, and of all other processes.

A measurement is unreliable if other processes use the CPUs: benchmarks print `Usage.others` next to each result, and
`measure_when_quiet` repeats a disturbed one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil

from bench.harness.pool import Pool, cpu_seconds_of

T = TypeVar("T")

QUIET_CPUS = 0.15
"""What other processes may use: the system itself, a shell."""

_SAMPLE_SECONDS = 1.0
_NUM_TRIES = 4


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU time used between two readings.

    Attributes:
        seconds: Wall clock.
        cpu_seconds: By role; this process is `client`.
        others: Mean number of CPUs that other processes used.
    """

    seconds: float
    cpu_seconds: dict[str, float]
    others: float

    def share(self, role: str) -> float:
        """Share of one CPU: 0 to 1, more for a role that uses several."""
        return self.cpu_seconds.get(role, 0.0) / self.seconds

    def us_per(self, role: str, num_tokens: int) -> float:
        """Microseconds of CPU time per token."""
        return 1e6 * self.cpu_seconds.get(role, 0.0) / num_tokens if num_tokens else 0.0


class Meter:
    """Reads CPU times when created, and again in `usage`.

    Args:
        pids: More processes of the benchmark, by role.
    """

    def __init__(self, pool: Pool, pids: dict[str, int] | None = None) -> None:
        self._pool = pool
        self._pids = (pids or {}) | {"client": os.getpid()}
        self._began = self._read()

    def usage(self) -> Usage:
        """Usage since the meter was created."""
        (at, busy, ours), (at_before, busy_before, before) = self._read(), self._began
        used = {role: seconds - before.get(role, 0.0) for role, seconds in ours.items()}
        others = max(0.0, busy - busy_before - sum(used.values()))
        return Usage(at - at_before, used, others / (at - at_before))

    def _read(self) -> tuple[float, float, dict[str, float]]:
        busy = busy_seconds()
        ours = self._pool.cpu_seconds() | {role: cpu_seconds_of(pid) for role, pid in self._pids.items()}
        return time.monotonic(), busy, ours


def measure_when_quiet(
    measure: Callable[[], tuple[T, Usage]], patience_seconds: float = 60.0
) -> tuple[T, Usage]:
    """Measure while other processes are idle; if they never are, take the least disturbed of a few tries."""
    tries = []
    for _ in range(_NUM_TRIES):
        wait_until_quiet(patience_seconds)
        tries.append(measure())
        if tries[-1][1].others <= QUIET_CPUS:
            break
    return min(tries, key=lambda result: result[1].others)


def wait_until_quiet(patience_seconds: float) -> None:
    """Wait until the whole machine is idle, but at most `patience_seconds`."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(_SAMPLE_SECONDS)
        if (busy_seconds() - before) / _SAMPLE_SECONDS <= QUIET_CPUS:
            return


def busy_seconds() -> float:
    """CPU seconds used by all processes since boot."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))
