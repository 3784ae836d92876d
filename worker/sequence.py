"""One job while it is generated: how far its journal is, its stop strings, its counts and clocks.

Owned by the generation loop, on its thread. Turns an engine's `StepToken` into events; knows no queue and no Redis.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import RequestError
from common.protocol import Delta, Echo, Failed, Finished, FinishReason, GenerationJob, Started, Usage
from worker.engine import Inserted, PromptRead, StepToken
from worker.stop_strings import StopMatcher


@dataclass(slots=True)
class Sequence:
    """The state of one row.

    Attributes:
        execution_id: RQ's id of this run of the job; its key in Redis is the lease.
        n: Of the last event that was made; the next one gets `n + 1`.
        num_tokens: Generated so far, by other workers too.
    """

    job: GenerationJob
    execution_id: str
    inserted: Inserted
    n: int = 0
    num_tokens: int = 0
    admitted_at: float = field(default_factory=time.time)
    first_token_at: float | None = None
    num_generated_here: int = 0
    is_echoed: bool = field(init=False)
    _stops: StopMatcher = field(init=False)

    def __post_init__(self) -> None:
        self.is_echoed = not self.job.echo
        self._stops = StopMatcher(self.job.stop)
        for text in self.inserted.replayed_texts:
            self._stops.feed(text)

    def started(self) -> Started:
        """The event that says that the prompt was accepted."""
        return Started(0, self.inserted.prompt_tokens, self.inserted.cached_tokens)

    def echo(self, read: PromptRead) -> Echo:
        """The event with the prompt."""
        self.is_echoed = True
        self.n += 1
        return Echo(self.n, read.text, read.tokens, read.tops)

    def take(
        self, token: StepToken, now: Callable[[], float] = time.time
    ) -> tuple[Delta, FinishReason | None]:
        """Account for one more token; says why the answer is whole with it, if it is."""
        if self.first_token_at is None:
            self.first_token_at = now()
        self.num_generated_here += 1
        text, stopped = self._stops.feed(token.text)
        reason: FinishReason | None = "stop" if stopped else token.finish_reason
        if reason is not None and not stopped:
            text += self._stops.flush()
        self.n += 1
        self.num_tokens += 1
        return Delta(self.n, token.token_id, text, token.logprob, token.top), reason

    def finished(self, reason: FinishReason) -> Finished:
        """The terminal event of an answer that is whole, or that nobody wants any more."""
        usage = Usage(self.inserted.prompt_tokens, self.num_tokens, self.inserted.cached_tokens)
        self.n += 1
        return Finished(self.n, reason, usage)

    def failed(self, error: RequestError) -> Failed:
        """The terminal event of an error."""
        self.n += 1
        return failed_event(self.n, error)


def failed_event(n: int, error: RequestError) -> Failed:
    """`error` as the wire says it."""
    return Failed(
        n, error.message, error.status, error.type, error.param, error.code, error.retry_after_seconds
    )
