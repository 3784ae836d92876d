"""Finalizer: brings RQ's bookkeeping up to date once a job has ended here, and frees its slot.

One thread, fed by the generation loop: each end takes a few round trips that the loop must not wait for, and RQ 3.0 has a
single field for the job that was stopped on purpose. Logs the one INFO line of each request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, cast

import redis
from rq.exceptions import NoSuchJobError
from rq.executions import Execution
from rq.job import Job

from common import retention
from common.protocol import Failed, Finished
from common.rq import JsonJob
from worker.jobs.executions import Executions
from worker.loop.messages import JobEnd, Outcome

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5


class Finalizer:
    """See the module.

    Args:
        inbox: Ends of jobs; None ends the thread.
        slots: Receives a permit for each end.
        stop_waiting: Called while Redis is away; True leaves the bookkeeping to other workers.
    """

    def __init__(
        self,
        executions: Executions,
        *,
        inbox: SimpleQueue[JobEnd | None],
        slots: SimpleQueue[None],
        stop_waiting: Callable[[], bool],
    ) -> None:
        self._executions = executions
        self._inbox = inbox
        self._slots = slots
        self._stop_waiting = stop_waiting

    def run(self) -> None:
        """Finalize jobs until None arrives."""
        while (job_end := self._inbox.get()) is not None:
            try:
                self._finalize(job_end)
            except Exception:
                # Must not end the thread, and with it the other jobs: this one's lease runs out.
                log.exception("job %s could not be finalized", job_end.job_id)
                self._executions.forget(job_end.execution_id)
            self._slots.put(None)
            log_end(job_end)

    def _finalize(self, job_end: JobEnd) -> None:
        """Write RQ's bookkeeping, and try again while Redis is away. Each attempt writes all or nothing."""
        execution = self._executions.get(job_end.execution_id)
        if execution is None:
            return
        while True:
            try:
                self._write(job_end, execution)
            except (redis.ConnectionError, redis.TimeoutError) as error:
                log.debug("job %s cannot be finalized yet: %s", job_end.job_id, error)  # the heartbeat warns
                if self._stop_waiting():
                    return
                time.sleep(_RETRY_SECONDS)
            else:
                self._executions.forget(job_end.execution_id)
                return

    def _write(self, job_end: JobEnd, execution: Execution) -> None:
        """RQ's bookkeeping for a job that ended here; may be repeated after a lost connection.

        1. Fenced: another worker has the job; only this worker's own list changes.
        2. The lease is gone: another worker finds the end in the journal and does the bookkeeping. Or, after a lost
           connection, our previous attempt has done it.
        3. The job was deleted (`rq empty`, `Job.delete`): its execution is removed too.
        4. A step failed with it: its lease is ended, and the next takeover treats it as if its worker had died.
        5. Else RQ's own handling of a success or a failure, or back to the front of the queue. A stored answer gets its final time to
           live.

        Raises:
            redis.ConnectionError: Redis is away; nothing or all of it was written.
        """
        executions = self._executions
        if job_end.outcome is Outcome.FENCED or not executions.is_leased(execution):
            executions.disown(execution)
            return
        if job_end.outcome is Outcome.CRASHED:
            executions.expire(execution)
            return
        try:
            job = JsonJob.fetch(job_end.job_id, connection=executions.connection)
        except NoSuchJobError:
            executions.drop(JsonJob(job_end.job_id, connection=executions.connection), execution)
            return
        if job_end.terminal is not None:
            self._end_stored_answer(job_end, job)
        match job_end.outcome:
            case Outcome.FINISHED:
                executions.finish(job, execution, _result(job_end.terminal))
            case Outcome.REQUEUED:
                executions.requeue(job, execution)
            case _:
                reason = job_end.terminal.message if isinstance(job_end.terminal, Failed) else ""
                executions.fail(job, execution, reason, is_stopped=job_end.outcome is Outcome.STOPPED)

    def _end_stored_answer(self, job_end: JobEnd, job: Job) -> None:
        """Before RQ's bookkeeping: if this worker dies in between, another one does both again."""
        request = cast("JsonJob", job).request() if job_end.sequence is None else job_end.sequence.job
        if request.answer_id is not None and request.final_ttl_seconds is not None:
            command = retention.on_end(request.answer_id, request.job_id, request.final_ttl_seconds)
            self._executions.connection.execute_command(*command)


def _result(terminal: Finished | Failed | None) -> dict[str, Any]:
    """What RQ keeps of a finished request: counts, never text."""
    if not isinstance(terminal, Finished):
        return {}
    usage = terminal.usage
    return {
        "finish_reason": terminal.finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }


_ENDED = {
    Outcome.FINISHED: "finished by an earlier worker",
    Outcome.FAILED: "failed before it started here",
    Outcome.STOPPED: "stopped before it started here",
    Outcome.FENCED: "its lease was lost; another worker continues it",
    Outcome.REQUEUED: "requeued for another worker",
    Outcome.CRASHED: "a step of its batch failed; it is tried again",
}
"""Log text of ends without token counts of their own."""


def log_end(job_end: JobEnd) -> None:
    """Log one INFO line for a request that ended here; never its text."""
    sequence, terminal = job_end.sequence, job_end.terminal
    if sequence is None or job_end.outcome in (Outcome.FENCED, Outcome.REQUEUED, Outcome.CRASHED):
        reason = f" ({terminal.message})" if isinstance(terminal, Failed) else ""
        log.info("job %s: %s%s", job_end.job_id, _ENDED[job_end.outcome], reason)
        return
    now_at = time.time()
    first_token_at = sequence.first_token_at or now_at
    tokens_per_second = (
        (sequence.num_generated_here - 1) / (now_at - first_token_at)
        if sequence.num_generated_here > 1
        else 0.0
    )
    reason = (
        terminal.finish_reason
        if isinstance(terminal, Finished)
        else f"failed ({terminal.message})"
        if terminal
        else ""
    )
    log.info(
        "job %s: model %s, key %s, %d prompt tokens (%d cached), %d completion tokens, queued %.3f s, "
        "first token after %.3f s, %.1f tokens/s, %s",
        job_end.job_id,
        sequence.job.model,
        sequence.job.api_key_name or "-",
        sequence.insert_result.prompt_tokens,
        sequence.insert_result.cached_tokens,
        sequence.num_tokens,
        max(0.0, sequence.admitted_at - sequence.job.submitted_at),
        max(0.0, first_token_at - sequence.admitted_at),
        tokens_per_second,
        reason,
    )
