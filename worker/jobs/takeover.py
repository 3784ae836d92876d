"""Takeover: puts the jobs of workers that have died or hung back in front of the queue, each exactly once.

Called by the worker's main thread with each heartbeat. A worker counts as dead once the lease of its execution has run out, by
Redis's clock. RQ's own cleaners go by local clocks and may run twice at once, so their deadline is kept far away.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution, ExecutionRegistry
from rq.job import JobStatus

from common import names, retention
from common.errors import RequestError
from common.protocol import encode
from common.rq import ForeignJobError, JsonJob, JsonQueue
from worker.jobs.records import (
    CRASHES_FIELD,
    LAST_N_FIELD,
    CrashCount,
    cancellation,
    guard_against_job,
    has_ended,
    read_crash_count,
    read_journal,
    restore_job,
)
from worker.jobs.scripts import RETURN_TO_QUEUE, RUN_RECORDED, record
from worker.loop.sequence import failed_event

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger(__name__)

RESCUE_AFTER_SECONDS = 2.0
"""How long an id may stay in the intermediate queue; a live worker needs milliseconds."""

JOBS_PER_BATCH = 16
"""Jobs that are taken over in two round trips. They are read completely, and a prompt may be megabytes."""

_NO_SUCH_KEY = -2
"""PTTL's reply."""

_STATE_FIELDS = ("status", "retries_left", CRASHES_FIELD, LAST_N_FIELD)
"""The fields of a job's hash that a takeover is decided by, as is the length of its journal."""

_GONE, _CHANGED, _RUNS_ELSEWHERE, _DONE = range(4)
"""Replies of the script."""

# ARGV: the registry, its entry, the execution's key, the job's key, its journal, the key of its executions, the execution's id, the queue;
# the values of _STATE_FIELDS ('': missing) and the journal's length that the decision was made by; then recorded commands.
# The worker that removes the entry has taken the job over; no other one can. All that may fail on a key of another type comes
# before that, so that no job is lost. Returns a reply above, or the text of the first error of the recorded commands.
_TAKE_OVER = f"""
local registry, entry, execution, job, journal, executions, id, queue = unpack(ARGV, 1, 8)
if redis.call('EXISTS', execution) == 1 or not redis.call('ZSCORE', registry, entry) then return {_GONE} end
local state = redis.call('HMGET', job, '{"', '".join(_STATE_FIELDS)}')
for k = 1, 4 do
  if (state[k] or '') ~= ARGV[8 + k] then return {_CHANGED} end
end
if redis.call('XLEN', journal) ~= tonumber(ARGV[13]) then return {_CHANGED} end
redis.call('LLEN', queue)
if redis.call('TYPE', executions).ok ~= 'zset' then redis.call('DEL', executions) end
redis.call('ZREM', registry, entry)
redis.call('ZREM', executions, id)
local prefix = string.sub(execution, 1, -1 - string.len(id))
for _, other in ipairs(redis.call('ZRANGE', executions, 0, -1)) do
  if redis.call('EXISTS', prefix .. other) == 1 then return {_RUNS_ELSEWHERE} end
end
local i = 14
{RUN_RECORDED}
return failure and failure.err or {_DONE}
"""

_LOST = RequestError(
    "The workers that tried to answer this request stopped one after another; it is not tried again.",
    status=500,
    type="server_error",
    code="worker_lost",
)


class DeadExecution(NamedTuple):
    """An execution whose lease has run out, and what Redis has of its job.

    Attributes:
        entry: Its entry in RQ's registry.
        fields: The job's hash; empty: it was deleted.
        num_events: The length of its journal.
        last: The last entry of its journal, if there is one.
        is_cancelled: Whether its client has left.
    """

    entry: str
    execution: Execution
    fields: dict[bytes, bytes]
    num_events: int
    last: list[Any]
    is_cancelled: int

    @property
    def state(self) -> list[bytes | int]:
        """What the script compares, see _TAKE_OVER."""
        return [*(self.fields.get(name.encode(), b"") for name in _STATE_FIELDS), self.num_events]


_NUM_READS = 4
"""Replies per job, see `Takeover._read`."""


class Plan(NamedTuple):
    """What is done with a job.

    Attributes:
        commands: For the script that takes the job over.
        outcome: The end of its log line; "": nothing is logged.
        after: A script to run once the job was taken over, since a script cannot call another one.
    """

    commands: list[Any]
    outcome: str = ""
    after: retention.Command | None = None


