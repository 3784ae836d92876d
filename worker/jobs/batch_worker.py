"""The worker process: RQ's `BaseWorker`, but it runs a whole batch of jobs as RQ executions in one process, without forks.

Its main thread runs here: heartbeats, leases, the model card, takeover, signals. It starts the other threads: generation
(sequences and the engine), intake (the queue), tokenizing (`worker.tokenizing`), the finalizer (RQ's bookkeeping). The only file that derives from RQ's worker;
checked against RQ 3.0.
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
from rq.command import handle_command, parse_payload
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from rq.utils import now
from rq.worker import WorkerStatus
from rq.worker.base import BaseWorker

from common import names
from common.protocol import decode_control
from common.rq import JsonJob, JsonQueue
from common.settings import Settings
from worker.jobs.executions import BACKSTOP_SECONDS, Executions
from worker.jobs.finalizer import Finalizer
from worker.jobs.heartbeat import Heartbeat, beat_interval_seconds
from worker.jobs.intake import Intake
from worker.jobs.prompt_encoder import PromptEncoder
from worker.jobs.redis_journal import RedisJournal
from worker.jobs.registration import Registration
from worker.jobs.takeover import Takeover
from worker.jobs.watchdog import end_if_stalled, start_thread
from worker.loop.engine import Engine
from worker.loop.generation_loop import GenerationLoop
from worker.loop.messages import Abort, AbortReason, JobEnd, Message, Shutdown
from worker.tokenizing.service import TokenizeService

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger(__name__)

_LEASE_MARGIN_SECONDS = 0.01
_RECONNECT_SECONDS = 0.5
"""Pause of the pub/sub thread after a lost connection; redis-py subscribes again by itself."""

_SHUTDOWN_PATIENCE_SECONDS = 2.0
"""How long a worker that is ending waits for a Redis that is away."""


class BatchWorker(BaseWorker):
    """One worker process.

    Args:
        model_id: What clients ask for, and the RQ queue's name.
        make_engine: Called on the generation thread. Only that thread uses the engine, except for `encode`.

    Raises:
        StartupError: From `work`: the engine could not be made.
    """

    queue_class: type[Queue] = JsonQueue
    job_class = JsonJob
    death_penalty_class = TimerDeathPenalty  # RQ's default uses SIGALRM, which needs the main thread
    log_result_lifespan = False

    def __init__(
        self, settings: Settings, connection: redis.Redis, model_id: str, make_engine: Callable[[], Engine]
    ) -> None:
        queue = JsonQueue(model_id, connection=connection)
        # worker_ttl 16: RQ derives its socket timeout from it, which must exceed our blocking commands'.
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
        self._beat_seconds = beat_interval_seconds(settings.lease_seconds)
        longest_request_seconds = max(settings.queue_seconds, math.ceil(settings.request_seconds))
        self._live_ttl_seconds = longest_request_seconds + settings.journal_ttl_seconds
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._job_ends: SimpleQueue[JobEnd | None] = SimpleQueue()
        self._slots: SimpleQueue[None] = SimpleQueue()
        # NOTE: signal handlers use these two. They may call SimpleQueue.put, but not take the lock of a threading.Event.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_draining = False
        self._drain_seconds = settings.drain_seconds
        self._drain_began_mono: float | None = None
        self._redis_away_mono: float | None = None
        self._next_lease_seconds = math.inf
        self._held = Executions(
            self,
            self.queue,
            lease_ms=int(settings.lease_seconds * 1000),
            live_ttl_seconds=self._live_ttl_seconds,
            on_empty=self._wake_if_draining,
        )
        self._takeover = Takeover(
            self.queue,
            live_ttl_seconds=self._live_ttl_seconds,
            final_ttl_seconds=settings.journal_ttl_seconds,
            max_seconds=self._beat_seconds,
        )
        self._intake: Intake | None = None
        self._ready: SimpleQueue[tuple[GenerationLoop, Engine] | BaseException] = SimpleQueue()
        self._threads: list[Thread] = []

    def work(self, *_args: Any, **_options: Any) -> bool:  # RQ's options (burst, scheduler, ...) do not apply
        """Load the model, then serve until SIGTERM or SIGINT; True if all threads ended in time."""
        self._start_thread("generation", self._generate)
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        loop, engine = ready
        info = engine.info
        for _ in range(info.max_batch):
            self._slots.put(None)
        self._heartbeat = Heartbeat(
            Registration(self, self.queue),
            self._held,
            loop,
            info,
            live_ttl_seconds=self._live_ttl_seconds,
        )
        self.bootstrap(None)
        self._install_signal_handlers()  # type: ignore[no-untyped-call]  # RQ is typed in part
        try:
            self.set_state(WorkerStatus.IDLE)
            finalizer = Finalizer(
                self._held,
                inbox=self._job_ends,
                slots=self._slots,
                stop_waiting=self._stop_waiting_for_redis,
            )
            prompts = PromptEncoder(self._held, engine.encode, info.context_length)
            self._intake = Intake(
                self._held,
                slots=self._slots,
                prompts=prompts,
                admit=self._inbox.put,
                draining=lambda: self._is_draining,
                holding_off=lambda: self._heartbeat.is_suspended or loop.is_admission_blocked,
                num_workers=lambda: self._heartbeat.num_workers,
            )
            tokenizing = TokenizeService(
                self.connection,
                self.queue.name,
                engine.make_prompt_tokenizer,
                draining=lambda: self._is_draining,
            )
            self._start_thread("finalizer", finalizer.run)
            self._start_thread("tokenizing", tokenizing.run)
            self._intake_thread = self._start_thread("intake", self._intake.run)
            log.info("%s serves %s, up to %d requests at a time", self.name, self.queue.name, info.max_batch)
            while not self._is_done():
                end_if_stalled(
                    (loop.progress, prompts.progress, tokenizing.progress), self._settings.stall_seconds
                )
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
        except BaseException as error:  # noqa: BLE001 (the main thread raises it)
            self._ready.put(error)
            return
        journal = RedisJournal(self.connection, stop_waiting=self._stop_waiting_for_redis)
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
            if not self._stop_waiting_for_redis():
                raise
            log.warning("%s ends with requests whose end cannot be published: %s", self.name, error)
        finally:
            journal.close()

    def _wake_if_draining(self) -> None:
        if self._is_draining:
            self._wake.put(None)

    def _sleep(self) -> None:
        """Sleep until the next heartbeat, the next lease that runs out, or a wake-up."""
        with suppress(Empty):
            self._wake.get(timeout=min(self._beat_seconds, self._next_lease_seconds + _LEASE_MARGIN_SECONDS))
        while not self._wake.empty():
            self._wake.get()

    def _is_done(self) -> bool:
        """Whether draining is over; requeues what did not end in time."""
        if not self._is_draining:
            return False
        if self._drain_began_mono is None:
            self._drain_began_mono = time.monotonic()
            log.info(
                "%s is draining: it takes no more jobs, and ends when its %d jobs have ended",
                self.name,
                len(self._held),
            )
        if self._intake_thread.is_alive():  # it could take the jobs that are requeued below
            return False
        if self._stop_waiting_for_redis() or not self._held or not self._threads[0].is_alive():
            return True
        if time.monotonic() - self._drain_began_mono >= self._drain_seconds:
            for execution in self._held.held():
                self._inbox.put(Abort(execution.job_id, AbortReason.REQUEUED, execution.id))
        return False

    def _shut_down(self) -> None:
        """End the threads, then remove this worker from RQ. Bounded in time, also while Redis is away."""
        self._is_draining = True
        self._inbox.put(Shutdown())
        self._threads[0].join(_SHUTDOWN_PATIENCE_SECONDS * 2)
        self._job_ends.put(None)
        for thread in self._threads[1:]:
            thread.join(_SHUTDOWN_PATIENCE_SECONDS)
        try:
            with self.connection.pipeline() as pipe:
                self._heartbeat.remove_card(pipe)
                pipe.execute()
            self.teardown()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            log.warning("%s could not remove its entry from Redis: %s", self.name, error)
        log.info("%s has ended", self.name)

    def request_stop(self, signum: int, frame: Any) -> None:  # noqa: ARG002 (a signal handler's signature)
        """SIGTERM or SIGINT: drain; a second one requeues everything at once. RQ's own raises from the handler."""
        if self._is_draining:
            self._drain_seconds = 0.0
        self._shutdown_requested_date = now()
        self._stop_requested = True
        self._is_draining = True
        self._wake.put(None)

    def _stop_waiting_for_redis(self) -> bool:
        """Whether this worker is ending and Redis has been away for too long to wait for it."""
        since = self._redis_away_mono
        return (
            self._is_draining and since is not None and time.monotonic() - since > _SHUTDOWN_PATIENCE_SECONDS
        )

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
            if self._redis_away_mono is None:
                self._redis_away_mono = time.monotonic()
                log.warning("Redis does not answer (%s); trying again", error)
        except Exception:
            log.exception("a heartbeat failed")  # unexpected data in Redis; the next one may succeed
        else:
            if self._redis_away_mono is not None:
                log.info("Redis answers again")
            self._redis_away_mono = None

    def _maintain(self) -> None:
        """Run RQ's own cleanup of its registries; a job that another program wrote may make it fail."""
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
        if self._held:
            state = WorkerStatus.BUSY
        else:
            state = WorkerStatus.SUSPENDED if self._heartbeat.is_suspended else WorkerStatus.IDLE
        if state != self._state:
            self.set_state(state)

    def subscribe(self) -> None:
        """Subscribe to RQ's commands for this worker and to its model's cancellations, on RQ's one pub/sub thread."""
        self.pubsub = self.connection.pubsub(ignore_subscribe_messages=True)
        control = names.control_channel(self.queue.name)
        self.pubsub.subscribe(
            **{self.pubsub_channel_name: self.handle_payload, control: self._handle_control}
        )
        self.pubsub_thread: Any = self.pubsub.run_in_thread(
            sleep_time=60, daemon=True, exception_handler=self._pubsub_exception_handler
        )

    def _pubsub_exception_handler(self, exc: BaseException, *_args: Any) -> None:
        """Called on RQ's pub/sub thread. RQ's own ends the thread on anything but a lost connection: after one bad message,
        no command would arrive any more.
        """
        is_away = isinstance(exc, redis.RedisError)  # the heartbeat logs it, and its end
        log.log(logging.DEBUG if is_away else logging.WARNING, "a command could not be received: %r", exc)
        if is_away:
            time.sleep(_RECONNECT_SECONDS)

    def _handle_control(self, message: dict[str, Any]) -> None:
        for job_id in decode_control(message["data"]).job_ids:
            self._inbox.put(Abort(job_id, AbortReason.CANCELLED))

    def handle_payload(self, message: dict[str, Any]) -> None:
        """Carry out RQ's commands. RQ's own stop-job considers one execution only, and its kill-horse needs a child process."""
        payload = parse_payload(message)
        match payload.get("command"):
            case "stop-job":
                self._inbox.put(Abort(str(payload.get("job_id")), AbortReason.STOPPED))
            case "kill-horse":
                for execution in self._held.held():
                    self.request_stop_execution(execution.id)
            case _:  # shutdown, and stop-execution by way of `request_stop_execution`
                handle_command(self, payload)

    def request_stop_execution(self, execution_id: str) -> None:
        """RQ's stop-execution: stop one of several executions."""
        execution = self._held.get(execution_id)
        if execution is not None:
            self._inbox.put(Abort(execution.job_id, AbortReason.STOPPED, execution_id))

    def get_heartbeat_ttl(self, job: Any, working_time: float = 0.0) -> int:  # noqa: ARG002 (RQ's signature)
        """What RQ's registries use; see `BACKSTOP_SECONDS`."""
        return BACKSTOP_SECONDS

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """As RQ's, but a worker with other executions stays busy when one ends."""
        super().set_state(
            WorkerStatus.BUSY if state == WorkerStatus.IDLE and self.executions else state, pipeline
        )
