"""The one door to RQ's worker: a `BaseWorker` that runs a whole batch as RQ executions, in one process, without a fork.

The main thread lives here: heartbeats, leases, the model card, takeover, signals. The threads it starts own the rest: the
generation loop the rows, intake the taking, settlement the books. Checked against RQ 3.0.0 by a contract test; upstream
moves, and this file is what changes then.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import redis
from redis.exceptions import WatchError
from rq.command import handle_command, parse_payload
from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from rq.utils import now
from rq.worker import WorkerStatus
from rq.worker.base import BaseWorker

from common import names
from common.protocol import decode_control
from common.rq import JsonJob, JsonQueue
from worker.jobs.finalizer import Finalizer
from worker.jobs.heartbeat import BACKSTOP_SECONDS, Heartbeat
from worker.jobs.intake import Intake
from worker.jobs.redis_journal import RedisJournal
from worker.jobs.takeover import Takeover
from worker.jobs.watchdog import end_if_stuck, start_thread
from worker.loop.generation_loop import GenerationLoop
from worker.loop.messages import Abort, AbortReason, JobEnd, Message, Shutdown

if TYPE_CHECKING:
    from redis.client import Pipeline

    from common.settings import Settings
    from worker.loop.engine import Engine

log = logging.getLogger(__name__)

_BEATS_PER_LEASE = 4
_LEASE_MARGIN_SECONDS = 0.01
_DEAF_SECONDS = 0.5
"""Pause of the pub/sub thread after a lost connection; it subscribes again by itself."""

_SHUTDOWN_PATIENCE_SECONDS = 2.0
"""How long a worker that ends waits for a Redis that is gone."""


class BatchWorker(BaseWorker):
    """One worker process.

    Args:
        model_id: What clients ask for, and the RQ queue's name.
        make_engine: Called on the generation thread, which is the only one that touches what it returns.

    Raises:
        StartupError: From `work`, where the engine could not be made.
    """

    queue_class: type[Queue] = JsonQueue
    job_class = JsonJob
    death_penalty_class = TimerDeathPenalty  # stock uses SIGALRM, which only a main thread can
    log_result_lifespan = False

    def __init__(
        self, settings: Settings, connection: redis.Redis, model_id: str, make_engine: Callable[[], Engine]
    ) -> None:
        queue = JsonQueue(model_id, connection=connection)
        # worker_ttl 16: RQ derives its socket time-out from it, which must be longer than a blocking command of ours.
        super().__init__(
            [queue],
            name=names.unique_worker_name(model_id),
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=16,
            maintenance_interval=60,
            log_job_description=False,
        )
        self.queue = queue
        self._settings = settings
        self._make_engine = make_engine
        self._beat_seconds = settings.lease_seconds / _BEATS_PER_LEASE
        self._lease_ms = int(settings.lease_seconds * 1000)
        longest_seconds = max(settings.queue_seconds, math.ceil(settings.request_seconds))
        self._live_ttl_seconds = longest_seconds + settings.journal_ttl_seconds
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._job_ends: SimpleQueue[JobEnd | None] = SimpleQueue()
        self._slots: SimpleQueue[None] = SimpleQueue()
        # NOTE: signal handlers touch these two. SimpleQueue.put may be called in one; the lock of a threading.Event may not.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_draining = False
        self._drain_seconds = settings.drain_seconds
        self._drain_began_at: float | None = None
        self._redis_away_since: float | None = None
        self._next_lease_seconds = math.inf
        self._takeover = Takeover(
            self.queue,
            live_ttl_seconds=self._live_ttl_seconds,
            final_ttl_seconds=settings.journal_ttl_seconds,
            max_seconds=self._beat_seconds,
        )
        self._intake: Intake | None = None
        self._ready: SimpleQueue[tuple[GenerationLoop, Engine] | BaseException] = SimpleQueue()
        self._threads: list[Thread] = []

    # -- life --------------------------------------------------------------------------------------------------------

    def work(self, *_args: Any, **_options: Any) -> bool:  # RQ's options (burst, scheduler, ...) are not ours
        """Load the model, then serve until SIGTERM or SIGINT; True when it ended as asked."""
        self._start_thread("generation", self._generate)
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        loop, engine = ready
        info = engine.info
        for _ in range(info.max_batch):
            self._slots.put(None)
        self._heartbeat = Heartbeat(
            self, loop, info, lease_ms=self._lease_ms, live_ttl_seconds=self._live_ttl_seconds
        )
        self.bootstrap(None)
        self._install_signal_handlers()  # type: ignore[no-untyped-call]  # RQ is typed in part
        try:
            self.set_state(WorkerStatus.IDLE)
            finalizer = Finalizer(self, inbox=self._job_ends, slots=self._slots, given_up=self._gave_up)
            self._intake = Intake(
                self,
                slots=self._slots,
                encode=engine.encode,
                admit=self._inbox.put,
                draining=lambda: self._is_draining,
                holding_off=lambda: self._heartbeat.is_suspended or loop.is_admission_blocked,
                num_workers=lambda: self._heartbeat.num_workers,
            )
            self._start_thread("settlement", finalizer.run)
            self._intake_thread = self._start_thread("intake", self._intake.run)
            log.info("%s serves %s, %d at a time", self.name, self.queue.name, info.max_batch)
            while not self._is_done():
                end_if_stuck(loop.step_began_at, self._settings.stall_seconds)
                self._beat()
                self._sleep()
        finally:
            self._shut_down()
        return all(thread.is_alive() is False for thread in self._threads)

    def _start_thread(self, name: str, target: Callable[[], None]) -> Thread:
        thread = start_thread(name, target)
        self._threads.append(thread)
        return thread

    def _generate(self) -> None:
        """The generation thread."""
        try:
            engine = self._make_engine()
        except BaseException as error:  # noqa: BLE001 (told to the main thread, which raises it)
            self._ready.put(error)
            return
        journal = RedisJournal(self.connection, stop_waiting=self._gave_up)
        loop = GenerationLoop(
            engine=engine,
            journal=journal,
            inbox=self._inbox,
            on_job_end=self._job_ends.put,
            live_ttl_seconds=self._live_ttl_seconds,
            final_ttl_seconds=self._settings.journal_ttl_seconds,
            orphan_seconds=self._settings.orphan_seconds,
            is_intake_busy=lambda: self._intake is not None and self._intake.is_taking,
        )
        self._ready.put((loop, engine))
        try:
            loop.run()
        except redis.RedisError as error:
            if not self._gave_up():
                raise
            log.warning("%s ends with rows whose end nobody hears: %s", self.name, error)
        finally:
            journal.close()

    def _sleep(self) -> None:
        """Until the next heartbeat, or until there is something to look at now."""
        with suppress(Empty):
            self._wake.get(timeout=min(self._beat_seconds, self._next_lease_seconds + _LEASE_MARGIN_SECONDS))
        while not self._wake.empty():
            self._wake.get()

    def _is_done(self) -> bool:
        """Whether draining is over; hands over what did not end in time."""
        if not self._is_draining:
            return False
        if self._drain_began_at is None:
            self._drain_began_at = time.monotonic()
            log.info("%s takes no more jobs and ends when its %d are done", self.name, len(self.executions))
        if self._intake_thread.is_alive():  # only then no job of ours can come back to us
            return False
        if self._gave_up() or not self.executions or not self._threads[0].is_alive():
            return True
        if time.monotonic() - self._drain_began_at >= self._drain_seconds:
            for execution in list(self.executions.values()):
                self._inbox.put(Abort(execution.job_id, AbortReason.REQUEUED, execution.id))
        return False

    def _shut_down(self) -> None:
        """End the threads, then leave RQ's books; each in its time, also when Redis is gone."""
        self._is_draining = True
        self._inbox.put(Shutdown())
        self._threads[0].join(_SHUTDOWN_PATIENCE_SECONDS * 2)
        self._job_ends.put(None)
        for thread in self._threads[1:]:
            thread.join(_SHUTDOWN_PATIENCE_SECONDS)
        try:
            with self.connection.pipeline() as pipe:
                self._heartbeat.withdraw_card(pipe)
                pipe.execute()
            self.teardown()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            log.warning("%s could not say good-bye to Redis: %s", self.name, error)
        log.info("%s has ended", self.name)

    def request_stop(self, signum: int, frame: Any) -> None:  # noqa: ARG002 (a signal handler's signature)
        """SIGTERM or SIGINT: drain; the second one hands over at once. Stock raises out of the handler."""
        if self._is_draining:
            self._drain_seconds = 0.0
        self._shutdown_requested_date = now()
        self._stop_requested = True
        self._is_draining = True
        self._wake.put(None)

    def _gave_up(self) -> bool:
        """Whether a Redis that is away is not worth waiting for: this worker is ending."""
        since = self._redis_away_since
        return (
            self._is_draining and since is not None and time.monotonic() - since > _SHUTDOWN_PATIENCE_SECONDS
        )

    # -- heartbeats --------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        self._next_lease_seconds = math.inf
        try:
            for execution in self._heartbeat.beat(draining=self._is_draining):
                self._inbox.put(Abort(execution.job_id, AbortReason.FENCED, execution.id))
            self._show_state()
            if not self._is_draining:
                self._next_lease_seconds = self._takeover.run()
            self._maintain()
        except redis.RedisError as error:
            if self._redis_away_since is None:
                self._redis_away_since = time.monotonic()
                log.warning("Redis does not answer (%s); trying again", error)
        except Exception:
            log.exception("a heartbeat failed")  # whatever stands in Redis, the next one may do better
        else:
            if self._redis_away_since is not None:
                log.info("Redis answers again")
            self._redis_away_since = None

    def _maintain(self) -> None:
        """RQ's own cleaning of what has expired; a job that some other program wrote may trip it."""
        if not self.should_run_maintenance_tasks:
            return
        try:
            self.run_maintenance_tasks()  # type: ignore[no-untyped-call]
        except redis.RedisError:
            raise
        except Exception:
            log.exception("RQ's registries could not be cleaned")
            self.last_cleaned_at: Any = now()

    def _show_state(self) -> None:
        if self.executions:
            state = WorkerStatus.BUSY
        else:
            state = WorkerStatus.SUSPENDED if self._heartbeat.is_suspended else WorkerStatus.IDLE
        if state != self._state:
            self.set_state(state)

    # -- commands ----------------------------------------------------------------------------------------------------

    def subscribe(self) -> None:
        """RQ's commands to this worker, and the cancellations of its model, on RQ's one pub/sub thread."""
        self.pubsub = self.connection.pubsub(ignore_subscribe_messages=True)
        control = names.control_channel(self.queue.name)
        self.pubsub.subscribe(
            **{self.pubsub_channel_name: self.handle_payload, control: self._handle_control}
        )
        self.pubsub_thread: Any = self.pubsub.run_in_thread(
            sleep_time=60, daemon=True, exception_handler=self._pubsub_exception_handler
        )

    def _pubsub_exception_handler(self, exc: BaseException, *_args: Any) -> None:
        """Called on RQ's pub/sub thread. Stock lets all but a lost connection end it: a bad message would make us deaf."""
        is_away = isinstance(exc, redis.RedisError)  # which the heartbeat says once, and when it is over
        log.log(logging.DEBUG if is_away else logging.WARNING, "a command could not be heard: %r", exc)
        if is_away:
            time.sleep(_DEAF_SECONDS)

    def _handle_control(self, message: dict[str, Any]) -> None:
        for job_id in decode_control(message["data"]).job_ids:
            self._inbox.put(Abort(job_id, AbortReason.CANCELLED))

    def handle_payload(self, message: dict[str, Any]) -> None:
        """RQ's commands. Stock stop-job looks at one execution only, and its kill-horse needs a child process."""
        payload = parse_payload(message)
        match payload.get("command"):
            case "stop-job":
                self._inbox.put(Abort(str(payload.get("job_id")), AbortReason.STOPPED))
            case "kill-horse":
                for execution in list(self.executions.values()):
                    self.request_stop_execution(execution.id)
            case _:  # shutdown, and stop-execution by way of `request_stop_execution`
                handle_command(self, payload)

    def request_stop_execution(self, execution_id: str) -> None:
        """As RQ asks for one of several executions."""
        execution = self.executions.get(execution_id)
        if execution is not None:
            self._inbox.put(Abort(execution.job_id, AbortReason.STOPPED, execution_id))

    # -- executions: called by intake and settlement -----------------------------------------------------------------

    def start_execution(self, job: JsonJob, pipe: Pipeline) -> Execution:
        """Record on `pipe` that `job` runs here, under a lease; heartbeats renew it from now on."""
        execution = Execution.create(job, BACKSTOP_SECONDS, pipeline=pipe, worker_name=self.name)
        pipe.pexpire(execution.key, self._lease_ms)
        job.prepare_for_execution(self.name, pipeline=pipe)
        pipe.expire(job.key, self._live_ttl_seconds)  # not for ever: it holds the prompt; heartbeats renew it
        self.executions[execution.id] = execution
        self.set_state(WorkerStatus.BUSY, pipeline=pipe)
        return execution

    def forget_execution(self, execution_id: str) -> None:
        """Renew its lease no more."""
        self.executions.pop(execution_id, None)
        if not self.executions and self._is_draining:
            self._wake.put(None)

    def drop_execution(self, job: Job, execution: Execution) -> None:
        """Take back a registration: the job was another's by then."""
        with self.connection.pipeline() as pipe:
            self.cleanup_execution(job, pipe, execution)
            pipe.execute()

    def finish_job(self, job: Job, execution: Execution, result: dict[str, Any]) -> None:
        """RQ's handling of a success."""
        job.ended_at = now()
        job._result = result  # noqa: SLF001 (RQ 3.0 sets it so before it saves)
        self.handle_job_success(job, self.queue, self.queue.started_job_registry, execution)

    def fail_job(self, job: Job, execution: Execution | None, reason: str, *, stopped: bool = False) -> None:
        """RQ's handling of a failure that is the request's own: it is not tried again."""
        job.ended_at = now()
        job.retries_left = None
        if stopped:
            self._stopped_job_id = job.id
        self.handle_job_failure(job, self.queue, exc_string=reason, execution=execution)

    def requeue(self, job: Job, execution: Execution) -> None:
        """Back to the front of the queue, once: not if the execution has gone meanwhile."""
        with self.connection.pipeline() as pipe:
            while True:
                pipe.watch(execution.key)
                if not pipe.exists(execution.key):
                    return
                pipe.multi()
                execution.delete(job=job, pipeline=pipe)
                self.queue.put_back(job, pipe, self._live_ttl_seconds)
                try:
                    pipe.execute()
                except WatchError:  # our own heartbeat renewed the lease, or it has gone
                    continue
                return

    def get_heartbeat_ttl(self, job: Any, working_time: float = 0.0) -> int:  # noqa: ARG002 (RQ's signature)
        """What RQ's registries are told; see `BACKSTOP_SECONDS`."""
        return BACKSTOP_SECONDS

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """As RQ's, but one execution's end does not make a worker idle that has others."""
        super().set_state(
            WorkerStatus.BUSY if state == WorkerStatus.IDLE and self.executions else state, pipeline
        )
