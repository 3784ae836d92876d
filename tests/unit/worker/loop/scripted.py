"""A scripted engine and journal: what the generation loop talks to, under a test's control."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from common.errors import RequestError
from common.protocol import GenerationJob, SamplingParams, TextPrompt, decode_event
from worker.loop.engine import InsertResult, ModelInfo, SequenceFailure, StepEvent, StepToken
from worker.loop.generation_loop import GenerationLoop
from worker.loop.journal import AppendResult, JournalEntry
from worker.loop.messages import Admit, JobEnd, Message
from worker.text.answer_parser import AnswerParser


def make_job(
    job_id: str, *, max_tokens: int = 3, stop: list[str] | None = None, channel: str = "c"
) -> GenerationJob:
    return GenerationJob(
        job_id=job_id,
        model="m",
        channel=channel,
        prompt=TextPrompt("x"),
        max_tokens=max_tokens,
        stop=stop or [],
        sampling=SamplingParams(),
    )


class ScriptedEngine:
    """Token k of a row has the id k and the text `texts[k - 1]`, or " k"."""

    def __init__(self, texts: dict[str, list[str]] | None = None) -> None:
        self.info = ModelInfo(context_length=1000, vocab_size=1000, max_batch=8)
        self.rows: dict[str, list[int]] = {}  # tokens so far, tokens in all
        self.texts = texts or {}
        self.refused: dict[str, Exception] = {}
        self.step_error: Exception | None = None
        self.is_reading = False
        self.burst_wait_seconds = 0.0
        self.is_full = False
        self.max_rows = 99
        self.row_error: tuple[str, Exception] | None = None
        self.make_parser: Callable[[GenerationJob], AnswerParser] | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.rows)

    def encode(self, job: GenerationJob) -> list[int]:
        return [0]

    @property
    def is_over_memory(self) -> bool:
        return len(self.rows) > self.max_rows

    def has_room(self, job: GenerationJob, num_prompt: int, num_done: int) -> bool:
        return not self.is_full

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        if job.job_id in self.refused:
            raise self.refused[job.job_id]
        assert job.job_id not in self.rows
        self.rows[job.job_id] = [len(replay), job.max_tokens or 3]
        texts = [self._text(job.job_id, k) for k in replay]
        parser = self.make_parser(job) if self.make_parser is not None else None
        return InsertResult(
            prompt_tokens=1, max_tokens=job.max_tokens or 3, replayed_texts=texts, parser=parser
        )

    def remove(self, job_id: str) -> None:
        self.rows.pop(job_id, None)

    def step(self) -> list[StepEvent]:
        assert self.rows, "nothing to do"
        if self.step_error is not None:
            error, self.step_error, self.rows = self.step_error, None, {}
            raise error
        if self.is_reading:
            return []
        tokens: list[StepEvent] = []
        if self.row_error is not None and self.rows.pop(self.row_error[0], None):
            tokens.append(SequenceFailure(*self.row_error))
            self.row_error = None
        for job_id, row in list(self.rows.items()):
            row[0] += 1
            is_last = row[0] >= row[1]
            if is_last:
                del self.rows[job_id]
            tokens.append(
                StepToken(job_id, row[0], self._text(job_id, row[0]), "length" if is_last else None)
            )
        return tokens

    def _text(self, job_id: str, k: int) -> str:
        texts = self.texts.get(job_id, [])
        return texts[k - 1] if k <= len(texts) else f" {k}"


class ScriptedJournal:
    """Carries out each call at once, as Redis does; refuses the executions that a test says are another worker's."""

    def __init__(self) -> None:
        self.entries: dict[str, list[JournalEntry]] = {}
        self.published: list[JournalEntry] = []
        self.refused: set[str] = set()
        self.num_listeners = 1
        self._answer: AppendResult | None = None

    def send(self, rows: list[JournalEntry]) -> None:
        assert self._answer is None, "the call before was not collected"
        assert rows, "nothing to send"
        accepted = [row for row in rows if row.execution_id not in self.refused]
        for row in accepted:
            self.published.append(row)
            if row.n:
                written = self.entries.setdefault(row.job_id, [])
                assert row.n == len(written) + 1, f"{row.job_id}: {row.n} after {len(written)}"
                written.append(row)
        channels = {row.channel for row in accepted}
        refused = {row.execution_id for row in rows} & self.refused
        self._answer = AppendResult(refused, dict.fromkeys(channels, self.num_listeners))

    def collect(self) -> AppendResult:
        assert self._answer is not None, "nothing was sent"
        answer, self._answer = self._answer, None
        return answer

    def events(self, job_id: str) -> list[object]:
        return [decode_event(row.event) for row in self.entries.get(job_id, [])]


class Bench:
    """A loop with everything scripted around it."""

    def __init__(self, texts: dict[str, list[str]] | None = None) -> None:
        self.engine = ScriptedEngine(texts)
        self.journal = ScriptedJournal()
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.settled: list[JobEnd] = []
        self.now = 0.0
        self.loop = GenerationLoop(
            engine=self.engine,
            journal=self.journal,
            inbox=self.inbox,
            on_job_end=self.settled.append,
            orphan_seconds=10.0,
            clock=lambda: self.now,
        )

    def turn(self, *messages: Message, times: int = 1) -> None:
        """Some rounds; the messages are there at the first."""
        for message in messages:
            self.inbox.put(message)
        for _ in range(times):
            self.loop.run_once()

    def turn_until(self, is_done: Callable[[], bool], limit: int = 50) -> None:
        for _ in range(limit):
            if is_done():
                return
            self.loop.run_once()
        raise AssertionError("it never came to that")


def refusal(message: str = "no") -> RequestError:
    return RequestError(message, param="prompt")


def admit(
    job_id: str,
    execution_id: str | None = None,
    journal: list[Any] | None = None,
    *,
    is_poison_candidate: bool = False,
    **job: Any,
) -> Admit:
    return Admit(
        make_job(job_id, **job), execution_id or f"{job_id}-1", [0], journal or [], is_poison_candidate
    )
