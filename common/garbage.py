"""Python's garbage collector, kept from scanning what a process has loaded and never frees."""

from __future__ import annotations

import gc

_RARE_THRESHOLD = 10_000


def freeze_loaded_objects() -> None:
    """Exclude all present objects from future collections; called once, when a process is about to serve.

    A full collection scans every object of every module, and stops all threads meanwhile: 260 ms if torch is installed next to
    transformers.
    """
    gc.collect()
    gc.freeze()


def collect_rarely() -> None:
    """Collect after 10,000 more objects than were freed, not after 700; called once, in a process that leaves few cycles behind.

    A worker's step creates some objects for each of its sequences and frees them again. With Python's threshold those of 128
    sequences ran a collection every 12 steps, and each tenth of them took 1.5 to 1.8 ms, a third of a step.
    """
    gc.set_threshold(_RARE_THRESHOLD, *gc.get_threshold()[1:])
