"""Aborts of jobs that the generation loop does not have: a job may still be on its way from intake.

Owned by the loop, on its thread. Cancellations are broadcast to all workers of the model, so most of these jobs are other workers': each
abort is kept for a while, and there is a maximum of them.
"""

from __future__ import annotations

from collections.abc import Callable

from worker.loop.messages import AbortReason

EARLY_ABORT_SECONDS = 30.0
"""How long an abort is kept."""

MAX_EARLY_ABORTS = 10_000
"""How many are kept; beyond that, the oldest are dropped."""


class EarlyAborts:
    """See the module; `len()` is their number.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._aborts: dict[
            str, tuple[AbortReason, float]
        ] = {}  # by job id, with monotonic seconds, oldest first

    def __len__(self) -> int:
        return len(self._aborts)

    def record(self, job_id: str, reason: AbortReason) -> None:
        """Keep the abort of an unknown job, if it ends the job wherever it is."""
        now_mono = self._clock()
        while self._aborts and (
            len(self._aborts) >= MAX_EARLY_ABORTS
            or now_mono - next(iter(self._aborts.values()))[1] >= EARLY_ABORT_SECONDS
        ):
            del self._aborts[next(iter(self._aborts))]
        if reason in (AbortReason.CANCELLED, AbortReason.STOPPED):
            self._aborts[job_id] = (reason, now_mono)

    def pop(self, job_id: str) -> AbortReason | None:
        """Remove a job's abort and return its reason; None if there is none."""
        abort = self._aborts.pop(job_id, None)
        return None if abort is None else abort[0]
