"""Intake: takes job ids from the model's RQ queue and turns them into executions that this worker holds a lease for.

One thread. It takes only what there is a free slot for: a slot is a permit in a queue, which settlement puts back. A job
is in exactly one list at any instant: the queue, RQ's intermediate queue (taken, not registered), or the started registry.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution

from common import names
from common.errors import RequestError
from common.protocol import Event, GenerationJob
from common.rq import ForeignJobError, JsonJob, JsonQueue
from worker.jobs.executions import Executions
from worker.jobs.records import read_crash_count, read_journal, restored
from worker.jobs.scripts import RETURN_TO_QUEUE
from worker.loop.messages import Admit
from worker.loop.progress import Progress

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger(__name__)

_DEFERENCE_SECONDS = 0.004
"""A worker with rows lets workers with fewer of them be first: it waits so long with a full batch before it takes more."""

# A worker that sleeps (a closed lid) while it blocks would still be handed a job: it blocks no longer than this.
BLOCK_SECONDS = 1
_RETRY_SECONDS = 0.5
_HOLD_OFF_SECONDS = 0.05
_SUSPECT_PATIENCE_SECONDS = 5.0

# KEYS: queue, intermediate queue, the set of RQ's workers of the queue. ARGV: how many at most.
# A burst is shared out: a worker takes its part of what waits, not all that it has room for.
_TAKE = """
local num_workers = math.max(1, redis.call('SCARD', KEYS[3]))
local share = math.min(tonumber(ARGV[1]), math.ceil(redis.call('LLEN', KEYS[1]) / num_workers))
local ids = {}
for i = 1, share do ids[i] = redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT') end
return ids
"""


class Found(NamedTuple):
    """What was read of a job that was taken.

    Attributes:
        fields: Its hash.
        is_cancelled: Whether its client left.
        entries: What others generated of it: its journal.
        place: Where it lies in the intermediate queue; None: it does not any more.
    """

    raw_id: bytes
    fields: dict[bytes, bytes]
    is_cancelled: int
    entries: list[Any]
    place: int | None

    @property
    def is_poison_candidate(self) -> bool:
        """Whether it is to be tried alone."""
        return not self.is_cancelled and read_crash_count(self.fields).is_poison_candidate


_NUM_READ = len(Found._fields) - 1
"""Answers for each job."""


class Taken(NamedTuple):
    """A job that is registered here."""

    raw_id: bytes
    job: JsonJob
    execution: Execution
    request: GenerationJob
    journal: list[Event]
    is_poison_candidate: bool


class Intake:
    """See the module.

    Attributes:
        progress: The prompt that is being encoded, for the watchdog.
        is_taking: Whether jobs have been taken that are not handed on yet. Read by other threads.

    Args:
        slots: One permit a free slot.
        encode: Makes token ids of a request's prompt, `Engine.encode`.
        admit: Where admitted jobs go: the generation loop's inbox.
        draining: Says whether nothing more is to be taken.
        holding_off: Says whether nothing is to be taken now: `rq suspend` is in force, or what was taken before still
            waits to start.
        num_workers: Says how many workers the queue has.
    """

    def __init__(
        self,
        executions: Executions,
        *,
        slots: SimpleQueue[None],
        encode: Callable[[GenerationJob], list[int]],
        admit: Callable[[Admit], None],
        draining: Callable[[], bool],
        holding_off: Callable[[], bool],
        num_workers: Callable[[], int],
    ) -> None:
        self._executions = executions
        self._queue: JsonQueue = executions.queue
        self._redis: redis.Redis = executions.connection
        self._slots = slots
        self._encode = encode
        self._admit = admit
        self._draining = draining
        self._holding_off = holding_off
        self._num_workers = num_workers
        self._max_batch = slots.qsize()
        self._suspects_since = math.inf
        self._complaint = ""
        self.progress = Progress("intake")
        self.is_taking = False
        self._workers_key = f"{RQ_KEY_PREFIX}:workers:{self._queue.name}"

    def run(self) -> None:
        """Take jobs until the worker drains; after the return, none is half-taken by it."""
        while not self._draining():
            if self._holding_off():
                time.sleep(_HOLD_OFF_SECONDS)
                continue
            num_slots = self._hold_slots()
            num_used = 0
            try:
                if num_slots:
                    self._defer(num_slots)
                    num_used = self._fill(num_slots)
                    self._complaint = ""
            except redis.RedisError as error:
                self._complain(error)
                time.sleep(_RETRY_SECONDS)
            except Exception:
                log.exception(
                    "a job could not be taken"
                )  # it lies in the intermediate queue, and is put back
                time.sleep(_RETRY_SECONDS)
            finally:
                self.is_taking = False
                for _ in range(num_slots - num_used):
                    self._slots.put(None)

    def _complain(self, error: redis.RedisError) -> None:
        """Once of each reason. That Redis is away, or answers again, is said by the heartbeat."""
        is_away = isinstance(error, redis.ConnectionError | redis.TimeoutError)
        is_said = is_away or str(error) == self._complaint
        self._complaint = str(error)
        log.log(logging.DEBUG if is_said else logging.WARNING, "no job can be taken: %s", error)

    def _defer(self, num_slots: int) -> None:
        """Redis hands a job to whoever has waited longest; a worker that has rows comes a moment later than one without."""
        num_rows = self._max_batch - num_slots
        if num_rows and self._num_workers() > 1:
            time.sleep(_DEFERENCE_SECONDS * (0.5 + 0.5 * num_rows / self._max_batch))

    def _hold_slots(self) -> int:
        """Take every free permit; waits a moment for the first. How many there were."""
        try:
            self._slots.get(timeout=_RETRY_SECONDS)
        except Empty:
            return 0
        num_slots = 1
        while not self._slots.empty():  # nobody else takes
            self._slots.get()
            num_slots += 1
        return num_slots

    def _fill(self, num_slots: int) -> int:
        """Wait for a job, then take what else is there; how many slots are in use now."""
        first: Any = self._redis.blmove(self._queue.key, self._queue.intermediate_queue_key, BLOCK_SECONDS)
        if first is None:
            return 0
        self.is_taking = True
        with self._redis.pipeline(transaction=False) as pipe:
            self._read(pipe, first)
            if num_slots > 1:
                keys = (self._queue.key, self._queue.intermediate_queue_key, self._workers_key)
                # Not redis-py's registered script, which asks first, in a trip of its own, whether Redis has it.
                pipe.eval(_TAKE, len(keys), *keys, num_slots - 1)
            answers = pipe.execute(raise_on_error=False)
        raise_other_than_wrong_type(answers)
        more: list[bytes] = answers[_NUM_READ] if num_slots > 1 else []
        if more:
            with self._redis.pipeline(transaction=False) as pipe:
                for raw_id in more:
                    self._read(pipe, raw_id)
                del answers[_NUM_READ:]
                answers += pipe.execute(raise_on_error=False)
            raise_other_than_wrong_type(answers)
        found = [
            Found(raw_id, *answers[_NUM_READ * i : _NUM_READ * (i + 1)])
            for i, raw_id in enumerate([first, *more])
        ]
        return self._register(self._sorted_out(found, is_idle=num_slots == self._max_batch))

    def _sorted_out(self, found: list[Found], *, is_idle: bool) -> list[Found]:
        """What is kept of what was taken; a suspect only alone, the others go back to the front of the queue.

        A worker that dies leaves a mark on every job it holds: the jobs that only wait for a suspect are not to get one.
        """
        suspects = [each for each in found if each.is_poison_candidate]
        if not suspects:
            self._suspects_since = math.inf
            return found
        self._suspects_since = min(self._suspects_since, time.monotonic())
        kept = [] if self._suspects_waited() else [each for each in found if not each.is_poison_candidate]
        if is_idle:
            kept = suspects[:1]
        with self._redis.pipeline(transaction=True) as pipe:
            for each in reversed(found):
                if each not in kept:
                    pipe.eval(
                        RETURN_TO_QUEUE, 2, self._queue.intermediate_queue_key, self._queue.key, each.raw_id
                    )
            pipe.execute()
        if not kept:
            time.sleep(_HOLD_OFF_SECONDS)
        return kept

    def _suspects_waited(self) -> bool:
        """Whether they have met workers with rows for so long that this one takes nothing more until it is idle."""
        return time.monotonic() - self._suspects_since > _SUSPECT_PATIENCE_SECONDS

    def _read(self, pipe: Any, raw_id: bytes) -> None:
        """What is to be known of a job: see `Found`."""
        job_id = raw_id.decode(errors="replace")
        pipe.hgetall(JsonJob.key_for(job_id))
        pipe.exists(names.cancelled(job_id))
        pipe.xrange(names.journal(job_id))
        pipe.lpos(self._queue.intermediate_queue_key, raw_id)

    def _register(self, found: list[Found]) -> int:
        """Make executions of what was taken, all in one MULTI; how many slots are in use now."""
        taken: list[Taken] = []
        strangers: list[tuple[str, str]] = []
        with self._redis.pipeline(transaction=True) as pipe:
            for each in found:
                pipe.lrem(self._queue.intermediate_queue_key, 1, each.raw_id)  # type: ignore[arg-type]  # bytes are fine
            try:
                for each in found:
                    try:
                        taken += self._begin(each, pipe)
                    except ForeignJobError as error:
                        strangers.append((each.raw_id.decode(errors="replace"), str(error)))
                removed = pipe.execute()[: len(found)]
            except Exception:
                # Registered or not, nobody knows: without renewals their leases run out, and the jobs go on elsewhere.
                for registered in taken:
                    self._executions.forget(registered.execution.id)
                raise
        lost = {each.raw_id for each, count in zip(found, removed, strict=True) if count == 0}
        num_used = self._hand_on(taken, lost)
        for job_id, reason in strangers:
            log.error("job %s: %s", job_id, reason)
            self._fail(job_id, reason)
        return num_used

    def _begin(self, found: Found, pipe: Pipeline) -> list[Taken]:
        """Record on `pipe` what becomes of a job that was taken; it, if it becomes an execution.

        1. A job that another worker has put back meanwhile is not ours: this one slept. (Where it happens from here on,
           `LREM` says 0, and the execution is given up again.)
        2. A job without a hash ran out of time in the queue, or is no job at all: its watchers know.
        3. A job whose client left is deleted.
        4. A job that is none of ours fails, with the reason in RQ's books.
        5. The others become executions with a lease.

        Raises:
            ForeignJobError: 4.
        """
        if found.place is None or not found.fields:
            return []
        job_id = found.raw_id.decode(errors="replace")
        if found.is_cancelled:
            pipe.delete(JsonJob.key_for(job_id))
            return []
        job = restored(job_id, found.fields, self._redis)
        request, journal = job.request(), read_journal(found.entries)
        execution = self._executions.start(job, pipe)
        return [Taken(found.raw_id, job, execution, request, journal, found.is_poison_candidate)]

    def _fail(self, job_id: str, reason: str) -> None:
        """In RQ's books, if RQ can make sense of the job; else there is nothing to be written."""
        try:
            self._executions.fail(JsonJob.fetch(job_id, connection=self._redis), None, reason)
        except Exception as error:  # noqa: BLE001 (as many kinds as there are ways to be no job)
            log.warning("job %s cannot be failed either: %s", job_id, error)

    def _hand_on(self, taken: list[Taken], lost: set[bytes]) -> int:
        """To the generation loop, with their prompts encoded: the short ones first, since a long one takes its time."""
        kept = [each for each in taken if each.raw_id not in lost]
        for each in sorted(kept, key=lambda each: len(each.job.data)):
            prompt = self._encoded(each.request)
            self._admit(
                Admit(each.request, each.execution.id, prompt, each.journal, each.is_poison_candidate)
            )
            if each.is_poison_candidate:
                time.sleep(_HOLD_OFF_SECONDS)  # until the loop has it, and `holding_off` says so
        for each in taken:
            if each.raw_id in lost:
                self._drop(each)
        return len(kept)

    def _drop(self, taken: Taken) -> None:
        try:
            self._executions.drop(taken.job, taken.execution)
        except redis.RedisError as error:
            log.warning("job %s is another worker's, but stands in our books: %s", taken.job.id, error)
            self._executions.forget(taken.execution.id)  # until its lease runs out

    def _encoded(self, request: GenerationJob) -> list[int] | RequestError:
        try:
            with self.progress.on("prompt", request.job_id):
                return self._encode(request)
        except RequestError as error:
            return error
        except Exception:
            log.exception("the prompt of job %s cannot be encoded", request.job_id)
            return RequestError("The model cannot read this prompt.", status=500, type="server_error")


def raise_other_than_wrong_type(answers: list[Any]) -> None:
    """Let a key that somebody made something else pass as an empty one; anything else is raised.

    Raises:
        redis.RedisError: One of `answers`.
    """
    for i, answer in enumerate(answers):
        if isinstance(answer, redis.ResponseError) and "WRONGTYPE" in str(answer):
            answers[i] = {}
        elif isinstance(answer, Exception):
            raise answer
