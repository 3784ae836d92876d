"""One job while it is generated: how far its journal is, what its text means, its stop strings, its counts and clocks.

Owned by the generation loop, on its thread. Turns an engine's `StepToken` into events; knows no queue and no Redis.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import RequestError
from common.protocol import (
    Delta,
    Echo,
    Failed,
    Finished,
    FinishReason,
    GenerationJob,
    Piece,
    Reasoning,
    Started,
    Usage,
)
from worker.loop.engine import InsertResult, PromptEcho, StepToken
from worker.text.answer_parser import AnswerParser
from worker.text.stop_strings import StopMatcher
from worker.text.tool_calls import Part


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
    insert_result: InsertResult
    n: int = 0
    num_tokens: int = 0
    admitted_at: float = field(default_factory=time.time)
    first_token_at: float | None = None
    num_generated_here: int = 0
    is_echoed: bool = field(init=False)
    _stops: StopMatcher = field(init=False)
    _num_reasoning: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.is_echoed = not self.job.echo
        self._stops = StopMatcher(self.job.stop)
        parser = self.insert_result.parser
        for text in self.insert_result.replayed_texts:
            if parser is None:
                self._stops.feed(text)
            else:
                self._without_stops(self._parts(parser, text))

    def started(self) -> Started:
        """The event that says that the prompt was accepted."""
        return Started(0, self.insert_result.prompt_tokens, self.insert_result.cached_tokens)

    def echo(self, read: PromptEcho) -> Echo:
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
        self.num_tokens += 1
        self.n += 1
        if self.insert_result.parser is not None:
            return self._take_apart(self.insert_result.parser, token)
        text, stopped = self._stops.feed(token.text)
        reason: FinishReason | None = "stop" if stopped else token.finish_reason
        if reason is not None and not stopped:
            text += self._stops.flush()
        return Delta(self.n, token.token_id, text, token.logprob, token.top), reason

    def _take_apart(self, parser: AnswerParser, token: StepToken) -> tuple[Delta, FinishReason | None]:
        """As `take`, where not all is content.

        1. A stop string in the content ends the answer; what follows it is dropped.
        2. So does a parser that wants no more.
        3. Else the engine knows; what was held back comes out with its last token.
        4. An answer that ended other than by its length calls functions, if it has a call.
        """
        text, pieces, stopped = self._without_stops(self._parts(parser, token.text))
        reason: FinishReason | None = "stop" if stopped or parser.is_finished else token.finish_reason
        if reason is not None and not stopped:
            rest, more, stopped = self._without_stops(parser.flush(is_cut=reason == "length"))
            text, pieces = text + rest, pieces + more
            if stopped:
                reason = "stop"
            else:
                text += self._stops.flush()
        if reason == "stop" and parser.has_call:
            reason = "tool_calls"
        if not (text or parser.holds_content or self._stops.is_holding):  # it was none, nor will it be
            return Delta(self.n, token.token_id, pieces=pieces), reason
        return Delta(self.n, token.token_id, text, token.logprob, token.top, pieces), reason

    def _parts(self, parser: AnswerParser, text: str) -> list[Part]:
        is_reasoning = parser.is_reasoning
        parts = parser.feed(text)
        if is_reasoning or parser.is_reasoning or any(isinstance(part, Reasoning) for part in parts):
            self._num_reasoning += 1
        return parts

    def _without_stops(self, parts: list[Part]) -> tuple[str, list[Piece], bool]:
        """Content, what is beside it, and whether a stop string ended it; stop strings do not span calls."""
        text, pieces = "", list[Piece]()
        for part in parts:
            if not isinstance(part, str):
                text += self._stops.flush()
                pieces.append(part)
                continue
            certain, stopped = self._stops.feed(part)
            text += certain
            if stopped:
                return text, pieces, True
        return text, pieces, False

    def finished(self, reason: FinishReason) -> Finished:
        """The terminal event of an answer that is whole, or that nobody wants any more."""
        usage = Usage(
            self.insert_result.prompt_tokens,
            self.num_tokens,
            self.insert_result.cached_tokens,
            self._num_reasoning,
        )
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
