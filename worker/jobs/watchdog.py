"""What ends a worker that is of no more use, so that others take its jobs over: a thread that failed, a step that hangs.

Progress counts, not pulse: a worker whose step hangs still beats, and would keep its leases for ever. Called by the main
thread.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import time
from collections.abc import Callable
from threading import Thread

log = logging.getLogger(__name__)

EXIT_THREAD_FAILED = 3
EXIT_STALLED = 4


def start_thread(name: str, target: Callable[[], None]) -> Thread:
    """Start a thread of this process; should it fail, the process ends: others take its jobs over."""

    def run() -> None:
        try:
            target()
        except BaseException as error:
            # A worker with a thread less is worse than none.
            log.critical("the %s thread failed", name, exc_info=error)
            os._exit(EXIT_THREAD_FAILED)

    thread = Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def end_if_stuck(step_began_at: float | None, stall_seconds: float) -> None:
    """End this process if a step does not come back: one that hangs in a driver cannot be stopped otherwise.

    Reading a long prompt comes back about every second, and waiting for Redis is no step.

    Args:
        step_began_at: Monotonic seconds; None between steps.
    """
    if step_began_at is None or time.monotonic() - step_began_at <= stall_seconds:
        return
    log.critical("a step has taken more than %g s: this worker ends itself", stall_seconds)
    faulthandler.dump_traceback()
    os._exit(EXIT_STALLED)
