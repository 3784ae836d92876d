"""What a thread is doing for a job, and since when. The thread records it; the watchdog reads it.

A worker whose driver, tokenizer or template hangs still sends heartbeats, and would keep its leases for ever. Waiting, for
messages or for Redis, is not recorded. Independent of MLX, RQ and Redis.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Self


class Work(NamedTuple):
    """One piece of work that is expected to end in about a second.

    Attributes:
        what: Such as "step".
        job_id: The job it is for; "": several.
    """

    what: str
    began_mono: float
    job_id: str = ""


class Progress:
    """See the module. Written by one thread.

    Attributes:
        thread: The thread's name.
        work: The work under way; None: none.
    """

    def __init__(self, thread: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.thread = thread
        self.work: Work | None = None
        self._clock = clock

    def on(self, what: str, job_id: str = "") -> Self:
        """Record the work that the `with` block does. Not nested."""
        self.work = Work(what, self._clock(), job_id)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.work = None
