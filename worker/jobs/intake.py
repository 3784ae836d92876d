"""Intake: takes job ids from the model's RQ queue and turns them into executions that this worker holds a lease for.

One thread. It takes only as many as there are free slots: a slot is a permit in a queue, which the finalizer puts back. A job
is in exactly one place at any instant: the queue, RQ's intermediate queue (taken, not registered), or the started registry.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
from rq.defaults import RQ_KEY_PREFIX

from common import names, retention
from common.rq import ForeignJobError, JsonJob, JsonQueue
from worker.jobs.executions import Executions
from worker.jobs.prompt_encoder import PromptEncoder, RegisteredJob
from worker.jobs.records import (
    cancellation,
    guard_against_job,
    read_crash_count,
    read_journal,
    read_min_context,
    restore_job,
)
from worker.jobs.scripts import RETURN_TO_QUEUE
from worker.loop.messages import Admit

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger(__name__)

_MAX_YIELD_SECONDS = 0.004
"""How long a worker whose batch is almost full waits before it takes more, so that workers with fewer sequences come first."""

BLOCK_SECONDS = 1
"""The longest that intake blocks on the queue: Redis gives a job even to a blocked worker that sleeps (a closed lid)."""

_RETRY_SECONDS = 0.5
_HOLD_OFF_SECONDS = 0.05
MAX_LEFT = 64
"""How many jobs that this worker leaves to others it looks behind for jobs of its own. It reads them completely each time."""

_CANDIDATE_PATIENCE_SECONDS = 5.0
"""How long poison candidates may find only busy workers, see `Intake._select`."""

# KEYS: queue, intermediate queue, the set of RQ's workers of the queue. ARGV: how many to take at most; how many jobs of the burst
# this worker has already, less those that it will leave to others. Takes the rest of this worker's share of the burst.
TAKE_SHARE = """
local num_workers = math.max(1, redis.call('SCARD', KEYS[3]))
local num_waiting = redis.call('LLEN', KEYS[1])
local num_more = math.min(tonumber(ARGV[1]), math.ceil((num_waiting + ARGV[2]) / num_workers) - ARGV[2], num_waiting)
local ids = {}
for i = 1, num_more do ids[i] = redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT') end
return ids
"""


class TakenJob(NamedTuple):
    """What Redis has of a job that was taken from the queue.

    Attributes:
        fields: Its hash.
        is_cancelled: Whether its client has left.
        entries: Its journal.
        position: Its index in the intermediate queue; None: it is no longer there.
    """

    raw_id: bytes
    fields: dict[bytes, bytes]
    is_cancelled: int
    entries: list[Any]
    position: int | None

    @property
    def is_poison_candidate(self) -> bool:
        """Whether it is to run alone."""
        return not self.is_cancelled and read_crash_count(self.fields).is_poison_candidate

    @property
    def min_context(self) -> int:
        """The context length that it is known to need."""
        return 0 if self.is_cancelled else read_min_context(self.fields)


_NUM_READS = len(TakenJob._fields) - 1
"""Replies per job, see `Intake._read`."""


class Intake:
    """See the module.

    Attributes:
        is_taking: Whether jobs were taken that have not reached the loop yet. Read by other threads.

    Args:
        slots: One permit per free slot.
        prompts: Encodes prompts.
        admit: Passes a job to the generation loop.
        draining: Whether to take no more jobs and end.
        holding_off: Whether to take no jobs for now: `rq suspend` is in force, or an earlier job is still waiting to start.
        num_workers: The number of workers of the queue.
    """

    def __init__(
        self,
        executions: Executions,
        *,
        slots: SimpleQueue[None],
        prompts: PromptEncoder,
        admit: Callable[[Admit], None],
        draining: Callable[[], bool],
        holding_off: Callable[[], bool],
        num_workers: Callable[[], int],
    ) -> None:
        self._executions = executions
        self._queue: JsonQueue = executions.queue
        self._redis: redis.Redis = executions.connection
        self._slots = slots
        self._prompts = prompts
        self._admit = admit
        self._draining = draining
        self._holding_off = holding_off
        self._num_workers = num_workers
        self._max_batch = slots.qsize()
        self._candidates_since_mono = math.inf
        self._num_left = 0  # jobs at the front of the queue that were left to other workers last time
        self._last_warning = ""
        self.is_taking = False
        self._workers_key = f"{RQ_KEY_PREFIX}:workers:{self._queue.name}"

    def run(self) -> None:
        """Take jobs until the worker drains. When it returns, every job that it took is registered or back in the queue."""
        while not self._draining():
            if self._holding_off():
                time.sleep(_HOLD_OFF_SECONDS)
                continue
            num_slots = self._hold_slots()
            num_used = 0
            try:
                if num_slots:
                    self._yield_to_other_workers(num_slots)
                    num_used = self._fill(num_slots)
                    self._last_warning = ""
            except redis.RedisError as error:
                self._warn_once(error)
                time.sleep(_RETRY_SECONDS)
            except Exception:
                log.exception("jobs could not be taken")  # the intermediate queue has them: they are put back
                time.sleep(_RETRY_SECONDS)
            finally:
                self.is_taking = False
                for _ in range(num_slots - num_used):
                    self._slots.put(None)

    def _warn_once(self, error: redis.RedisError) -> None:
        """Log each reason once. The heartbeat logs that Redis is away, and that it is back."""
        is_away = isinstance(error, redis.ConnectionError | redis.TimeoutError)
        is_logged = is_away or str(error) == self._last_warning
        self._last_warning = str(error)
        log.log(logging.DEBUG if is_logged else logging.WARNING, "no jobs can be taken: %s", error)

    def _yield_to_other_workers(self, num_slots: int) -> None:
        """Let workers with fewer sequences come first: Redis gives a job to the client that has waited longest.

        This balances only roughly. A worker that is encoding a long prompt does not compete for the next job meanwhile, so an
        idle neighbour may take several in a row: an even split is not worth delaying them.
        """
        num_sequences = self._max_batch - num_slots
        if num_sequences and self._num_workers() > 1:
            time.sleep(_MAX_YIELD_SECONDS * (0.5 + 0.5 * num_sequences / self._max_batch))

    def _hold_slots(self) -> int:
        """Take all free permits, waiting a moment for the first; returns their number."""
        try:
            self._slots.get(timeout=_RETRY_SECONDS)
        except Empty:
            return 0
        num_slots = 1
        while not self._slots.empty():  # this thread is the only consumer
            self._slots.get()
            num_slots += 1
        return num_slots

    def _fill(self, num_slots: int) -> int:
        """Wait for a job, then take a share of what else waits; returns the number of slots that are used."""
        first: Any = self._redis.blmove(self._queue.key, self._queue.intermediate_queue_key, BLOCK_SECONDS)
        if first is None:
            return 0
        self.is_taking = True
        # Jobs that will be left to other workers again need no slots and are no part of this worker's share.
        num_own = 1 - min(self._num_left, MAX_LEFT)
        max_more = num_slots - num_own
        with self._redis.pipeline(transaction=False) as pipe:
            self._read(pipe, first)
            if max_more:
                keys = (self._queue.key, self._queue.intermediate_queue_key, self._workers_key)
                # Not redis-py's registered script: in a pipeline it first asks, in a round trip, whether Redis has it.
                pipe.eval(TAKE_SHARE, len(keys), *keys, max_more, num_own)
            replies = pipe.execute(raise_on_error=False)
        ignore_wrong_types(replies)
        more: list[bytes] = replies[_NUM_READS] if max_more else []
        if more:
            with self._redis.pipeline(transaction=False) as pipe:
                for raw_id in more:
                    self._read(pipe, raw_id)
                del replies[_NUM_READS:]
                replies += pipe.execute(raise_on_error=False)
            ignore_wrong_types(replies)
        taken = [
            TakenJob(raw_id, *replies[_NUM_READS * i : _NUM_READS * (i + 1)])
            for i, raw_id in enumerate([first, *more])
        ]
        return self._register(self._select(taken, num_slots))

    def _select(self, taken: list[TakenJob], num_slots: int) -> list[TakenJob]:
        """Select what this worker keeps; the rest goes back to the front of the queue, in order.

        1. Jobs that are known to be too long for this worker's context are left to a worker that has room for them, if one is
           live.
        2. A poison candidate runs alone, so only an idle worker keeps one: if it crashes its worker, every job there has one more
           crash counted. If candidates have found only busy workers for a while, this one takes nothing more until it is idle.
        """
        longest = self._prompts.longest_live_context() if any(map(self._is_too_long, taken)) else 0
        kept = [each for each in taken if not (self._is_too_long(each) and each.min_context <= longest)]
        candidates = [each for each in kept if each.is_poison_candidate]
        if not candidates:
            self._candidates_since_mono = math.inf
        else:
            self._candidates_since_mono = min(self._candidates_since_mono, time.monotonic())
            if num_slots == self._max_batch:
                kept = candidates[:1]
            elif time.monotonic() - self._candidates_since_mono > _CANDIDATE_PATIENCE_SECONDS:
                kept = []
            else:
                kept = [each for each in kept if not each.is_poison_candidate]
        self._num_left = len(taken) - len(kept)
        kept = kept[:num_slots]
        if len(kept) < len(taken):
            self._return(each for each in reversed(taken) if each not in kept)
        if not kept:
            time.sleep(_HOLD_OFF_SECONDS)
        return kept

    def _is_too_long(self, taken: TakenJob) -> bool:
        return taken.min_context > self._prompts.context_length

    def _return(self, jobs: Iterable[TakenJob]) -> None:
        """Put jobs back in front of the queue; the last one is the first there."""
        with self._redis.pipeline(transaction=True) as pipe:
            for each in jobs:
                pipe.eval(
                    RETURN_TO_QUEUE, 2, self._queue.intermediate_queue_key, self._queue.key, each.raw_id
                )
            pipe.execute()

    def _read(self, pipe: Any, raw_id: bytes) -> None:
        """Record on `pipe` the reads of a job, see `TakenJob`."""
        job_id = raw_id.decode(errors="replace")
        pipe.hgetall(JsonJob.key_for(job_id))
        pipe.exists(names.cancelled(job_id))
        pipe.xrange(names.journal(job_id))
        pipe.lpos(self._queue.intermediate_queue_key, raw_id)

    def _register(self, taken: list[TakenJob]) -> int:
        """Make executions of jobs, in one MULTI; returns the number of slots that are used."""
        registered: list[RegisteredJob] = []
        foreign: list[tuple[str, str]] = []
        with self._redis.pipeline(transaction=True) as pipe:
            for each in taken:
                pipe.lrem(self._queue.intermediate_queue_key, 1, each.raw_id)  # type: ignore[arg-type]  # bytes are fine
            try:
                for each in taken:
                    try:
                        with guard_against_job():
                            registered += self._begin(each, pipe)
                    except ForeignJobError as error:
                        foreign.append((each.raw_id.decode(errors="replace"), str(error)))
                removed = pipe.execute()[: len(taken)]
            except Exception:
                # Whether they were registered is unknown. Without renewals their leases run out, and other workers continue.
                for each_registered in registered:
                    self._executions.forget(each_registered.execution.id)
                raise
        lost = {each.raw_id for each, count in zip(taken, removed, strict=True) if count == 0}
        num_used = self._hand_over(registered, lost)
        for job_id, reason in foreign:
            log.error("job %s: %s", job_id, reason)
            self._fail(job_id, reason)
        return num_used

    def _begin(self, taken: TakenJob, pipe: Pipeline) -> list[RegisteredJob]:
        """Record on `pipe` what becomes of a job; returns it if it becomes an execution.

        1. A job that another worker has put back is not ours: this worker slept. (If that happens after the read, `LREM` returns
           0, and the execution is dropped again.)
        2. A job without a hash expired in the queue, or never was one.
        3. A job whose client has left is deleted; if its answer is stored, its journal says that it was cancelled.
        4. A job of another program fails, with the reason in RQ's bookkeeping.
        5. All others become executions with a lease. A stored answer lives at least as long as its job may run.

        Raises:
            ForeignJobError: 4.
        """
        if taken.position is None or not taken.fields:
            return []
        job_id = taken.raw_id.decode(errors="replace")
        if taken.is_cancelled:
            pipe.delete(JsonJob.key_for(job_id))
            self._record_cancellation(job_id, taken.fields, pipe)
            return []
        job = restore_job(job_id, taken.fields, self._redis)
        request, journal = job.request(), read_journal(taken.entries)
        execution = self._executions.start(job, pipe)
        if request.answer_id is not None and request.final_ttl_seconds is not None:
            pipe.execute_command(*retention.on_start(request.answer_id, request.final_ttl_seconds))
        return [RegisteredJob(taken.raw_id, job, execution, request, journal, taken.is_poison_candidate)]

    def _record_cancellation(self, job_id: str, fields: dict[bytes, bytes], pipe: Pipeline) -> None:
        try:
            command = cancellation(restore_job(job_id, fields, self._redis))
        except ForeignJobError:
            return
        if command is not None:
            pipe.execute_command(*command)

    def _fail(self, job_id: str, reason: str) -> None:
        """Record a failure in RQ, if RQ can read the job."""
        try:
            self._executions.fail(JsonJob.fetch(job_id, connection=self._redis), None, reason)
        except Exception as error:  # noqa: BLE001 (a broken job may raise anything)
            log.warning("job %s cannot be marked as failed: %s", job_id, error)

    def _hand_over(self, registered: list[RegisteredJob], lost: set[bytes]) -> int:
        """Encode prompts and pass jobs to the loop, short ones first, since encoding a long prompt takes long.

        Args:
            lost: Jobs that another worker had put back before they were registered here.

        Returns:
            The number of slots that are used.
        """
        num_used = 0
        kept = [each for each in registered if each.raw_id not in lost]
        for each in sorted(kept, key=lambda each: len(each.job.data)):
            prompt = self._prompts.encode(each)
            if prompt is None:
                continue
            num_used += 1
            self._admit(
                Admit(each.request, each.execution.id, prompt, each.journal, each.is_poison_candidate)
            )
            if each.is_poison_candidate:
                time.sleep(_HOLD_OFF_SECONDS)  # until the loop has it and blocks further intake
        for each in registered:
            if each.raw_id in lost:
                self._drop(each)
        return num_used

    def _drop(self, lost: RegisteredJob) -> None:
        try:
            self._executions.drop(lost.job, lost.execution)
        except Exception as error:  # noqa: BLE001 (as for a requeued job)
            log.warning("job %s is another worker's, but is registered here: %s", lost.job.id, error)
            self._executions.forget(lost.execution.id)  # its lease runs out


def ignore_wrong_types(replies: list[Any]) -> None:
    """Replace the errors of keys that another program has given a wrong type by empty values; raise any other error.

    Raises:
        redis.RedisError: One of `replies`.
    """
    for i, reply in enumerate(replies):
        if isinstance(reply, redis.ResponseError) and "WRONGTYPE" in str(reply):
            replies[i] = {}
        elif isinstance(reply, Exception):
            raise reply
