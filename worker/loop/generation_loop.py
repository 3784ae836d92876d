"""The generation loop: which sequences run, what each step's tokens become, and when a job has ended.

Runs on one thread and owns every `Sequence`. Other threads send messages to its inbox; it reports the end of each job through
`on_job_end`. It never waits for Redis between two steps: a step's events are sent, and the journal's reply is read after the next step.
Depends on the `Engine` and `Journal` protocols next to it; independent of MLX, RQ and Redis.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue

from common.errors import RequestError
from common.protocol import Event, Failed, Finished, GenerationJob, encode
from worker.loop.admission import Admission
from worker.loop.early_aborts import EarlyAborts
from worker.loop.engine import Engine, InsertResult, PromptEcho, StepEvent, StepToken
from worker.loop.journal import AppendResult, Journal, JournalEntry
from worker.loop.messages import Abort, AbortReason, Admit, JobEnd, Message, Outcome, Shutdown
from worker.loop.progress import Progress
from worker.loop.sequence import Sequence, failed_event

log = logging.getLogger(__name__)

MAX_BURST_WAIT_SECONDS = 0.02
"""The longest that an idle loop delays its first prompt while intake is still taking jobs from the queue."""

_STEPS_PER_MEMORY_CHECK = 16
_MEAN_TOKENS_WEIGHT = 0.1
"""The weight of the latest answer in the moving average `mean_tokens`."""

_STOPPED = RequestError(
    "The request was stopped by an operator.", status=503, type="server_error", code="stopped"
)
_SEQUENCE_FAILED = RequestError(
    "The model failed while it generated this answer.", status=500, type="server_error"
)
_OUTCOMES = {
    AbortReason.CANCELLED: Outcome.FINISHED,
    AbortReason.STOPPED: Outcome.STOPPED,
    AbortReason.FENCED: Outcome.FENCED,
    AbortReason.REQUEUED: Outcome.REQUEUED,
}


class GenerationLoop:
    """See the module.

    Attributes:
        num_steps: Engine steps so far.
        num_tokens: Tokens generated so far.
        mean_tokens: Moving average of the lengths of finished answers; 0 before the first.
        progress: The engine call under way, for the watchdog.

    Args:
        on_job_end: Called on the loop's thread when a job has ended, exactly once for each `Admit`.
        live_ttl_seconds: The journal's time to live while its job is generated.
        final_ttl_seconds: The journal's time to live after its terminal event, unless the job has one of its own.
        orphan_seconds: Jobs whose channel has had no subscriber for this long are cancelled, unless they are detached.
        is_intake_busy: Whether intake is currently taking jobs from the queue. Called on the loop's thread.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        journal: Journal,
        inbox: SimpleQueue[Message],
        on_job_end: Callable[[JobEnd], None],
        live_ttl_seconds: int = 900,
        final_ttl_seconds: int = 300,
        orphan_seconds: float = 10.0,
        is_intake_busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._inbox = inbox
        self._on_job_end = on_job_end
        self._live_ttl_seconds = live_ttl_seconds
        self._final_ttl_seconds = final_ttl_seconds
        self._orphan_seconds = orphan_seconds
        self._is_intake_busy = is_intake_busy
        self._clock = clock
        self._admission = Admission(engine.has_room)
        self._running: dict[str, Sequence] = {}  # by job id, oldest first
        self._unsent_entries: list[JournalEntry] = []
        self._unsent_job_ends: list[JobEnd] = []  # their terminal events are in `_unsent_entries`
        self._in_flight_job_ends: list[JobEnd] = []  # their terminal events were sent; no reply yet
        self._is_in_flight = False
        self._early_aborts = EarlyAborts(clock)
        self._no_listeners_since_mono: dict[str, float] = {}  # by channel
        self._is_shutting_down = False
        self.num_steps = 0
        self.num_tokens = 0
        self.mean_tokens = 0.0
        self.progress = Progress("generation", clock)

    @property
    def is_admission_blocked(self) -> bool:
        """Whether a job is waiting to start, or a poison candidate runs alone: intake should pause. Read by other threads."""
        return len(self._admission) > 0 or self._admission.poison_candidate is not None

    def run(self) -> None:
        """Run until `Shutdown` was received and every job has ended."""
        while not (self._is_shutting_down and self._is_idle()):
            self.run_once()

    def run_once(self) -> None:
        """Handle the inbox, run one engine step, read the reply to the previous step's events, send this step's.

        Blocks on the inbox only while nothing runs, waits, or is in flight.
        """
        self._read_inbox()
        self._start_admissible()
        if self._unsent_job_ends:  # not delayed by the next step, which may prefill a long prompt
            self._flush()
        if self._running:
            for event in self._step():
                self._handle_step_event(event)
            if self.num_steps % _STEPS_PER_MEMORY_CHECK == 0:
                self._requeue_over_memory()
        if self._unsent_entries or self._unsent_job_ends or self._is_in_flight:
            self._flush()

    def _is_idle(self) -> bool:
        is_flushed = not (self._unsent_entries or self._unsent_job_ends or self._is_in_flight)
        return is_flushed and not self._running and not len(self._admission)

    def _read_inbox(self) -> None:
        if self._is_idle() and not self._is_shutting_down:
            self._handle_message(self._inbox.get())
            self._wait_for_burst()
        while not self._inbox.empty():
            self._handle_message(self._inbox.get())

    def _wait_for_burst(self) -> None:
        """Collect the other jobs of a burst before the first step of an idle loop.

        They arrive one by one; a job that misses the first prefill step has to wait for all of it.
        """
        start_mono = self._clock()
        wait_seconds = self._engine.burst_wait_seconds
        deadline_mono = start_mono + wait_seconds
        while (left_seconds := deadline_mono - self._clock()) > 0:
            with suppress(Empty):
                self._handle_message(self._inbox.get(timeout=left_seconds))
            now_mono = self._clock()
            if now_mono >= deadline_mono and self._is_intake_busy():
                deadline_mono = min(now_mono + wait_seconds, start_mono + MAX_BURST_WAIT_SECONDS)

    def _handle_message(self, message: Message) -> None:
        match message:
            case Admit():
                self._admit(message)
            case Abort():
                self._abort(message)
            case Shutdown():
                self._is_shutting_down = True

    def _admit(self, message: Admit) -> None:
        """Accept a job, to be continued from the end of its journal.

        1. A running execution of the same job must have lost its lease, since the job has come back: it is fenced.
        2. The journal has a terminal event: the previous worker died before RQ's bookkeeping, which is all that is left to do.
        3. The prompt could not be tokenized: the job fails.
        4. The job was aborted before it arrived: it ends as if it had been aborted now.
        5. Otherwise it starts when `Admission` allows it.
        """
        job_id = message.job.job_id
        self._abort(Abort(job_id, AbortReason.FENCED))  # 1
        terminal = message.journal[-1] if message.journal else None
        if isinstance(terminal, Finished | Failed):  # 2
            outcome = Outcome.FINISHED if isinstance(terminal, Finished) else Outcome.FAILED
            self._on_job_end(JobEnd(job_id, message.execution_id, outcome, terminal))
            return
        if isinstance(message.prompt, RequestError):  # 3
            self._fail_admission(message, message.prompt)
            return
        self._admission.add(message)
        if (reason := self._early_aborts.pop(job_id)) is not None:  # 4
            self._abort(Abort(job_id, reason))

    def _start_admissible(self) -> None:
        while (message := self._admission.pop_admissible(len(self._running))) is not None:
            self._start(message)

    def _start(self, message: Admit) -> None:
        """Insert a job into the engine; if the engine refuses it, only this job fails."""
        try:
            with self.progress.on("insert", message.job.job_id):
                result = self._engine.insert(
                    message.remaining_job, message.prompt_token_ids, message.replayed_token_ids
                )
        except Exception as error:  # noqa: BLE001 (any error that one request causes is its own failure)
            self._admission.clear_poison_candidate(message.job.job_id)
            self._fail_admission(message, error)
            return
        sequence = self._make_sequence(message, result)
        self._running[message.job.job_id] = sequence
        self._append(sequence, sequence.make_started())
        self._end_if_complete(sequence)

    def _fail_admission(self, message: Admit, error: Exception) -> None:
        """End a job that never ran; the client gets no details of an unexpected error."""
        if not isinstance(error, RequestError):
            log.error("job %s: the engine failed to accept it", message.job.job_id, exc_info=error)
            error = RequestError("The model could not take this request.", status=500, type="server_error")
        failed = failed_event(message.last_n + 1, error)
        self._append_terminal(message.job, message.execution_id, failed)
        self._unsent_job_ends.append(JobEnd(message.job.job_id, message.execution_id, Outcome.FAILED, failed))

    def _abort(self, message: Abort) -> None:
        job_id, reason = message.job_id, message.reason
        sequence = self._find_or_dequeue(job_id, message.execution_id)
        if sequence is None:
            self._early_aborts.record(job_id, reason)
            return
        terminal: Finished | Failed | None = None
        if reason is AbortReason.CANCELLED:
            terminal = sequence.make_finished("cancelled")
        elif reason is AbortReason.STOPPED:
            terminal = sequence.make_failed(_STOPPED)
        self._end(sequence, _OUTCOMES[reason], terminal)

    def _find_or_dequeue(self, job_id: str, execution_id: str | None) -> Sequence | None:
        """Return a running job's sequence, or remove a waiting job and return the sequence that it would have become.

        Args:
            execution_id: Only this execution of the job; None: any.
        """
        sequence = self._running.get(job_id)
        if sequence is not None and execution_id in (None, sequence.execution_id):
            return sequence
        waiting = self._admission.remove(job_id, execution_id)
        if waiting is None:
            return None
        return self._make_sequence(waiting, InsertResult(len(waiting.prompt_token_ids), max_tokens=0))

    def _make_sequence(self, message: Admit, result: InsertResult) -> Sequence:
        return Sequence(
            message.remaining_job,
            message.execution_id,
            result,
            last_n=message.last_n,
            num_tokens=len(message.replayed_token_ids),
        )

    def _step(self) -> list[StepEvent]:
        """Run one engine step.

        If it raises, any of its sequences may be the cause. Their leases are released, so that all of them are retried as if this
        worker had died.
        """
        self.num_steps += 1
        try:
            with self.progress.on("step"):
                return self._engine.step()
        except Exception:
            log.exception("a step failed; its %d sequences are retried", len(self._running))
            for sequence in list(self._running.values()):
                self._end(sequence, Outcome.CRASHED, None)
            return []

    def _requeue_over_memory(self) -> None:
        """Requeue the youngest sequences while the KV caches exceed their memory budget: answers grew longer than expected."""
        while len(self._running) > 1 and self._engine.is_over_memory:
            youngest = next(reversed(self._running.values()))
            log.warning("job %s is requeued: the KV caches exceed their memory budget", youngest.job.job_id)
            self._end(youngest, Outcome.REQUEUED, None)

    def _handle_step_event(self, event: StepEvent) -> None:
        sequence = self._running.get(event.job_id)
        if sequence is None:  # it ended earlier in this step
            return
        if isinstance(event, StepToken):
            self._handle_token(sequence, event)
        elif isinstance(event, PromptEcho):
            self._append(sequence, sequence.make_echo(event))
            self._end_if_complete(sequence)
        else:
            log.error("job %s failed", event.job_id, exc_info=event.error)
            self._end(sequence, Outcome.FAILED, sequence.make_failed(_SEQUENCE_FAILED))

    def _handle_token(self, sequence: Sequence, token: StepToken) -> None:
        # Runs for each token on the thread that launches the device's work: next to a GPU it never waits for the device.
        self.num_tokens += 1
        if self._admission.poison_candidate is not None:
            self._admission.clear_poison_candidate(token.job_id)
        delta, reason = sequence.make_delta(token)
        self._append(sequence, delta)
        if reason is not None:
            weight = _MEAN_TOKENS_WEIGHT if self.mean_tokens else 1.0
            self.mean_tokens += (sequence.num_tokens - self.mean_tokens) * weight
            self._end(sequence, Outcome.FINISHED, sequence.make_finished(reason))

    def _end_if_complete(self, sequence: Sequence) -> None:
        if sequence.is_complete:
            self._end(sequence, Outcome.FINISHED, sequence.make_finished("length"))

    def _end(self, sequence: Sequence, outcome: Outcome, terminal: Finished | Failed | None) -> None:
        """Release a job's sequence; its end is reported when the journal has confirmed all of its events."""
        job_id = sequence.job.job_id
        if self._running.pop(job_id, None) is not None:
            with self.progress.on("remove", job_id):
                self._engine.remove(job_id)
            self._admission.clear_poison_candidate(job_id)
        if terminal is not None:
            self._append_terminal(sequence.job, sequence.execution_id, terminal)
        self._unsent_job_ends.append(JobEnd(job_id, sequence.execution_id, outcome, terminal, sequence))

    def _append(self, sequence: Sequence, event: Event) -> None:
        job = sequence.job
        self._append_entry(job, sequence.execution_id, event, self._live_ttl_seconds if event.n == 1 else 0)

    def _append_terminal(self, job: GenerationJob, execution_id: str, terminal: Finished | Failed) -> None:
        self._append_entry(job, execution_id, terminal, job.final_ttl_seconds or self._final_ttl_seconds)

    def _append_entry(self, job: GenerationJob, execution_id: str, event: Event, ttl_seconds: int) -> None:
        self._unsent_entries.append(
            JournalEntry(job.channel, job.job_id, execution_id, event.n, encode(event).decode(), ttl_seconds)
        )

    def _flush(self) -> None:
        """Read the reply to the previous entries, then send the new ones. If there are none, report the ends of jobs now."""
        self._collect()
        if self._unsent_entries:
            self._journal.send(self._unsent_entries)
            self._is_in_flight, self._unsent_entries = True, []
            self._in_flight_job_ends, self._unsent_job_ends = self._unsent_job_ends, []
        else:
            for job_end in self._unsent_job_ends:
                self._on_job_end(job_end)
            self._unsent_job_ends = []

    def _collect(self) -> None:
        """Read the journal's reply, if one is due: report ends of jobs, fence refused executions, cancel orphans."""
        if not self._is_in_flight:
            return
        result = self._journal.collect()
        self._is_in_flight = False
        for job_end in self._in_flight_job_ends:
            is_fenced = job_end.execution_id in result.refused
            self._on_job_end(
                replace(job_end, outcome=Outcome.FENCED, terminal=None) if is_fenced else job_end
            )
        self._in_flight_job_ends = []
        for sequence in list(self._running.values()) if result.refused else []:
            if sequence.execution_id in result.refused:
                self._end(sequence, Outcome.FENCED, None)
        self._cancel_orphans(result)

    def _cancel_orphans(self, result: AppendResult) -> None:
        """Cancel the jobs of an API process whose channel has had no subscriber for a while: it died, and its clients with it."""
        now_mono = self._clock()
        for channel, num_listeners in result.listeners.items():
            if num_listeners:
                self._no_listeners_since_mono.pop(channel, None)
            elif (
                now_mono - self._no_listeners_since_mono.setdefault(channel, now_mono) >= self._orphan_seconds
            ):
                for sequence in [s for s in self._attached() if s.job.channel == channel]:
                    log.warning(
                        "job %s is cancelled: its API process no longer subscribes to it",
                        sequence.job.job_id,
                    )
                    self._abort(Abort(sequence.job.job_id, AbortReason.CANCELLED))
                del self._no_listeners_since_mono[channel]
        if self._no_listeners_since_mono:  # a channel without running jobs publishes nothing: forget it
            channels = {sequence.job.channel for sequence in self._attached()}
            self._no_listeners_since_mono = {
                channel: since_mono
                for channel, since_mono in self._no_listeners_since_mono.items()
                if channel in channels
            }

    def _attached(self) -> list[Sequence]:
        """The sequences whose clients listen; the others go on without."""
        return [sequence for sequence in self._running.values() if not sequence.job.is_detached]
