"""Takeover: gives the jobs of workers that went silent back to the queue, in front, each exactly once.

Called by the worker's main thread each heartbeat. A worker went silent when the lease of its execution ran out, by Redis's
clock; RQ's own cleaners go by local clocks and run twice at once, so their deadline is kept far away.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import redis
from redis.exceptions import WatchError
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution, ExecutionRegistry
from rq.job import JobStatus

from common import names
from common.errors import RequestError
from common.protocol import encode
from common.rq import ForeignJobError, JsonJob, JsonQueue
from worker.jobs.intake import GIVE_BACK
from worker.jobs.records import (
    CRASHES_FIELD,
    LAST_N_FIELD,
    CrashCount,
    has_ended,
    read_crash_count,
    read_journal,
    restored,
)
from worker.loop.sequence import failed_event

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger(__name__)

RESCUE_AFTER_SECONDS = 2.0
"""How long an id may lie in the intermediate queue; a live worker needs milliseconds."""

_NO_SUCH_KEY = -2
"""PTTL's answer."""

_LOST = RequestError(
    "The workers that tried to answer this request stopped one after another; it is not tried again.",
    status=500,
    type="server_error",
    code="worker_lost",
)


class Takeover:
    """See the module.

    Args:
        live_ttl_seconds: What a job has to live until it is taken.
        final_ttl_seconds: What a journal has to live after a terminal event.
        max_seconds: How long one look may take, about: each job is several round trips, and no lease of this worker's own is
            renewed meanwhile.
    """

    def __init__(
        self, queue: JsonQueue, *, live_ttl_seconds: int, final_ttl_seconds: int, max_seconds: float
    ) -> None:
        self._queue = queue
        self._redis: redis.Redis = queue.connection
        self._live_ttl_seconds = live_ttl_seconds
        self._final_ttl_seconds = final_ttl_seconds
        self._max_seconds = max_seconds
        self._rescue_script = self._redis.register_script(GIVE_BACK)
        self._first_seen: dict[bytes, float] = {}

    def run(self) -> float:
        """Look once for jobs without a worker and put them back.

        Returns:
            Seconds until the next lease runs out, if it is not renewed: looking again just then loses no time. 0 where one
            has run out that there was no time for.
        """
        next_seconds = self._reap()
        self._rescue()
        return next_seconds

    def _reap(self) -> float:
        """Put back the executions whose lease ran out; as `run`."""
        late_at = time.monotonic() + self._max_seconds
        registry = self._queue.started_job_registry
        entries: Any = self._redis.zrange(registry.key, 0, -1)
        composites = [entry.decode() for entry in entries if entry.isascii()]  # what is not, is none of RQ's
        if not composites:
            return math.inf
        with self._redis.pipeline(transaction=False) as pipe:
            for composite in composites:
                pipe.pttl(_execution_key(composite))
            leases_ms = pipe.execute()
        for composite, lease_ms in zip(composites, leases_ms, strict=True):
            if lease_ms != _NO_SUCH_KEY:
                continue
            self._put_back(registry.key, composite)
            if time.monotonic() >= late_at:
                return 0.0
        return min((ms / 1000 for ms in leases_ms if ms >= 0), default=math.inf)

    def _put_back(self, registry_key: str, composite: str) -> None:
        """One execution, exactly once: whoever commits first, the others' WATCH fails or the entry is gone.

        The registry changes with every admission, our own too, so a failed WATCH is tried again at once.
        """
        while True:
            with self._redis.pipeline(transaction=True) as pipe:
                try:
                    if self._try_put_back(pipe, registry_key, composite):
                        log.warning(
                            "job %s goes on here or on another worker: its own went silent",
                            composite.partition(":")[0][:80],
                        )
                except WatchError:
                    continue
                except (ForeignJobError, redis.ResponseError) as error:
                    if isinstance(error, redis.ResponseError) and "WRONGTYPE" not in str(error):
                        raise  # such as no memory: it is there the next time
                    log.error("%s: %s; it leaves the registry", composite[:80], error)  # noqa: TRY400 (one line will do)
                    self._redis.zrem(registry_key, composite)
                return

    def _try_put_back(self, pipe: Pipeline, registry_key: str, composite: str) -> bool:
        """See `_put_back`; whether the job is to go on.

        1. The entry leaves RQ's registries.
        2. A job that goes on under another execution, or has ended, is left alone: somebody took it twice.
        3. Its journal has a terminal event: only RQ's books are left to be written, which whoever takes it does.
        4. Else it is tried again, as often in a row as its retries allow. A run that brought a new token starts the count
           again: it was not this job that killed its worker.
        """
        try:
            dead = Execution.from_composite_key(composite, self._redis)
        except ValueError as error:
            raise ForeignJobError(str(error)) from error
        key, journal_key = JsonJob.key_for(dead.job_id), names.journal(dead.job_id)
        runs = ExecutionRegistry(dead.job_id, self._redis)
        pipe.watch(dead.key, key, registry_key, journal_key, runs.key)
        with self._redis.pipeline(transaction=False) as reads:  # in one trip; `pipe` would make one of each
            reads.exists(dead.key)
            reads.zscore(registry_key, composite)
            reads.hgetall(key)
            reads.xlen(journal_key)
            reads.xrevrange(journal_key, count=1)
            reads.zrange(runs.key, 0, -1)
            is_alive, score, fields, num_events, last, run_ids = reads.execute()
        if is_alive or score is None:
            return False
        is_whole = has_ended(read_journal(last))
        job = restored(dead.job_id, fields, self._redis) if fields else None
        goes_on = (
            job is not None
            and job.get_status(refresh=False) == JobStatus.STARTED
            and not _runs_elsewhere(pipe, dead, run_ids)
        )
        pipe.multi()
        pipe.zrem(registry_key, composite)
        runs.remove(dead, pipe)
        if goes_on and job is not None:
            if not is_whole and not self._count_strike(pipe, job, read_crash_count(fields), num_events):
                self._give_up(pipe, job, num_events)
            else:
                self._queue.put_back(job, pipe, self._live_ttl_seconds)
        pipe.execute()
        return goes_on

    @staticmethod
    def _count_strike(pipe: Pipeline, job: JsonJob, crashes: CrashCount, num_events: int) -> bool:
        """Record on `pipe` what stands against a job now, in RQ's retries too; whether it may be tried again."""
        allowed = (job.retries_left or 0) + crashes.num
        now = crashes.after_death(num_events)
        if now.num > allowed:
            return False
        job.retries_left = allowed - now.num
        pipe.hset(job.key, mapping={CRASHES_FIELD: now.num, LAST_N_FIELD: now.last_n})
        return True

    def _give_up(self, pipe: Pipeline, job: JsonJob, num_events: int) -> None:
        """No tries left: RQ's books say failed, and the client hears it."""
        job.set_status(JobStatus.FAILED, pipeline=pipe)
        job._handle_failure(_LOST.message, pipe)  # noqa: SLF001 (RQ 3.0 has no public way that takes a pipeline)
        try:
            request = job.request()
        except ForeignJobError as error:
            log.warning("job %s: %s", job.id, error)
            return
        event = encode(failed_event(num_events + 1, _LOST))
        journal_key = names.journal(job.id)
        pipe.xadd(journal_key, {"x": "", "d": event}, id=f"{num_events + 1}-0")
        pipe.expire(journal_key, self._final_ttl_seconds)
        pipe.publish(request.channel, b'[["' + job.id.encode() + b'",' + event + b"]]")

    def _rescue(self) -> None:
        """Put back what a worker took and never registered: it died, or sleeps."""
        intermediate = self._queue.intermediate_queue
        ids: Any = self._redis.lrange(intermediate.key, 0, -1)
        now = time.monotonic()
        self._first_seen = {job_id: self._first_seen.get(job_id, now) for job_id in ids}
        for job_id, first_seen in self._first_seen.items():
            if now - first_seen < RESCUE_AFTER_SECONDS:
                continue
            if self._rescue_script(keys=(intermediate.key, self._queue.key), args=(job_id,)):
                log.warning("job %s was taken and never begun; it is back in front of the queue", job_id)


def _runs_elsewhere(pipe: Pipeline, dead: Execution, run_ids: list[bytes]) -> bool:
    """Whether one of a job's other executions holds its lease."""
    others = {execution_id.decode(errors="replace") for execution_id in run_ids} - {dead.id}
    return any(pipe.exists(_execution_key(f"{dead.job_id}:{other}")) for other in others)


def _execution_key(composite: str) -> str:
    return f"{RQ_KEY_PREFIX}:execution:{composite}"
