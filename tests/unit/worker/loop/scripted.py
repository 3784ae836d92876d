"""A scripted engine and journal, and a generation loop between them: `LoopHarness`, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    job_id: str,
    *,
    max_tokens: int = 3,
    stop: list[str] | None = None,
    channel: str = "c",
    sampling: SamplingParams | None = None,
    **fields: Any,
) -> GenerationJob:
    return GenerationJob(
        job_id=job_id,
        model="m",
        channel=channel,
        prompt=TextPrompt("x"),
        max_tokens=max_tokens,
        stop=stop or [],
        sampling=sampling or SamplingParams(),
        **fields,
    )


class ScriptedEngine:
    """An `Engine` without a model: the k-th token of a sequence has the id k and the text `texts[job_id][k - 1]`, or " k".

    Attributes:
        sequences: By job id: the number of tokens so far, and the limit.
        refused: What `insert` raises for a job.
        step_error: What the next step raises, once.
        sequence_error: A job that fails alone in the next step, and its error.
        is_prefilling: Steps produce no tokens.
        is_full: `has_room` answers no.
        max_sequences: More than this exceed the memory budget.
    """

    def __init__(self, texts: dict[str, list[str]] | None = None) -> None:
        self.info = ModelInfo(context_length=1000, vocab_size=1000, max_batch=8)
        self.sequences: dict[str, list[int]] = {}
        self.texts = texts or {}
        self.refused: dict[str, Exception] = {}
        self.step_error: Exception | None = None
        self.is_prefilling = False
        self.burst_wait_seconds = 0.0
        self.is_full = False
        self.max_sequences = 99
        self.sequence_error: tuple[str, Exception] | None = None
        self.make_parser: Callable[[GenerationJob], AnswerParser] | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)

    def encode(self, job: GenerationJob) -> list[int]:
        return [0]

    @property
    def is_over_memory(self) -> bool:
        return len(self.sequences) > self.max_sequences

    def has_room(self, job: GenerationJob, num_prompt_tokens: int, num_answer_tokens: int) -> bool:
        return not self.is_full

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        if job.job_id in self.refused:
            raise self.refused[job.job_id]
        assert job.job_id not in self.sequences
        self.sequences[job.job_id] = [len(replay), job.max_tokens or 3]
        texts = [self._text(job.job_id, k) for k in replay]
        parser = self.make_parser(job) if self.make_parser is not None else None
        return InsertResult(
            prompt_tokens=1, max_tokens=job.max_tokens or 3, replayed_texts=texts, parser=parser
        )

    def remove(self, job_id: str) -> None:
        self.sequences.pop(job_id, None)

    def step(self) -> list[StepEvent]:
        assert self.sequences, "a step without sequences"
        if self.step_error is not None:
            error, self.step_error, self.sequences = self.step_error, None, {}
            raise error
        if self.is_prefilling:
            return []
        tokens: list[StepEvent] = []
        if self.sequence_error is not None and self.sequences.pop(self.sequence_error[0], None):
            tokens.append(SequenceFailure(*self.sequence_error))
            self.sequence_error = None
        for job_id, counts in list(self.sequences.items()):
            counts[0] += 1
            is_last = counts[0] >= counts[1]
            if is_last:
                del self.sequences[job_id]
            tokens.append(
                StepToken(job_id, counts[0], self._text(job_id, counts[0]), "length" if is_last else None)
            )
        return tokens

    def _text(self, job_id: str, k: int) -> str:
        texts = self.texts.get(job_id, [])
        return texts[k - 1] if k <= len(texts) else f" {k}"


class ScriptedJournal:
    """A `Journal` in memory that executes each call at once, as Redis does; refuses the executions in `refused`."""

    def __init__(self) -> None:
        self.entries: dict[str, list[JournalEntry]] = {}
        self.published: list[JournalEntry] = []
        self.refused: set[str] = set()
        self.num_listeners = 1
        self._answer: AppendResult | None = None

    def send(self, entries: Sequence[JournalEntry]) -> None:
        assert self._answer is None, "the previous call was not collected"
        assert entries, "nothing to send"
        accepted = [entry for entry in entries if entry.execution_id not in self.refused]
        for entry in accepted:
            self.published.append(entry)
            if entry.n:
                written = self.entries.setdefault(entry.job_id, [])
                assert entry.n == len(written) + 1, f"{entry.job_id}: {entry.n} after {len(written)}"
                written.append(entry)
        channels = {entry.channel for entry in accepted}
        refused = {entry.execution_id for entry in entries} & self.refused
        self._answer = AppendResult(refused, dict.fromkeys(channels, self.num_listeners))

    def collect(self) -> AppendResult:
        assert self._answer is not None, "nothing was sent"
        answer, self._answer = self._answer, None
        return answer

    def events(self, job_id: str) -> list[object]:
        return [decode_event(entry.event) for entry in self.entries.get(job_id, [])]


class LoopHarness:
    """A generation loop with a scripted engine, journal and clock (`now`)."""

    def __init__(self, texts: dict[str, list[str]] | None = None) -> None:
        self.engine = ScriptedEngine(texts)
        self.journal = ScriptedJournal()
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.job_ends: list[JobEnd] = []
        self.now = 0.0
        self.loop = GenerationLoop(
            engine=self.engine,
            journal=self.journal,
            inbox=self.inbox,
            on_job_end=self.job_ends.append,
            orphan_seconds=10.0,
            clock=lambda: self.now,
        )

    def run(self, *messages: Message, times: int = 1) -> None:
        """Put `messages` into the inbox, then run the loop `times` times."""
        for message in messages:
            self.inbox.put(message)
        for _ in range(times):
            self.loop.run_once()

    def run_until(self, is_done: Callable[[], bool], limit: int = 50) -> None:
        for _ in range(limit):
            if is_done():
                return
            self.loop.run_once()
        raise AssertionError(f"not done after {limit} iterations")


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
