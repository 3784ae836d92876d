"""The seam between the generation loop and what makes tokens.

The loop decides; an engine acts. `MLXEngine` is the real one, `bench.harness.synthetic_worker` has one without a model, and tests
script one, so that every decision of the loop is tested in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from common.protocol import GenerationJob, TokenLogprob
from worker.text.answer_parser import AnswerParser


@dataclass(slots=True)
class InsertResult:
    """What an engine says of a job that it took.

    Attributes:
        prompt_tokens: Length of the prompt.
        cached_tokens: How many of those were not read again; the engine knows it by the job's first token.
        max_tokens: How many tokens the job may generate, those replayed included: as asked, or what the context
            has room for.
        replayed_texts: The text of each replayed token, in order, before any stop string is looked for.
        parser: Takes the text apart, fresh: `replayed_texts` are yet to be fed to it; None: all of it is content.
    """

    prompt_tokens: int
    max_tokens: int
    cached_tokens: int = 0
    replayed_texts: list[str] = field(default_factory=list)
    parser: AnswerParser | None = None


class StepToken(msgspec.Struct, frozen=True):  # a dataclass would cost a microsecond more a token
    """One token of one job.

    Attributes:
        token_id: What was sampled.
        text: Characters that became whole with it; with a `finish_reason`, all that was left.
        finish_reason: Set on the job's last token; the engine has let go of the row then.
        logprob: The token's own, where the job asked for it.
        top: The most likely tokens, best first, where the job asked for them.
    """

    job_id: str
    token_id: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprob: TokenLogprob | None = None
    top: list[TokenLogprob] = []


class PromptEcho(msgspec.Struct, frozen=True):
    """The prompt of a job that wants it echoed; comes before its first token.

    Attributes:
        text: The prompt's.
        tokens: Its tokens, where log-probabilities were asked for, as in `common.protocol.Echo`.
        tops: As there.
    """

    job_id: str
    text: str
    tokens: list[TokenLogprob] = []
    tops: list[list[TokenLogprob]] = []


class SequenceFailure(msgspec.Struct, frozen=True):
    """One job cannot go on (its sampler or a logits processor raised); the engine has let go of its row."""

    job_id: str
    error: Exception


StepEvent = StepToken | PromptEcho | SequenceFailure


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the model card says that only the engine knows; see `common.protocol.ModelCard`."""

    context_length: int
    vocab_size: int
    max_batch: int
    quantization: str = ""
    has_chat_template: bool = True
    can_fill: bool = False


class Engine(Protocol):
    """Rows that are decoded together. Made and used on one thread but for `encode`; jobs come between two steps."""

    @property
    def info(self) -> ModelInfo:
        """What was loaded."""

    @property
    def num_sequences(self) -> int:
        """Jobs inserted and neither finished nor removed."""

    @property
    def burst_wait_seconds(self) -> float:
        """How long an idle engine's first job is worth waiting for others of the same burst; they start together then."""

    def encode(self, job: GenerationJob) -> list[int]:
        """The job's prompt as token ids. Called on another thread: a long one is not to hold up the others' tokens.

        Raises:
            RequestError: There are none, or too many for the context.
        """

    @property
    def is_over_memory(self) -> bool:
        """Whether the rows that are there have outgrown the memory that they may take."""

    def has_room(self, job: GenerationJob, num_prompt: int, num_done: int) -> bool:
        """Whether what the job is expected to need fits into memory beside the rows that are there.

        Args:
            num_prompt: Tokens of its prompt.
            num_done: Tokens of its answer that it has generated elsewhere.
        """

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        """Take a job; its first token comes with a later `step`. One that may generate nothing more is taken only for its echo.

        Args:
            job: At most `info.max_batch` at a time.
            prompt: What `encode` gave.
            replay: Token ids that the job has generated elsewhere, oldest first; generation goes on behind them.

        Raises:
            RequestError: The job cannot be served. Nothing was taken.
        """

    def remove(self, job_id: str) -> None:
        """Let go of a row; one that is not there is fine."""

    def step(self) -> list[StepEvent]:
        """Decode one token for each row that is ready, or read on in the prompts; at least one row is there.

        Returns:
            At most one event a row, in no particular order; empty while prompts are read.

        Raises:
            Exception: The step failed as a whole. No row is left.
        """
