"""The only file that enqueues RQ jobs, and removes them when their client disconnects.

RQ's own commands are recorded on a pipeline that is never executed, and are sent with those of other requests of the same
moment as one MULTI. Used by `ActiveRequest`; that the model has workers was checked before. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import redis
from rq.job import Retry

from api.generation.command_batch import Command, CommandBatch, queue_unavailable
from common import connections, names, retention
from common.errors import MLXPoolError
from common.protocol import Cancel, GenerationJob, encode
from common.rq import JsonJob, JsonQueue
from common.settings import Settings

log = logging.getLogger(__name__)

JOB_SECONDS = 24 * 3600
"""RQ's limit on a job's execution; ours end by their tokens, their client or their lease."""

CANCEL_RETRY_SECONDS = 0.5
CLOSE_SECONDS = 2.0
MAX_CANCELS = 256

_LARGE_JOB_BYTES = 64 * 1024
"""RQ compresses a job; a larger one is compressed in a thread, to keep the event loop free."""

_MAX_QUEUES = 256
"""Queue objects in memory, one a model."""

_QUEUE_FULL, _QUEUED, _STORE_FULL = range(3)
"""What `_SUBMIT` replies first."""

# ARGV: queue, its maximum of requests and of tokens, the new jobs' number and tokens; then RQ's commands, each as its number
# of words and its words. A job id encodes the job's estimated tokens (`names.new_job_id`). An empty queue takes a request of
# any size. Reply: see above, and how many requests and tokens wait.
_CHECK_QUEUE = """
local queue, max_requests, max_tokens, own = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[5])
local num, tokens, i = redis.call('LLEN', queue), 0, 6
if num > 0 then
  if num + ARGV[4] > max_requests then return {0, num, 0} end
  for _, id in ipairs(redis.call('LRANGE', queue, 0, -1)) do
    tokens = tokens + (tonumber(string.sub(id, -6), 16) or 0)
  end
  if tokens + own > max_tokens then return {0, num, tokens} end
end
"""
_ENQUEUE = """
while i <= #ARGV do
  local last = i + ARGV[i]
  redis.call(unpack(ARGV, i + 1, last))
  i = last + 1
