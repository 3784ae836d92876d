"""What the worker's threads tell each other: jobs and withdrawals to the generation loop, ends of jobs from it.

Frozen values; whoever gets one owns what it says. Read by intake, the main thread, the loop and job_end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import msgspec

from common.errors import RequestError
from common.protocol import Delta, Echo, Event, Failed, Finished, GenerationJob

if TYPE_CHECKING:
    from worker.loop.sequence import Sequence


class AbortReason(Enum):
    """Why a job leaves before its answer is whole."""

    CANCELLED = "cancelled"
    """Its client left."""
    STOPPED = "stopped"
    """An operator stopped it, with RQ's stop-job."""
    FENCED = "fenced"
    """Its lease is lost: it is another worker's now, and nothing more may be written."""
    REQUEUED = "handed over"
    """This worker drains: another one is to go on."""


class Outcome(Enum):
    """What becomes of a job's RQ execution."""

    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    FENCED = "fenced"
    REQUEUED = "handed over"
    CRASHED = "crashed"
    """A step failed with it and perhaps others: it is tried again as if the worker had died."""


@dataclass(frozen=True, slots=True)
class Admit:
    """To the loop: a job that this worker holds a lease for.

    Attributes:
        prompt: Its token ids, or why there are none.
        journal: What other workers wrote of it, in order; empty for a fresh job.
        is_poison_candidate: Whether workers died with it again and again: it may be why.
    """

    job: GenerationJob
    execution_id: str
    prompt: list[int] | RequestError
    journal: list[Event] = field(default_factory=list)
    is_poison_candidate: bool = False

    @property
    def token_ids(self) -> list[int]:
        """The prompt.

        Raises:
            RequestError: There is none.
        """
        if isinstance(self.prompt, RequestError):
            raise self.prompt
        return self.prompt

    @property
    def last_n(self) -> int:
        """Of the last event in the journal; 0: none."""
        return self.journal[-1].n if self.journal else 0

    @property
    def unread_job(self) -> GenerationJob:
        """The job without what others have done of it beside tokens: the echo of its prompt."""
        if any(isinstance(event, Echo) for event in self.journal):
            return msgspec.structs.replace(self.job, echo=False)
        return self.job

    @property
    def replay(self) -> list[int]:
        """Token ids that other workers generated."""
        return [event.token_id for event in self.journal if isinstance(event, Delta)]


@dataclass(frozen=True, slots=True)
class Abort:
    """To the loop: a job is to leave (or only one run of it). One that is not here (yet) is fine."""

    job_id: str
    why: AbortReason
    execution_id: str | None = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """To the loop: return, once nothing is in flight."""


@dataclass(frozen=True, slots=True)
class JobEnd:
    """From the loop: a job has ended here, and everything of it is in the journal.

    Attributes:
        terminal: Its terminal event; None where another worker goes on.
    """

    job_id: str
    execution_id: str
    outcome: Outcome
    terminal: Finished | Failed | None = None
    sequence: Sequence | None = None


Message = Admit | Abort | Shutdown