class Takeover:
    """See the module.

    Args:
        live_ttl_seconds: A queued job's time to live.
        final_ttl_seconds: A journal's time to live after its terminal event.
        max_seconds: Begin no further batch after this time: this worker's own leases are not renewed meanwhile.
    """

    def __init__(
        self, queue: JsonQueue, *, live_ttl_seconds: int, final_ttl_seconds: int, max_seconds: float
    ) -> None:
        self._queue = queue
        self._redis: redis.Redis = queue.connection
        self._registry_key: str = queue.started_job_registry.key
        self._live_ttl_seconds = live_ttl_seconds
        self._final_ttl_seconds = final_ttl_seconds
        self._max_seconds = max_seconds
        self._first_seen_mono: dict[bytes, float] = {}

    def run(self) -> float:
        """Look once for jobs without a worker and put them back into the queue.

        Returns:
            Seconds until the next lease runs out unless it is renewed: the best time to look again. 0 if some jobs are left for
            the next call.
        """
        next_seconds = self._take_over_all()
        self._rescue()
        return next_seconds

    def _take_over_all(self) -> float:
        """Take over the executions whose lease has run out. Returns as `run`."""
        deadline_mono = time.monotonic() + self._max_seconds
        registered: Any = self._redis.zrange(self._registry_key, 0, -1)
        entries = [entry.decode() for entry in registered if entry.isascii()]  # RQ's are ASCII
        if not entries:
            return math.inf
        with self._redis.pipeline(transaction=False) as pipe:
            for entry in entries:
                pipe.pttl(_execution_key(entry))
            leases_ms = pipe.execute()
        expired = [entry for entry, ms in zip(entries, leases_ms, strict=True) if ms == _NO_SUCH_KEY]
        for start in range(0, len(expired), JOBS_PER_BATCH):
            is_complete = self._take_over(expired[start : start + JOBS_PER_BATCH])
            is_last = start + JOBS_PER_BATCH >= len(expired)
            if not is_complete or (not is_last and time.monotonic() >= deadline_mono):
                return 0.0
        return min((ms / 1000 for ms in leases_ms if ms >= 0), default=math.inf)

    def _take_over(self, entries: list[str]) -> bool:
        """Take over a batch of executions, in two round trips: read, then decide and write.

        Returns:
            Whether all were decided; False if a job changed between the two, so that it has to be looked at again.

        Raises:
            redis.RedisError: Redis is away or refuses to write. What was not taken over still is in the registry.
        """
        plans: list[tuple[DeadExecution, Plan]] = []
        for dead in self._read(entries):
            try:
                with guard_against_job():
                    plans.append((dead, self._plan(dead)))
            except ForeignJobError as error:
                self._drop(dead.entry, error)
        if not plans:
            return True
        with self._redis.pipeline(transaction=False) as pipe:
            for dead, plan in plans:
                pipe.eval(_TAKE_OVER, 0, *self._script_arguments(dead), *plan.commands)
            replies = pipe.execute(raise_on_error=False)
        for (dead, plan), reply in zip(plans, replies, strict=True):
            if isinstance(reply, bytes) or _is_wrong_type(reply):
                reason = reply.decode(errors="replace") if isinstance(reply, bytes) else reply
                log.error("job %s: its takeover failed: %s", dead.execution.job_id[:80], reason)
            elif isinstance(reply, Exception):
                raise reply
            elif reply == _DONE and plan.outcome:
                log.warning("job %s: its worker died or hung; %s", dead.execution.job_id[:80], plan.outcome)
                if plan.after is not None:
                    self._redis.execute_command(*plan.after)
        return _CHANGED not in replies

    def _read(self, entries: list[str]) -> list[DeadExecution]:
        """Read what Redis has of the jobs of `entries`; entries that are not RQ's are dropped."""
        executions: dict[str, Execution] = {}
        for entry in entries:
            try:
                executions[entry] = Execution.from_composite_key(entry, self._redis)
            except ValueError as error:
                self._drop(entry, error)
        with self._redis.pipeline(transaction=False) as pipe:
            for execution in executions.values():
                pipe.hgetall(JsonJob.key_for(execution.job_id))
                pipe.xlen(names.journal(execution.job_id))
                pipe.xrevrange(names.journal(execution.job_id), count=1)
                pipe.exists(names.cancelled(execution.job_id))
            replies = pipe.execute(raise_on_error=False)
        dead = []
        for i, (entry, execution) in enumerate(executions.items()):
            read = replies[_NUM_READS * i : _NUM_READS * (i + 1)]
            failure = next((reply for reply in read if isinstance(reply, Exception)), None)
            if failure is None:
                dead.append(DeadExecution(entry, execution, *read))
            elif _is_wrong_type(failure):
                self._drop(entry, failure)
            else:
                raise failure
        return dead

    def _drop(self, entry: str, error: Exception) -> None:
        """Remove an invalid entry, or that of an invalid job, from the registry."""
        log.error("%s: %s; it is removed from the registry", entry[:80], error)
        self._redis.zrem(self._registry_key, entry)

    def _script_arguments(self, dead: DeadExecution) -> list[Any]:
        job_id = dead.execution.job_id
        executions_key = ExecutionRegistry(job_id, self._redis).key
        keys = (dead.execution.key, JsonJob.key_for(job_id), names.journal(job_id), executions_key)
        return [self._registry_key, dead.entry, *keys, dead.execution.id, self._queue.key, *dead.state]

    def _plan(self, dead: DeadExecution) -> Plan:
        """Decide what becomes of a job. That it runs under no other execution is checked by the script.

        1. It was deleted, or RQ does not count it as running: only the entry is removed.
        2. Its client has left: it is deleted, as intake would do; if its answer is stored, its journal says that it was cancelled.
        3. Its journal has a terminal event: only RQ's bookkeeping is missing; the worker that takes it does that.
        4. Else it is tried again, as often in a row as its retries allow. An execution that generated a new token restarts the
           count: this job did not kill its worker.
        5. No tries are left: it fails.

        Raises:
            ForeignJobError: The job's hash or journal cannot be read.
        """
        has_answer = has_ended(read_journal(dead.last))
        if not dead.fields:
            return Plan([])
        job = restore_job(dead.execution.job_id, dead.fields, self._redis)
        if job.get_status(refresh=False) != JobStatus.STARTED:
            return Plan([])
        if dead.is_cancelled:
            commands = record(self._redis, lambda pipe: pipe.delete(job.key))
            return Plan(commands, "its client has left, so it is deleted", cancellation(job))
        if has_answer:
            commands = record(self._redis, lambda pipe: self._put_back(job, pipe))
            return Plan(commands, "its answer is complete, and another worker does RQ's bookkeeping")
        crashes = read_crash_count(dead.fields)
        num_allowed = (job.retries_left or 0) + crashes.num
        crashes = crashes.after_death(dead.num_events)
        if crashes.num > num_allowed:
            commands = record(self._redis, lambda pipe: self._fail(pipe, job, dead.num_events))
            return Plan(commands, "no takeovers are left, so it fails", _stored_end(job))
        job.retries_left = num_allowed - crashes.num
        commands = record(self._redis, lambda pipe: self._put_back(job, pipe, crashes))
        return Plan(commands, "it is back in front of the queue")

    def _put_back(self, job: JsonJob, pipe: Pipeline, crashes: CrashCount | None = None) -> None:
        if crashes is not None:
            pipe.hset(job.key, mapping={CRASHES_FIELD: crashes.num, LAST_N_FIELD: crashes.last_n})
        self._queue.put_back(job, pipe, self._live_ttl_seconds)

    def _fail(self, pipe: Pipeline, job: JsonJob, num_events: int) -> None:
        """Record RQ's bookkeeping of a failure and the terminal event."""
        job.set_status(JobStatus.FAILED, pipeline=pipe)
        job._handle_failure(_LOST.message, pipe)  # noqa: SLF001 (RQ 3.0 has no public method that takes a pipeline)
        try:
            request = job.request()
        except ForeignJobError as error:
            log.warning("job %s: %s", job.id, error)
            return
        event = encode(failed_event(num_events + 1, _LOST))
        journal_key = names.journal(job.id)
        pipe.xadd(journal_key, {"x": "", "d": event}, id=f"{num_events + 1}-0")
        pipe.expire(journal_key, request.final_ttl_seconds or self._final_ttl_seconds)
        pipe.publish(request.channel, b'[["' + job.id.encode() + b'",' + event + b"]]")

    def _rescue(self) -> None:
        """Put back what a worker took from the queue and never registered: it died in between, or its machine sleeps."""
        intermediate = self._queue.intermediate_queue
        ids: Any = self._redis.lrange(intermediate.key, 0, -1)
        now_mono = time.monotonic()
        self._first_seen_mono = {job_id: self._first_seen_mono.get(job_id, now_mono) for job_id in ids}
        overdue = [
            job_id
            for job_id, first_seen_mono in self._first_seen_mono.items()
            if now_mono - first_seen_mono >= RESCUE_AFTER_SECONDS
        ]
        if not overdue:
            return
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in overdue:
                pipe.eval(RETURN_TO_QUEUE, 2, intermediate.key, self._queue.key, job_id)
            for job_id, is_returned in zip(overdue, pipe.execute(), strict=True):
                if is_returned:
                    log.warning(
                        "job %s was taken and never started; it is back in front of the queue", job_id
                    )


def _stored_end(job: JsonJob) -> retention.Command | None:
    """The command that records the end of a job, if its answer is stored; None otherwise, or if the job cannot be decoded."""
    try:
        request = job.request()
    except ForeignJobError:
        return None
    if request.answer_id is None or request.final_ttl_seconds is None:
        return None
    return retention.on_end(request.answer_id, request.job_id, request.final_ttl_seconds)


def _is_wrong_type(reply: Any) -> bool:
    """Whether a key has a type that only another program can have given it."""
    return isinstance(reply, redis.ResponseError) and "WRONGTYPE" in str(reply)


def _execution_key(entry: str) -> str:
    return f"{RQ_KEY_PREFIX}:execution:{entry}"
