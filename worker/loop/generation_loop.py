"""The generation loop: which rows there are, what each step's tokens become, and when a job has ended.

Runs on one thread and owns every `Sequence`; other threads reach it by messages in its inbox, and it tells them how jobs
ended through `on_job_end`. Between two steps it never waits for Redis: a step's events are sent, their answer is read after
the next step. Knows neither MLX nor RQ nor Redis: an `Engine` and a `Journal` are given to it.
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
from worker.loop.engine import Engine, InsertResult, PromptEcho, SequenceFailure, StepEvent
from worker.loop.journal import AppendResult, Journal, JournalEntry
from worker.loop.messages import Abort, AbortReason, Admit, JobEnd, Message, Outcome, Shutdown
from worker.loop.sequence import Sequence, failed_event

log = logging.getLogger(__name__)

EARLY_ABORT_SECONDS = 30.0
"""How long an abort is kept for a job that is still on its way from intake."""

MAX_EARLY_ABORTS = 10_000
"""How many are kept; beyond, the oldest are forgotten."""

LONGEST_GATHER_SECONDS = 0.02
"""What a first prompt waits at most for others that are just being taken from the queue."""

_STEPS_PER_MEMORY_CHECK = 16
_MEAN_NEW_SHARE = 0.1

_STOPPED = RequestError(
    "The request was stopped by an operator.", status=503, type="server_error", code="stopped"
)
_ROW_FAILED = RequestError(
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
        num_steps: Decode and prefill steps so far.
        num_tokens: Generated so far.
        mean_tokens: Of the answers that were whole lately; 0: none yet.
        step_began_at: `clock` when the step under way began; None between steps, also while Redis is waited for.

    Args:
        on_job_end: Called on the loop's thread with each job's end, exactly once for each `Admit`.
        live_ttl_seconds: What a journal has to live while its job goes on.
        final_ttl_seconds: What it has to live after its terminal event.
        orphan_seconds: A channel that nobody has listened to for this long has its jobs cancelled.
        is_intake_busy: Says whether jobs are just being taken from the queue.
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
        self._more_coming = is_intake_busy
        self._clock = clock
        self._admission = Admission(engine.has_room)
        self._running: dict[str, Sequence] = {}
        self._rows: list[JournalEntry] = []
        self._endings: list[JobEnd] = []  # their terminal events are among `_rows`
        self._endings_in_flight: list[JobEnd] = []  # theirs were sent and are not answered
        self._in_flight = False
        self._early: dict[str, tuple[AbortReason, float]] = {}
        self._unheard_since: dict[str, float] = {}
        self._quitting = False
        self.num_steps = 0
        self.num_tokens = 0
        self.mean_tokens = 0.0
        self.step_began_at: float | None = None

    @property
    def is_admission_blocked(self) -> bool:
        """Whether nothing more is to come now: a job waits to start, or one is tried alone. Read by other threads."""
        return len(self._admission) > 0 or self._admission.poison_candidate is not None

    def run(self) -> None:
        """Turn until `Shutdown` came and everything is settled."""
        while not (self._quitting and self._is_idle()):
            self.run_once()

    def run_once(self) -> None:
        """One round: read the inbox, decode one step, read the last step's answer, send this one's.

        Blocks only when there is nothing to generate and nothing in flight.
        """
        self._read_inbox()
        self._start_waiting()
        if self._endings:  # these are not to wait for a step that may read a long prompt
            self._flush()
        if self._running:
            for token in self._step():
                self._take(token)
            if self.num_steps % _STEPS_PER_MEMORY_CHECK == 0:
                self._give_back_memory()
        if self._rows or self._endings or self._in_flight:
            self._flush()

    # -- the inbox ---------------------------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        return not (self._running or len(self._admission) or self._rows or self._endings or self._in_flight)

    def _read_inbox(self) -> None:
        if self._is_idle() and not self._quitting:
            self._handle(self._inbox.get())
            self._gather()
        while not self._inbox.empty():
            self._handle(self._inbox.get())

    def _gather(self) -> None:
        """After a rest: requests of one moment come one by one, and whoever misses the first prompt's step waits for it."""
        began = self._clock()
        pause_seconds = self._engine.burst_wait_seconds
        deadline = began + pause_seconds
        while (left_seconds := deadline - self._clock()) > 0:
            with suppress(Empty):
                self._handle(self._inbox.get(timeout=left_seconds))
            now = self._clock()
            if now >= deadline and self._more_coming():
                deadline = min(now + pause_seconds, began + LONGEST_GATHER_SECONDS)

    def _handle(self, message: Message) -> None:
        match message:
            case Admit():
                self._admit(message)
            case Abort():
                self._abort(message)
            case Shutdown():
                self._quitting = True

    def _admit(self, message: Admit) -> None:
        """Take a job, where its journal ends.

        1. A run of the same job under a lease that was lost is given up: its job has come back to this worker.
        2. A journal with a terminal event: the worker before died between that and RQ's books; only they are left.
        3. A job without a prompt ends as failed.
        4. A withdrawal that came before the job did: it ends as if it had come after.
        5. Else it starts as soon as `Admission` says so.
        """
        job_id = message.job.job_id
        self._abort(Abort(job_id, AbortReason.FENCED))
        terminal = message.journal[-1] if message.journal else None
        if isinstance(terminal, Finished | Failed):
            outcome = Outcome.FINISHED if isinstance(terminal, Finished) else Outcome.FAILED
            self._on_job_end(JobEnd(job_id, message.execution_id, outcome, terminal))
            return
        if isinstance(message.prompt, RequestError):
            self._refuse(message, message.prompt)
            return
        self._admission.add(message)
        if job_id in self._early:
            self._abort(Abort(job_id, self._early.pop(job_id)[0]))

    def _start_waiting(self) -> None:
        while (message := self._admission.next(len(self._running))) is not None:
            self._start(message)

    def _start(self, message: Admit) -> None:
        """Make a job a row; one that the engine refuses ends as failed, alone."""
        try:
            inserted = self._engine.insert(message.unread_job, message.token_ids, message.replay)
        except Exception as error:  # noqa: BLE001 (whatever one request does to the engine is its own failure)
            self._admission.clear_poison(message.job.job_id)
            self._refuse(message, error)
            return
        sequence = self._sequence(message, inserted)
        self._running[message.job.job_id] = sequence
        self._append(sequence, sequence.started())
        self._end_if_whole(sequence)

    def _refuse(self, message: Admit, error: Exception) -> None:
        if not isinstance(error, RequestError):
            log.error("job %s could not be taken", message.job.job_id, exc_info=error)
            error = RequestError("The model could not take this request.", status=500, type="server_error")
        failed = failed_event(message.last_n + 1, error)
        self._rows.append(self._row(message.job, message.execution_id, failed))
        self._endings.append(JobEnd(message.job.job_id, message.execution_id, Outcome.FAILED, failed))

    def _abort(self, message: Abort) -> None:
        job_id, why = message.job_id, message.why
        sequence = self._found(job_id, message.execution_id)
        if sequence is None:
            self._remember_early(job_id, why)
            return
        terminal: Finished | Failed | None = None
        if why is AbortReason.CANCELLED:
            terminal = sequence.finished("cancelled")
        elif why is AbortReason.STOPPED:
            terminal = sequence.failed(_STOPPED)
        self._end(sequence, _OUTCOMES[why], terminal)

    def _found(self, job_id: str, execution_id: str | None) -> Sequence | None:
        """A job's run, or what would have become of it if it still waits to start; it waits no more then."""
        sequence = self._running.get(job_id)
        if sequence is not None and execution_id in (None, sequence.execution_id):
            return sequence
        waiting = self._admission.remove(job_id, execution_id)
        if waiting is None:
            return None
        return self._sequence(waiting, InsertResult(len(waiting.token_ids), max_tokens=0))

    def _sequence(self, message: Admit, inserted: InsertResult) -> Sequence:
        n, num_tokens = message.last_n, len(message.replay)
        return Sequence(message.unread_job, message.execution_id, inserted, n=n, num_tokens=num_tokens)

    def _remember_early(self, job_id: str, why: AbortReason) -> None:
        """Every worker of the model hears of every job: most of these are another's, and are forgotten soon."""
        now = self._clock()
        while self._early and (
            len(self._early) >= MAX_EARLY_ABORTS
            or now - next(iter(self._early.values()))[1] >= EARLY_ABORT_SECONDS
        ):
            del self._early[next(iter(self._early))]
        if why in (AbortReason.CANCELLED, AbortReason.STOPPED):
            self._early[job_id] = (why, now)

    # -- a step ------------------------------------------------------------------------------------------------------

    def _step(self) -> list[StepEvent]:
        """One step of the engine. One that raises may be any of its rows' fault: they go back to the queue, and what
        comes of it is the same as when the worker dies.
        """
        self.num_steps += 1
        self.step_began_at = self._clock()
        try:
            return self._engine.step()
        except Exception:
            log.exception("a step failed with %d rows; they are tried again", len(self._running))
            for sequence in list(self._running.values()):
                self._end(sequence, Outcome.CRASHED, None)
            return []
        finally:
            self.step_began_at = None

    def _give_back_memory(self) -> None:
        """Answers that grew longer than expected: the youngest rows go back to the queue, until the others have room."""
        while len(self._running) > 1 and self._engine.is_over_memory:
            youngest = next(reversed(self._running.values()))
            log.warning("job %s goes back to the queue: memory is short", youngest.job.job_id)
            self._end(youngest, Outcome.REQUEUED, None)

    def _take(self, token: StepEvent) -> None:
        sequence = self._running.get(token.job_id)
        if sequence is None:  # ended earlier in this step
            return
        if isinstance(token, SequenceFailure):
            log.error("job %s failed", token.job_id, exc_info=token.error)
            self._end(sequence, Outcome.FAILED, sequence.failed(_ROW_FAILED))
            return
        if isinstance(token, PromptEcho):
            self._append(sequence, sequence.echo(token))
            self._end_if_whole(sequence)
            return
        self.num_tokens += 1
        self._admission.clear_poison(token.job_id)
        delta, reason = sequence.take(token)
        self._append(sequence, delta)
        if reason is not None:
            share = _MEAN_NEW_SHARE if self.mean_tokens else 1.0
            self.mean_tokens += (sequence.num_tokens - self.mean_tokens) * share
            self._end(sequence, Outcome.FINISHED, sequence.finished(reason))

    def _end_if_whole(self, sequence: Sequence) -> None:
        """A job that may generate nothing more is whole once its prompt was accepted, and echoed where that is asked for.

        None more than others have generated already, where this worker's memory has room for a shorter context than theirs.
        """
        if sequence.num_tokens >= sequence.insert_result.max_tokens and sequence.is_echoed:
            self._end(sequence, Outcome.FINISHED, sequence.finished("length"))

    def _end(self, sequence: Sequence, outcome: Outcome, terminal: Finished | Failed | None) -> None:
        """Let go of a job; the end is settled once everything of it is answered for."""
        job_id = sequence.job.job_id
        if self._running.pop(job_id, None) is not None:
            self._engine.remove(job_id)
            self._admission.clear_poison(job_id)
        if terminal is not None:
            self._append(sequence, terminal)
        self._endings.append(JobEnd(job_id, sequence.execution_id, outcome, terminal, sequence))

    # -- the journal -------------------------------------------------------------------------------------------------

    def _append(self, sequence: Sequence, event: Event) -> None:
        self._rows.append(self._row(sequence.job, sequence.execution_id, event))

    def _row(self, job: GenerationJob, execution_id: str, event: Event) -> JournalEntry:
        ttl_seconds = 0
        if isinstance(event, Finished | Failed):
            ttl_seconds = self._final_ttl_seconds
        elif event.n == 1:
            ttl_seconds = self._live_ttl_seconds
        return JournalEntry(job.channel, job.job_id, execution_id, event.n, encode(event), ttl_seconds)

    def _flush(self) -> None:
        """Read the answer to what was sent, then send what there is; an end with nothing to send is settled now."""
        self._collect()
        if self._rows:
            self._journal.send(self._rows)
            self._in_flight, self._rows = True, []
            self._endings_in_flight, self._endings = self._endings, []
        else:
            for ending in self._endings:
                self._on_job_end(ending)
            self._endings = []

    def _collect(self) -> None:
        if not self._in_flight:
            return
        receipt = self._journal.collect()
        self._in_flight = False
        for ending in self._endings_in_flight:
            fenced = ending.execution_id in receipt.refused
            self._on_job_end(replace(ending, outcome=Outcome.FENCED, terminal=None) if fenced else ending)
        self._endings_in_flight = []
        for sequence in list(self._running.values()) if receipt.refused else []:
            if sequence.execution_id in receipt.refused:
                self._end(sequence, Outcome.FENCED, None)
        self._withdraw_unheard(receipt)

    def _withdraw_unheard(self, receipt: AppendResult) -> None:
        """Cancel the jobs of an API process that has not listened for a while: it died, and its clients with it."""
        now = self._clock()
        for channel, num_listeners in receipt.listeners.items():
            if num_listeners:
                self._unheard_since.pop(channel, None)
            elif now - self._unheard_since.setdefault(channel, now) >= self._orphan_seconds:
                for sequence in [s for s in self._running.values() if s.job.channel == channel]:
                    log.warning("nobody listens for job %s any more", sequence.job.job_id)
                    self._abort(Abort(sequence.job.job_id, AbortReason.CANCELLED))
                del self._unheard_since[channel]
        if self._unheard_since:  # silence counts while there is something to hear
            channels = {sequence.job.channel for sequence in self._running.values()}
            self._unheard_since = {k: v for k, v in self._unheard_since.items() if k in channels}
