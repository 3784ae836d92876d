"""The executions of this worker: which jobs it holds a lease for, and RQ's bookkeeping of their start and end.

An execution's key in Redis is the lease. Intake starts executions, the finalizer ends them, heartbeats renew those that are
listed here. Wraps RQ's worker (`rq.worker.base.BaseWorker`) without depending on the batch worker that owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import redis
from rq.executions import Execution
from rq.job import Job
from rq.utils import now
from rq.worker import WorkerStatus
from rq.worker.base import BaseWorker

from common.rq import JsonQueue
from worker.jobs.scripts import RUN_RECORDED, record

if TYPE_CHECKING:
    from redis.client import Pipeline

BACKSTOP_SECONDS = 3600
"""Lifetime of an execution in RQ's registries: so long that RQ's cleaners, which go by local clocks, never declare one
abandoned. The real lease is the time to live of the execution's key."""

# ARGV: the execution's key, then recorded commands. Returns whether they were run.
_IF_LEASED = f"""
if redis.call('EXISTS', ARGV[1]) == 0 then return 0 end
local i = 2
{RUN_RECORDED}
return failure or 1
"""


class Executions:
    """See the module.

    Attributes:
        connection: Redis.
        queue: The model's.

    Args:
        worker: RQ's worker. Its table of executions is used, so that RQ's own code sees the same.
        lease_ms: Lifetime of a lease that is not renewed.
        live_ttl_seconds: Time to live of a job while it is queued or running.
        on_empty: Called when the last execution has ended.
    """

    def __init__(
        self,
        worker: BaseWorker,
        queue: JsonQueue,
        *,
        lease_ms: int,
        live_ttl_seconds: int,
        on_empty: Callable[[], None],
    ) -> None:
        self.connection: redis.Redis = queue.connection
        self.queue = queue
        self._worker = worker
        self._lease_ms = lease_ms
        self._live_ttl_seconds = live_ttl_seconds
        self._on_empty = on_empty

    def __len__(self) -> int:
        return len(self._worker.executions)

    def __contains__(self, execution: Execution) -> bool:
        return execution.id in self._worker.executions

    def held(self) -> list[Execution]:
        """All executions of this worker; a copy, since other threads start and end some."""
        return list(self._worker.executions.values())

    def get(self, execution_id: str) -> Execution | None:
        """An execution of this worker; None if it has ended."""
        return self._worker.executions.get(execution_id)

    def start(self, job: Job, pipe: Pipeline) -> Execution:
        """Record on `pipe` that `job` runs here, under a lease. From now on heartbeats renew it.

        Raises:
            UnicodeEncodeError: A command cannot be encoded. Nothing was recorded, so the other jobs of `pipe` are unaffected.
            redis.DataError: The same.
        """
        own = self.connection.pipeline()
        execution = Execution.create(job, BACKSTOP_SECONDS, pipeline=own, worker_name=self._worker.name)
        own.pexpire(execution.key, self._lease_ms)
        job.prepare_for_execution(self._worker.name, pipeline=own)
        own.expire(job.key, self._live_ttl_seconds)  # RQ makes it permanent; it holds the prompt
        encode = self.connection.get_encoder().encode
        commands = [([encode(word) for word in words], options) for words, options in own.command_stack]  # type: ignore[no-untyped-call]
        for words, options in commands:
            pipe.execute_command(*words, **options)
        self._worker.executions[execution.id] = execution
        self._worker.set_state(WorkerStatus.BUSY, pipeline=pipe)
        return execution

    def renew(self, execution: Execution, pipe: Pipeline) -> None:
        """Record on `pipe` that the lease is renewed. The reply is 0 if it has run out already."""
        pipe.pexpire(execution.key, self._lease_ms)  # NOTE: never a command that would create the key again

    def forget(self, execution_id: str) -> None:
        """Stop renewing a lease."""
        self._worker.executions.pop(execution_id, None)
        if not self._worker.executions:
            self._on_empty()

    def is_leased(self, execution: Execution) -> bool:
        """Whether the lease still exists in Redis."""
        return bool(self.connection.exists(execution.key))

    def drop(self, job: Job, execution: Execution) -> None:
        """Undo a registration: another worker has the job, or it was deleted."""
        with self.connection.pipeline() as pipe:
            self._worker.cleanup_execution(job, pipe, execution)
            pipe.execute()

    def disown(self, execution: Execution) -> None:
        """Remove an execution from RQ's list of this worker's; the worker that holds the job now does the rest."""
        self.connection.srem(self._worker.executions_key, execution.composite_key)

    def expire(self, execution: Execution) -> None:
        """End the lease now: the next takeover treats the job as if its worker had died."""
        self.connection.delete(execution.key)
        self.disown(execution)

    def finish(self, job: Job, execution: Execution, result: dict[str, Any]) -> None:
        """RQ's bookkeeping of a success."""
        job.ended_at = now()
        job._result = result  # noqa: SLF001 (as RQ 3.0 does before it saves)
        self._worker.handle_job_success(job, self.queue, self.queue.started_job_registry, execution)

    def fail(self, job: Job, execution: Execution | None, reason: str, *, is_stopped: bool = False) -> None:
        """RQ's bookkeeping of a failure that is the request's own: the job is not tried again."""
        job.ended_at = now()
        job.retries_left = None
        if is_stopped:
            self._worker._stopped_job_id = job.id  # noqa: SLF001 (RQ 3.0 has no parameter for it)
        self._worker.handle_job_failure(job, self.queue, exc_string=reason, execution=execution)

    def requeue(self, job: Job, execution: Execution, fields: Mapping[Any, Any] | None = None) -> bool:
        """Put a job back in front of the queue, once.

        Args:
            fields: Written to the job's hash, next to RQ's fields.

        Returns:
            False if its lease is gone: nothing was written.
        """

        def write(pipe: Pipeline) -> None:
            execution.delete(job=job, pipeline=pipe)
            if fields:
                pipe.hset(job.key, mapping=fields)
            self.queue.put_back(job, pipe, self._live_ttl_seconds)

        commands = record(self.connection, write)
        return bool(self.connection.eval(_IF_LEASED, 0, execution.key, *commands))
