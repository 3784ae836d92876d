"""CPU affinity of a round's processes: those that run the model get a few CPUs of their own, everything else the others.

On a GPU a decode step of a small model is bound by the one core that launches its kernels, and which core that is can matter more
than what is compared: a virtual machine's cores are hyper-threads, whose siblings other machines may use. So all contenders
of a round get the same CPUs, and each round gets different ones. Linux only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


class Placement:
    """See the module.

    Args:
        num_cpus: For the processes that run the model; 0: no affinity is set.
        models: Returns their process ids.
        others: Returns the process ids of everything else that takes part.
    """

    def __init__(
        self, num_cpus: int, models: Callable[[], Iterable[int]], others: Callable[[], Iterable[int]]
    ) -> None:
        self._num_cpus = num_cpus
        self._models = models
        self._others = others
        self._cpus = sorted(os.sched_getaffinity(0)) if num_cpus else []

    def begin(self, number: int) -> None:
        """Set the affinities for a round."""
        if not self._num_cpus:
            return
        first = number * self._num_cpus % (len(self._cpus) - self._num_cpus + 1)
        own = set(self._cpus[first : first + self._num_cpus])
        for pids, cpus in ((self._models(), own), (self._others(), set(self._cpus) - own)):
            for thread_id in (int(task.name) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()):
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread_id, cpus)