end
return {1, num, tokens}
"""
_SUBMIT = _CHECK_QUEUE + _ENQUEUE

# The same for a request whose answer is stored. Before RQ's commands: answer id, its bytes, the maximum of all stored bytes, the
# record's seconds to live, the number of words of its hash, and these.
_SUBMIT_STORED = f"""
{retention.STORE}
{_CHECK_QUEUE}
local answer, bytes, ttl, first = ARGV[6], tonumber(ARGV[7]), ARGV[9], 11
if not has_room(bytes, tonumber(ARGV[8])) then return {{2, num, tokens}} end
i = first + ARGV[10]
redis.call('HSET', answer_key(answer), unpack(ARGV, first, i - 1))
redis.call('EXPIRE', answer_key(answer), ttl)
redis.call('ZADD', EXPIRIES, now() + ttl, answer)
reserve(answer, bytes)
{_ENQUEUE}
"""


class QueueFullError(MLXPoolError):
    """The model's queue has reached its maximum of requests or tokens.

    Attributes:
        num_requests: Waiting in it.
        is_tokens: Whether it is the maximum of tokens.
    """

    def __init__(self, num_requests: int, *, is_tokens: bool) -> None:
        super().__init__("the queue is full")
        self.num_requests = num_requests
        self.is_tokens = is_tokens


class StoreFullError(MLXPoolError):
    """The answers that are stored for all clients take as many bytes as `MLXPOOL_MAX_STORED_MB` allows."""

    def __init__(self) -> None:
        super().__init__("the store of answers is full")


class NewRecord(NamedTuple):
    """The record of an answer, to be stored together with its jobs.

    Attributes:
        num_bytes: Reserved for it and for its jobs' journals, until their real size is known.
        ttl_seconds: Until one of its jobs starts.
        fields: Of the hash: names and values.
    """

    answer_id: str
    num_bytes: int
    ttl_seconds: int
    fields: dict[str, str | bytes | int]


class JobQueue:
    """See the module.

    Args:
        writes: With `transaction`.
    """

    def __init__(self, settings: Settings, writes: CommandBatch) -> None:
        self._settings = settings
        self._writes = writes
        self._recorder = connections.connect(settings.redis_url)  # records commands, never connects
        self._queues: dict[str, JsonQueue] = {}
        self._cancels: dict[str, GenerationJob] = {}  # by job id
        self._cancel_task: asyncio.Task[None] | None = None

    async def submit(
        self, jobs: list[GenerationJob], num_bytes: int = 0, record: NewRecord | None = None
    ) -> None:
        """Put the jobs of a request into their model's queue, all or none, and store the record of its answer, if there is one.

        Args:
            num_bytes: The approximate size of one job.

        Raises:
            QueueFullError: They are not in the queue; it is full.
            StoreFullError: They are not in the queue; the record does not fit into the store.
            RequestError: 503; Redis is unavailable. The jobs may be in the queue nevertheless: `cancel` them.
        """
        if num_bytes * len(jobs) > _LARGE_JOB_BYTES:
            commands = await asyncio.to_thread(self._record_all, jobs)
        else:
            commands = self._record_all(jobs)
        try:
            [[outcome, num_requests, num_tokens]] = await self._writes.execute(
                [self._guarded(jobs, commands, record)]
            )
        except (redis.RedisError, OSError) as error:
            log.warning("job %s cannot be queued: %s", jobs[0].job_id, error)
            raise queue_unavailable() from error
        if outcome == _STORE_FULL:
            raise StoreFullError
        if outcome == _QUEUE_FULL:
            raise QueueFullError(num_requests, is_tokens=num_tokens > 0)

    def _guarded(
        self, jobs: list[GenerationJob], commands: list[Command], record: NewRecord | None
    ) -> Command:
        """RQ's commands as one script, which does nothing if the queue or the store is full: one round trip, and no race."""
        limits = (self._settings.max_queued_requests, self._settings.max_queued_tokens)
        own = (len(jobs), sum(names.estimated_tokens(job.job_id) for job in jobs))
        words = [word for command in commands for word in (len(command), *command)]
        queue_key = self._queue(jobs[0].model).key
        if record is None:
            return ("EVAL", _SUBMIT, 0, queue_key, *limits, *own, *words)
        max_bytes = self._settings.max_stored_mb * 2**20
        fields = [word for field in record.fields.items() for word in field]
        stored = (record.answer_id, record.num_bytes, max_bytes, record.ttl_seconds, len(fields), *fields)
        return ("EVAL", _SUBMIT_STORED, 0, queue_key, *limits, *own, *stored, *words)

    def cancel(self, job: GenerationJob) -> None:
        """Cancel a job whose client has disconnected; it may have ended already. Sent in the background, and again until Redis accepts it."""
        self._cancels[job.job_id] = job
        if self._cancel_task is None or self._cancel_task.done():
            self._cancel_task = asyncio.create_task(self._send_cancels())

    async def close(self) -> None:
        """Send the remaining cancellations, within CLOSE_SECONDS."""
        if self._cancel_task is not None:
            await asyncio.wait([self._cancel_task], timeout=CLOSE_SECONDS)
            self._cancel_task.cancel()
        self._recorder.close()

    def _removal(self, job: GenerationJob) -> Command:
        queue_key = self._queue(job.model).key
        if job.answer_id is None or job.final_ttl_seconds is None:
            return ("LREM", queue_key, 1, job.job_id)
        return retention.cancel(
            job.answer_id, job.job_id, job.final_ttl_seconds, channel=job.channel, queue_key=queue_key
        )

    def _record_all(self, jobs: list[GenerationJob]) -> list[Command]:
        return [command for job in jobs for command in self._record(job)]

    def _record(self, job: GenerationJob) -> list[Command]:
        queue = self._queue(job.model)
        settings = self._settings
        rq_job = queue.create_job(
            names.JOB_FUNCTION,
            kwargs=msgspec.to_builtins(job, str_keys=True),
            job_id=job.job_id,
            timeout=JOB_SECONDS,
            ttl=settings.queue_seconds,
            result_ttl=settings.result_ttl_seconds,
            failure_ttl=settings.failure_ttl_seconds,
            # RQ's default is made from the arguments: the prompt would be in logs and in `rq info`.
            description=f"{job.prompt.__class__.__name__} for {job.model}",
            retry=Retry(max=settings.max_takeovers, enqueue_at_front=True)
            if settings.max_takeovers
            else None,
        )
        pipe = self._recorder.pipeline()
        queue.enqueue_job(rq_job, pipeline=pipe)
        return [args for args, _ in pipe.command_stack]

    def _queue(self, model: str) -> JsonQueue:
        queue = self._queues.get(model)
        if queue is None:
            if len(self._queues) >= _MAX_QUEUES:  # most are of models that are no longer served
                self._queues.clear()
            queue = self._queues[model] = JsonQueue(model, connection=self._recorder)
            # RQ 3.0 would ask the server, and block. It only selects the commands that dequeue, which are not used here.
            queue.redis_server_version = (7, 0, 0)
        return queue

    async def _send_cancels(self) -> None:
        while self._cancels:
            batch = dict(list(self._cancels.items())[:MAX_CANCELS])
            try:
                await self._send_cancel(batch)
            except (redis.RedisError, OSError) as error:
                log.warning("%d jobs cannot be cancelled yet, trying again: %s", len(batch), error)
                await asyncio.sleep(CANCEL_RETRY_SECONDS)
                continue
            for job_id in batch:
                self._cancels.pop(job_id, None)

    async def _send_cancel(self, batch: Mapping[str, GenerationJob]) -> None:
        """Remove from the queue, leave a mark for a worker that is just taking a job, notify those that run one.

        If the job's answer is stored, its journal says that it was cancelled; else nothing remains of a job that was queued.
        """
        commands: list[Command] = []
        by_model: dict[str, list[str]] = {}
        for job_id, job in batch.items():
            commands += [
                self._removal(job),
                ("SET", names.cancelled(job_id), 1, "EX", names.CANCEL_MARK_SECONDS),
            ]
            by_model.setdefault(job.model, []).append(job_id)
        for model, job_ids in by_model.items():
            commands.append(("PUBLISH", names.control_channel(model), encode(Cancel(job_ids))))
        replies: list[Any] = await self._writes.execute(commands)
        queued = [
            job_id for job_id, removed in zip(batch, replies[: 2 * len(batch) : 2], strict=True) if removed
        ]
        if queued:  # no worker has taken them, and none will
            await self._writes.execute([("DEL", *(JsonJob.key_for(job_id) for job_id in queued))])
