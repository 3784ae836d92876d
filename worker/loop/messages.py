"""The messages between the worker's threads: admissions and aborts to the generation loop, ends of jobs from it.

Frozen values; the receiver owns what they refer to. Sent by intake, the main thread and RQ's pub/sub thread; `JobEnd` is received by
the finalizer. Independent of RQ and Redis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from common.errors import RequestError
from common.protocol import Delta, Echo, Event, Failed, Finished, GenerationJob
from worker.loop.sequence import Sequence


class AbortReason(Enum):
    """Why a job is removed before its answer is complete."""

    CANCELLED = "cancelled"
    """Its client disconnected."""
    STOPPED = "stopped"
    """An operator stopped it, with RQ's stop-job command."""
    FENCED = "fenced"
    """Its lease is lost: another worker owns it, and nothing more may be written."""
    REQUEUED = "requeued"
    """This worker is draining; another worker will continue."""


class Outcome(Enum):
    """How a job's RQ execution ended; decides its RQ bookkeeping."""

    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    FENCED = "fenced"
    REQUEUED = "requeued"
    CRASHED = "crashed"
    """A step failed for the complete batch: the job is retried as if the worker had died."""


@dataclass(frozen=True, slots=True)
class Admit:
    """To the loop: generate a job for which this worker holds a lease.

    Attributes:
        prompt: Its token ids, or the error that kept it from being tokenized.
        journal: The events that other workers have written, in order; empty for a new job.
        is_poison_candidate: Whether it was running when workers crashed repeatedly.
    """

    job: GenerationJob
    execution_id: str
    prompt: list[int] | RequestError
    journal: list[Event] = field(default_factory=list)
    is_poison_candidate: bool = False

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt.

        Raises:
            RequestError: It could not be tokenized.
        """
        if isinstance(self.prompt, RequestError):
            raise self.prompt
        return self.prompt

    @property
    def last_n(self) -> int:
        """The number of the journal's last event; 0 if the journal is empty."""
        return self.journal[-1].n if self.journal else 0

    @property
    def remaining_job(self) -> GenerationJob:
        """The job without what other workers have done already: the echo of the prompt, and `Started` as the journal's first event."""
        if not self.journal:
            return self.job
        is_echoed = any(isinstance(event, Echo) for event in self.journal)
        return msgspec.structs.replace(self.job, echo=self.job.echo and not is_echoed, journals_started=False)

    @property
    def replayed_token_ids(self) -> list[int]:
        """The tokens of the answer that other workers have generated, in order."""
        return [event.token_id for event in self.journal if isinstance(event, Delta)]


@dataclass(frozen=True, slots=True)
class Abort:
    """To the loop: remove a job. The job may be unknown, or not have arrived yet.

    Attributes:
        execution_id: Remove only this execution of the job; None: any.
    """

    job_id: str
    reason: AbortReason
    execution_id: str | None = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """To the loop: return from `run` once all jobs have ended and the journal is written."""


@dataclass(frozen=True, slots=True)
class JobEnd:
    """From the loop: a job has ended on this worker, and all of its events are in the journal.

    Attributes:
        terminal: Its terminal event; None if another worker continues.
        sequence: Its final state; None if it ended before it was started here.
    """

    job_id: str
    execution_id: str
    outcome: Outcome
    terminal: Finished | Failed | None = None
    sequence: Sequence | None = None


Message = Admit | Abort | Shutdown
