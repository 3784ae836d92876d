"""CPU affinity of a round's processes: those that run the model get a few CPUs of their own, everything else the others.

On a GPU a decode step of a small model is bound by the one core that launches its kernels, and which core that is can matter more
than what is compared: a virtual machine's cores are hyper-threads, whose siblings other machines may use. So all contenders
of a round get the same CPUs, and each round gets different ones. No two of these CPUs are
siblings, and those siblings that the system names stay idle: a busy one makes Python and kernel launches a fifth to a third slower.
Linux only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

_SIBLINGS = "/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"


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
        own = spread(self._cpus, self._num_cpus, number)
        rest = without_siblings(self._cpus, own, {cpu: siblings(cpu) for cpu in own})
        for pids, cpus in ((self._models(), own), (self._others(), rest)):
            for thread_id in (int(task.name) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()):
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread_id, cpus)


def spread(cpus: Sequence[int], num: int, number: int) -> set[int]:
    """`num` of the CPUs, every third one: siblings are mostly neighbors, or half of all CPUs apart.

    Args:
        number: The round's; each round begins at another CPU.
    """
    first = number % len(cpus)
    rotated = [*cpus[first:], *cpus[:first]]
    return set([*rotated[::3], *rotated[1::3], *rotated[2::3]][:num])


def without_siblings(cpus: Sequence[int], own: set[int], known: dict[int, set[int]]) -> set[int]:
    """The CPUs for everything else: without `own` and their siblings, or with the siblings if nothing else is left."""
    taken = own.union(*known.values())
    return set(cpus) - taken or set(cpus) - own or set(cpus)


def siblings(cpu: int) -> set[int]:
    """The hyper-threads of the same core as far as the system knows them, `cpu` included."""
    try:
        text = Path(_SIBLINGS.format(cpu=cpu)).read_text()
    except OSError:
        return {cpu}
    found = {cpu}
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
