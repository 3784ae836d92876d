"""JobEnd: what RQ's books say once a job has ended here, and its slot given back.

One thread: RQ 3.0 has a single place for the job that was stopped on purpose, and each end takes a few round trips that
the generation loop must not wait for. Writes the one line that is logged for each request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import redis
from rq.exceptions import NoSuchJobError
from rq.executions import Execution

from common.protocol import Failed, Finished
from common.rq import JsonJob
from worker.loop.messages import JobEnd, Outcome

if TYPE_CHECKING:
    from worker.jobs.batch_worker import BatchWorker

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5


class Finalizer:
    """See the module.

    Args:
        inbox: Ends of jobs; None ends the thread.
        slots: Gets a permit back for each end.
        given_up: Asked while Redis is away; True leaves the books to others.
    """

    def __init__(
        self,
        worker: BatchWorker,
        *,
        inbox: SimpleQueue[JobEnd | None],
        slots: SimpleQueue[None],
        given_up: Callable[[], bool],
    ) -> None:
        self._worker = worker
        self._inbox = inbox
        self._slots = slots
        self._given_up = given_up

    def run(self) -> None:
        """Settle until None comes."""
        while (job_end := self._inbox.get()) is not None:
            try:
                self._settle(job_end)
            except Exception:
                # RQ's books of one job are not worth the others' tokens: its lease runs out.
                log.exception("job %s could not be settled", job_end.job_id)
                self._worker.forget_execution(job_end.execution_id)
            self._slots.put(None)
            log_end(job_end)

    def _settle(self, job_end: JobEnd) -> None:
        """Write the books; while Redis is away, again and again. Each of these is one transaction."""
        execution = self._worker.executions.get(job_end.execution_id)
        if execution is None:
            return
        while True:
            try:
                self._write(job_end, execution)
            except (redis.ConnectionError, redis.TimeoutError) as error:
                log.debug("job %s cannot be settled: %s", job_end.job_id, error)  # the heartbeat warns, once
                if self._given_up():
                    return
                time.sleep(_RETRY_SECONDS)
            else:
                self._worker.forget_execution(job_end.execution_id)
                return

    def _write(self, job_end: JobEnd, execution: Execution) -> None:
        """RQ's books for a job that ended here; may be called again after a lost connection.

        1. Fenced: another worker has the job; only our own list forgets it.
        2. The lease is gone: another worker has found, or will find, the job's end in its journal and write the books.
           After a lost connection it may also be that we have written them.
        3. The job is gone: somebody deleted it (`rq empty`, `Job.delete`); what is left of the execution goes too.
        4. A step failed with it: its lease is given up, and the next heartbeat's takeover does as if its worker had died.
        5. Else RQ's own handling of a success or a failure, or back to the front of the queue.

        Raises:
            redis.ConnectionError: Redis is away; nothing or all of it was written.
        """
        worker = self._worker
        if job_end.outcome is Outcome.FENCED or not worker.connection.exists(execution.key):
            worker.connection.srem(worker.executions_key, execution.composite_key)
            return
        if job_end.outcome is Outcome.CRASHED:
            worker.connection.delete(execution.key)
            worker.connection.srem(worker.executions_key, execution.composite_key)
            return
        try:
            job = JsonJob.fetch(job_end.job_id, connection=worker.connection)
        except NoSuchJobError:
            worker.drop_execution(JsonJob(job_end.job_id, connection=worker.connection), execution)
            return
        match job_end.outcome:
            case Outcome.FINISHED:
                worker.finish_job(job, execution, _result(job_end.terminal))
            case Outcome.REQUEUED:
                worker.requeue(job, execution)
            case _:
                reason = job_end.terminal.message if isinstance(job_end.terminal, Failed) else ""
                worker.fail_job(job, execution, reason, stopped=job_end.outcome is Outcome.STOPPED)


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
    Outcome.FINISHED: "finished before it began here",
    Outcome.FAILED: "failed before it began here",
    Outcome.STOPPED: "stopped before it began here",
    Outcome.FENCED: "its lease was lost, and it goes on with another",
    Outcome.REQUEUED: "handed over to another worker",
    Outcome.CRASHED: "a step failed with it, it is tried again",
}
"""How a job left that has no line of its own about tokens."""


def log_end(job_end: JobEnd) -> None:
    """One INFO line a request that ended here; never its text."""
    sequence, terminal = job_end.sequence, job_end.terminal
    if sequence is None or job_end.outcome in (Outcome.FENCED, Outcome.REQUEUED, Outcome.CRASHED):
        reason = f" ({terminal.message})" if isinstance(terminal, Failed) else ""
        log.info("job %s: %s%s", job_end.job_id, _ENDED[job_end.outcome], reason)
        return
    now = time.time()
    first = sequence.first_token_at or now
    tokens_per_second = (
        (sequence.num_generated_here - 1) / (now - first) if sequence.num_generated_here > 1 else 0.0
    )
    reason = (
        terminal.finish_reason
        if isinstance(terminal, Finished)
        else f"failed ({terminal.message})"
        if terminal
        else ""
    )
    log.info(
        "job %s: model %s, %d prompt tokens (%d cached), %d completion tokens, queued %.3f s, "
        "first token after %.3f s, %.1f tokens/s, %s",
        job_end.job_id,
        sequence.job.model,
        sequence.insert_result.prompt_tokens,
        sequence.insert_result.cached_tokens,
        sequence.num_tokens,
        max(0.0, sequence.admitted_at - sequence.job.submitted_at),
        max(0.0, first - sequence.admitted_at),
        tokens_per_second,
        reason,
    )
