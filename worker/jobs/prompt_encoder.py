"""Turns the prompts of registered jobs into token ids, or requeues a job whose prompt is too long for this worker only.

Used by intake, on its thread. Other workers of the model may have longer contexts: unequal Macs, or shares of memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from rq.executions import Execution

from common.errors import RequestError
from common.protocol import Event, GenerationJob
from common.rq import JsonJob
from worker.jobs.executions import Executions
from worker.jobs.peers import max_context_length
from worker.jobs.records import MIN_CONTEXT_FIELD, has_ended
from worker.loop.progress import Progress

log = logging.getLogger(__name__)

_TOO_LONG = "context_length_exceeded"
"""Code of the error of a prompt that is longer than the context."""

_CONTEXT_LOST = RequestError(
    "The worker that began this answer is gone, and the prompt is too long for the remaining workers.",
    status=503,
    type="server_error",
    code="worker_lost",
)


class RegisteredJob(NamedTuple):
    """A job that this worker has an execution of."""

    raw_id: bytes
    job: JsonJob
    execution: Execution
    request: GenerationJob
    journal: list[Event]
    is_poison_candidate: bool


class PromptEncoder:
    """See the module.

    Attributes:
        context_length: This worker's, in tokens.
        progress: The prompt that is being encoded, for the watchdog.

    Args:
        encode: `Engine.encode`.
    """

    def __init__(
        self, executions: Executions, encode: Callable[[GenerationJob], list[int]], context_length: int
    ) -> None:
        self._executions = executions
        self._encode = encode
        self.context_length = context_length
        self.progress = Progress("intake")

    def encode(self, registered: RegisteredJob) -> list[int] | RequestError | None:
        """The prompt's token ids, or why there are none; None if the job was put back for a worker with a longer context."""
        if has_ended(registered.journal):  # only RQ's bookkeeping is left
            return []
        request = registered.request
        try:
            with self.progress.on("prompt", request.job_id):
                return self._encode(request)
        except RequestError as error:
            if error.code != _TOO_LONG:
                return error
            if self._requeue_for_longer_context(registered):
                return None
            return _CONTEXT_LOST if registered.journal else error
        except Exception:
            log.exception("the prompt of job %s cannot be encoded", request.job_id)
            return RequestError("The model cannot process this prompt.", status=500, type="server_error")

    def longest_live_context(self) -> int:
        """The longest context, in tokens, of the live workers of the model, this one included."""
        return max_context_length(self._executions.connection, self._executions.queue.name)

    def _requeue_for_longer_context(self, registered: RegisteredJob) -> bool:
        """Put a job back that is too long for this worker, if a live worker of the model has a longer context.

        The job's hash then says which context it needs at least. The value only grows, and workers with a shorter context leave
        the job alone, so it visits each worker at most once.
        """
        job_id, execution = registered.job.id, registered.execution
        try:
            if self.longest_live_context() <= self.context_length:
                return False
            fields = {MIN_CONTEXT_FIELD: self.context_length + 1}
            if self._executions.requeue(registered.job, execution, fields):
                log.info(
                    "job %s: requeued for a worker with a context of more than %d tokens",
                    job_id,
                    self.context_length,
                )
        except Exception as error:  # noqa: BLE001 (RQ may raise anything)
            # NOTE: must not end the hand-over of the jobs after this one, whose leases are renewed already.
            log.warning("job %s cannot be requeued (%s): its lease runs out", job_id, error)
        self._executions.forget(execution.id)
        return True
