"""The seam between the generation loop and a model: the `Engine` protocol, and what an engine reports.

The loop decides; an engine computes. `worker.mlx.engine.MLXEngine` is the real one, `bench.harness.synthetic_worker` has one
without a model, and unit tests use a scripted one. Independent of MLX, RQ and Redis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from common.protocol import ChatPrompt, GenerationJob, TextPrompt, TokenLogprob, TokenPrompt, ToolUse
from worker.text.answer_parser import AnswerParser


@dataclass(slots=True)
class InsertResult:
    """What an engine reports about a job that it has accepted.

    Attributes:
        prompt_tokens: Length of the prompt.
        cached_tokens: How many of the prompt's tokens came from the prefix cache. The engine may update it until the job's
            first token.
        max_tokens: Limit of the answer's length, replayed tokens included: what the job asks for, or what the context has
            room for.
        replayed_texts: The text of each replayed token, in order, before stop strings are applied.
        parser: Splits the answer into content, reasoning and tool calls. New: `replayed_texts` have not been fed to it.
            None: the complete answer is content.
    """

    prompt_tokens: int
    max_tokens: int
    cached_tokens: int = 0
    replayed_texts: list[str] = field(default_factory=list)
    parser: AnswerParser | None = None


class StepToken(msgspec.Struct, frozen=True, gc=False):  # a dataclass would cost a microsecond more per token
    """One generated token of one job.

    Attributes:
        text: The characters that this token completed; may be empty. With a `finish_reason`, all remaining text.
        finish_reason: Set on the job's last token; the engine has released the sequence by then. None: more will follow.
        logprob: The token's own log-probability, if the job asks for it.
        top: The most likely tokens, most likely first, if the job asks for them.
    """

    job_id: str
    token_id: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprob: TokenLogprob | None = None
    top: list[TokenLogprob] = []


class PromptEcho(msgspec.Struct, frozen=True):
    """The prompt of a job with `echo`; reported once, before the job's first token.

    Attributes:
        text: The prompt's text.
        tokens: Its tokens with their log-probabilities, if the job asks for them, as in `common.protocol.Echo`.
        tops: The most likely tokens at each position, as in `common.protocol.Echo`.
    """

    job_id: str
    text: str
    tokens: list[TokenLogprob] = []
    tops: list[list[TokenLogprob]] = []


class SequenceFailure(msgspec.Struct, frozen=True):
    """One job cannot continue, as its sampler or a logits processor raised; the engine has released the sequence."""

    job_id: str
    error: Exception


StepEvent = StepToken | PromptEcho | SequenceFailure


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The engine's part of the model card; see `common.models.model_card.ModelCard`.

    Attributes:
        context_length: In tokens, prompt and answer together.
        vocab_size: Number of logits.
        max_batch: How many sequences the engine holds at most.
        sampling_defaults: As in `common.models.sampling_defaults`.
    """

    context_length: int
    vocab_size: int
    max_batch: int
    quantization: str = ""
    has_chat_template: bool = True
    can_fill: bool = False
    can_reason: bool = False
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)


class PromptTokenizer(Protocol):
    """Tokenizes prompts without generating. Used on one thread, which is neither the engine's nor intake's."""

    def encode(
        self,
        prompt: ChatPrompt | TextPrompt | TokenPrompt,
        *,
        tool_use: ToolUse | None,
        grammar: str | None,
        adds_special_tokens: bool,
    ) -> list[int]:
        """A prompt's token ids, as `Engine.encode`, but it may be longer than the context.

        Args:
            tool_use: See `common.protocol.GenerationJob`, and the next one.
            adds_special_tokens: Whether raw text gets what the tokenizer adds, such as a first token.

        Raises:
            RequestError: The prompt cannot be tokenized, or is too long by far.
        """

    def token_strings(self, token_ids: list[int]) -> list[str]:
        """The vocabulary's string of each token."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, special tokens included.

        Raises:
            RequestError: 400; one is not in the vocabulary.
        """


class Engine(Protocol):
    """Decodes a batch of sequences, one per job, with continuous batching.

    Created and used on one thread, except for `encode`. Jobs are inserted and removed between two steps.
    """

    @property
    def info(self) -> ModelInfo:
        """Properties of the loaded model."""

    @property
    def num_sequences(self) -> int:
        """Jobs that were inserted and have neither finished nor been removed."""

    @property
    def burst_wait_seconds(self) -> float:
        """How long an idle engine should wait, after its first job, for others of the same burst, to prefill them together."""

    def encode(self, job: GenerationJob) -> list[int]:
        """Tokenize the job's prompt. Called on the intake thread, so that a long prompt does not delay a decode step.

        Returns:
            Token ids, at least one and fewer than the context length.

        Raises:
            RequestError: The prompt cannot be tokenized, or is too long for the context.
        """

    def make_prompt_tokenizer(self) -> PromptTokenizer:
        """Copy the tokenizer. Called once, on the thread that will use the copy."""

    @property
    def is_over_memory(self) -> bool:
        """Whether the sequences' KV caches have outgrown their memory budget."""

    def has_room(self, job: GenerationJob, num_prompt_tokens: int, num_answer_tokens: int) -> bool:
        """Whether the job's expected KV cache fits into the memory budget next to those of the current sequences.

        Args:
            num_prompt_tokens: Tokens of its prompt.
            num_answer_tokens: Tokens of its answer that were generated by other workers.
        """

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        """Accept a job; its first token comes from a later `step`.

        A job that may generate no more tokens is kept only if its prompt is to be echoed.

        Args:
            job: Its id is not in the engine; at most `info.max_batch` jobs are at one time.
            prompt: Token ids, as returned by `encode`.
            replay: Token ids of the answer that were generated by other workers, oldest first; generation continues after them.

        Raises:
            RequestError: The job cannot be served. The engine is unchanged.
        """

    def remove(self, job_id: str) -> None:
        """Release a job's sequence; does nothing if there is none."""

    def step(self) -> list[StepEvent]:
        """Run one decode step, one prefill step, or both. Called only while there is at least one sequence.

        Returns:
            At most one event per job, in no particular order; empty if the step only prefilled.

        Raises:
            Exception: The complete step failed. The engine holds no sequence any more.
        """
