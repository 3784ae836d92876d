"""The watchdog: progress, not pulse. A worker whose step hangs still beats, and would keep its leases for ever.

Called by the main thread at each heartbeat.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import time

log = logging.getLogger(__name__)

EXIT_STALLED = 4


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
