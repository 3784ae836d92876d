"""Where the processes of a round run: those with the model on a few CPUs of their own, everything else on the others.

On a GPU a decode step of a small model waits for one core that feeds it, and which core that is can decide more than what is
compared: cores of a virtual machine are halves of real ones, of which somebody else may have the other half. So all
contenders of a round get the same CPUs, and each round gets others. Linux only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


class Placement:
    """See the module.

    Args:
        num_cpus: For the processes that run the model; 0: everything runs wherever it likes.
        models: Their process ids.
        others: Those of everything else that takes part.
    """

    def __init__(
        self, num_cpus: int, models: Callable[[], Iterable[int]], others: Callable[[], Iterable[int]]
    ) -> None:
        self._num_cpus = num_cpus
        self._models = models
        self._others = others
        self._cpus = sorted(os.sched_getaffinity(0)) if num_cpus else []

    def begin(self, number: int) -> None:
        """Place everybody for a round, by its number."""
        if not self._num_cpus:
            return
        first = number * self._num_cpus % (len(self._cpus) - self._num_cpus + 1)
        own = set(self._cpus[first : first + self._num_cpus])
        for pids, cpus in ((self._models(), own), (self._others(), set(self._cpus) - own)):
            for thread_id in (int(task.name) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()):
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread_id, cpus)
