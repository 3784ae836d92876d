"""Ends a worker that can no longer serve, so that others take its jobs over: one of its threads failed or hangs.

Progress counts, not heartbeats: a worker with a hanging step still sends them, and would keep its leases for ever. Called by
the main thread.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import time
from collections.abc import Callable, Iterable
from threading import Thread

from worker.loop.progress import Progress, Work

log = logging.getLogger(__name__)

EXIT_THREAD_FAILED = 3
EXIT_STALLED = 4


def start_thread(name: str, target: Callable[[], None]) -> Thread:
    """Start a thread of this process. If it fails, the process ends, and others take its jobs over."""

    def run() -> None:
        try:
            target()
        except BaseException as error:
            # A worker with a thread missing is worse than none.
            log.critical("the %s thread failed", name, exc_info=error)
            os._exit(EXIT_THREAD_FAILED)

    thread = Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def find_stalled(
    progresses: Iterable[Progress], stall_seconds: float, now_mono: float
) -> tuple[Progress, Work] | None:
    """The first thread whose work has taken longer than `stall_seconds`."""
    for progress in progresses:
        work = progress.work
        if work is not None and now_mono - work.began_mono > stall_seconds:
            return progress, work
    return None


def end_if_stalled(progresses: Iterable[Progress], stall_seconds: float) -> None:
    """End this process if one of its threads hangs: a call that hangs in a driver cannot be interrupted.

    Each job that is held here gets one more crash unless it has a new token, so a job that stalls each of its workers fails in
    the end. Prefilling a long prompt returns about every second, and waiting for Redis is not work.
    """
    stalled = find_stalled(progresses, stall_seconds, time.monotonic())
    if stalled is None:
        return
    progress, work = stalled
    log.critical(
        "the %s thread has spent more than %g s on one %s%s: this worker ends itself",
        progress.thread,
        stall_seconds,
        work.what,
        f" (job {work.job_id})" if work.job_id else "",
    )
    faulthandler.dump_traceback()
    os._exit(EXIT_STALLED)
