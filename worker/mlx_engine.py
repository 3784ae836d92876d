"""The other door to MLX: an `Engine` on mlx-lm's `BatchGenerator`.

The generation loop makes it on its thread and uses it there, the model's load included: MLX's streams and lazy arrays do
not cross threads. mlx-lm's integer `uid` stays in this file. Signatures of mlx-lm move between minor releases: this file
and `mlx_model` are what changes then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TokenLogprob
from worker import mlx_model, prompts
from worker.detokenizer import Detokenizer, TokenBytes
from worker.engine import Inserted, ModelInfo, StepToken

if TYPE_CHECKING:
    from common.settings import Settings

log = logging.getLogger(__name__)

_GREEDY_BELOW_TEMPERATURE = 1e-5
"""Dividing by less overflows float32; the most likely token is what it comes to."""

_MASK64 = (1 << 64) - 1


@dataclass(slots=True)
class _Row:
    uid: int
    job: GenerationJob
    detokenizer: Detokenizer


class MLXEngine:
    """See `worker.engine.Engine`.

    Raises:
        StartupError: The model cannot be loaded.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        loaded = mlx_model.load_model(settings)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._info = mlx_model.describe(loaded, settings.max_batch)
        self._token_bytes = TokenBytes(self._tokenizer)
        self._rows: dict[str, _Row] = {}
        self._by_uid: dict[int, _Row] = {}
        self._generator = self._new_generator()

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def gather_seconds(self) -> float:
        return self._generator.gather_seconds

    def encode(self, job: GenerationJob) -> list[int]:
        # Rust's tokenizers let go of the interpreter meanwhile (tokenizers 0.23).
        return prompts.tokenize(job, self._tokenizer, self._info.context_length)

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> Inserted:
        room = self._info.context_length - len(prompt)
        max_tokens = min(job.max_tokens or room, room)
        detokenizer = self._token_bytes.detokenizer(after_template=isinstance(job.prompt, ChatPrompt))
        replayed_texts = [detokenizer.add(token_id) for token_id in replay]
        uid = self._generator.insert(
            prompt + replay,
            max_tokens=max_tokens - len(replay),
            sampler=_sampler(job.sampling, num_drawn=len(replay)),
            logits_processors=_logits_processors(job.sampling),
        )
        self._rows[job.job_id] = self._by_uid[uid] = _Row(uid, job, detokenizer)
        return Inserted(len(prompt), max_tokens, replayed_texts=replayed_texts)

    def remove(self, job_id: str) -> None:
        row = self._rows.pop(job_id, None)
        if row is not None:
            del self._by_uid[row.uid]
            self._generator.remove(row.uid)

    def step(self) -> list[StepToken]:
        try:
            responses = self._generator.next()
        except Exception:
            # What a failed step left half-done is not to be built upon.
            self._rows, self._by_uid, self._generator = {}, {}, self._new_generator()
            raise
        return [self._token(response) for response in responses]

    def _token(self, response: Any) -> StepToken:
        row = self._by_uid[response.uid]
        token_id, reason = int(response.token), response.finish_reason
        text = "" if reason == "stop" else row.detokenizer.add(token_id)  # an end-of-text token is not text
        if reason is not None:
            text += row.detokenizer.flush()
            del self._rows[row.job.job_id], self._by_uid[row.uid]
        if row.job.top_logprobs is None:
            return StepToken(row.job.job_id, token_id, text, reason)
        own, top = self._logprobs(response.logprobs, token_id, row.job.top_logprobs)
        return StepToken(row.job.job_id, token_id, text, reason, own, top)

    def _logprobs(
        self, logprobs: Any, token_id: int, num_top: int
    ) -> tuple[TokenLogprob, list[TokenLogprob]]:
        """The token's own log-probability and the `num_top` best, best first.

        Args:
            logprobs: mx.array (vocab,), natural log, computed with the step.
        """
        # NumPy, not MLX: an operation of MLX would wait in its stream behind the step that is already under way.
        values = np.array(_as_float32(logprobs), copy=False)
        num_top = min(num_top, len(values))
        best: Any = np.argpartition(-values, num_top - 1)[:num_top] if num_top else []
        ranked = sorted(((int(i), float(values[i])) for i in best), key=lambda item: -item[1])
        return self._logprob(token_id, float(values[token_id])), [self._logprob(*item) for item in ranked]

    def _logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        # JSON has no infinity: a token that was banned reports a number that underflows to probability 0.
        return TokenLogprob(token_id, max(logprob, -9999.0), self._token_bytes[token_id])

    def _new_generator(self) -> _Batch | _OneAtATime:
        eos_token_ids = list(self._tokenizer.eos_token_ids)
        step_tokens = self._settings.prefill_step_tokens
        if mlx_model.can_batch(self._model):
            return _Batch(
                self._model, eos_token_ids, self._info.max_batch, step_tokens, wire=self._settings.wired_limit
            )
        return _OneAtATime(self._model, eos_token_ids, step_tokens)


class _Batch:
    """mlx-lm's `BatchGenerator`, one row a call."""

    def __init__(
        self, model: Any, eos_token_ids: list[int], max_batch: int, step_tokens: int, *, wire: bool
    ) -> None:
        import mlx.core as mx
        from mlx_lm.generate import BatchGenerator

        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token_id] for token_id in eos_token_ids],
            completion_batch_size=max_batch,
            prefill_batch_size=min(max_batch, 8),
            prefill_step_size=step_tokens,
            stream=mx.default_stream(mx.default_device()),
        )
        self._budget = PrefillBudget(step_tokens)
        self._reading: set[int] = set()  # rows without a token yet
        if not wire:
            # It wires all of a Mac's recommended memory on its own; whole-machine panics came with it (mlx #3186).
            self._generator.close()

    @property
    def gather_seconds(self) -> float:
        return self._budget.gather_seconds

    def insert(
        self, prompt: list[int], *, max_tokens: int, sampler: Any, logits_processors: list[Any]
    ) -> int:
        (uid,) = self._generator.insert(
            [prompt], max_tokens=[max_tokens], samplers=[sampler], logits_processors=[logits_processors]
        )
        self._reading.add(uid)
        return int(uid)

    def remove(self, uid: int) -> None:
        self._generator.remove([uid])
        self._reading.discard(uid)

    def next(self) -> list[Any]:
        if not self._reading:
            return list(self._generator.next()[1])
        # mlx-lm gives each of the prompts that it reads at once a step of this size.
        num_read = min(len(self._reading), self._generator.prefill_batch_size)
        self._generator.prefill_step_size = max(1, self._budget.num_tokens // num_read)
        began_at = time.monotonic()
        _, responses = self._generator.next()
        self._budget.took(time.monotonic() - began_at)
        self._reading.difference_update(response.uid for response in responses)
        return list(responses)


class PrefillBudget:
    """How many prompt tokens are read between two decode steps, so that running streams are not held up for long.

    A GPU reads the most in milliseconds; a CPU behind a long context takes seconds for as many.

    Attributes:
        num_tokens: Of all prompts together; at most what the setting says.
        gather_seconds: A small part of what a step takes, in which the rest of a burst comes.
    """

    TARGET_SECONDS = 0.5
    LEAST_TOKENS = 32
    GATHER_SECONDS = 0.02
    GATHER_SHARE = 0.05

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self.num_tokens = most_tokens
        self.gather_seconds = 0.0

    def took(self, seconds: float) -> None:
        """Learn from a step that read prompts."""
        self.gather_seconds = min(self.GATHER_SECONDS, self.GATHER_SHARE * seconds)
        if seconds > self.TARGET_SECONDS:
            smaller = int(self.num_tokens * self.TARGET_SECONDS / seconds)
            self.num_tokens = max(min(self.LEAST_TOKENS, self._most_tokens), smaller)
        elif seconds < self.TARGET_SECONDS / 2:
            self.num_tokens = min(self._most_tokens, self.num_tokens * 2)


@dataclass(frozen=True, slots=True)
class _Response:
    """As `BatchGenerator`'s, in what is read of it."""

    uid: int
    token: int
    logprobs: Any
    finish_reason: str | None


class _OneAtATime:
    """For models whose caches mlx-lm cannot put together: one row, with the same interface."""

    gather_seconds = 0.0

    def __init__(self, model: Any, eos_token_ids: list[int], step_tokens: int) -> None:
        self._model = model
        self._eos_token_ids = set(eos_token_ids)
        self._step_tokens = step_tokens
        self._uid = 0
        self._left = 0
        self._steps: Iterator[tuple[Any, Any]] = iter(())

    def insert(
        self, prompt: list[int], *, max_tokens: int, sampler: Any, logits_processors: list[Any]
    ) -> int:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        self._uid += 1
        self._left = max_tokens
        self._steps = generate_step(
            mx.array(prompt),
            self._model,
            max_tokens=max_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
            prefill_step_size=self._step_tokens,
        )
        return self._uid

    def remove(self, uid: int) -> None:
        if uid == self._uid:
            self._steps = iter(())

    def next(self) -> list[Any]:
        token, logprobs = next(self._steps)
        self._left -= 1
        reason = "stop" if token in self._eos_token_ids else "length" if self._left == 0 else None
        if reason is not None:
            self._steps = iter(())
        return [_Response(self._uid, token, logprobs, reason)]


def _as_float32(logprobs: Any) -> Any:
    import mlx.core as mx

    # NumPy knows no bfloat16.
    return logprobs if logprobs.dtype == mx.float32 else logprobs.astype(mx.float32)


def _logits_processors(sampling: SamplingParams) -> list[Any]:
    from mlx_lm.sample_utils import make_logits_processors

    penalized = sampling.repetition_penalty != 1.0
    return list(
        make_logits_processors(
            logit_bias=sampling.logit_bias or None,
            repetition_penalty=sampling.repetition_penalty if penalized else None,
            repetition_context_size=sampling.repetition_context_size,
        )
    )


def _sampler(sampling: SamplingParams, num_drawn: int) -> Callable[[Any], Any] | None:
    """How a row chooses; None is the batch's own, greedy sampler, which is called once for all rows that share it."""
    if sampling.temperature < _GREEDY_BELOW_TEMPERATURE:
        return None
    return _SeededSampler(sampling, num_drawn)


class _SeededSampler:
    """Draws by seed and position alone, so that a row draws the same whatever is beside it and wherever it goes on.

    Args:
        num_drawn: How many tokens of the job were drawn before, by another worker.
    """

    def __init__(self, sampling: SamplingParams, num_drawn: int) -> None:
        self._sampling = sampling
        self._num_drawn = num_drawn

    def __call__(self, logprobs: Any) -> Any:
        """Draw from logprobs, mx.array (1, vocab), natural log; gives mx.array (1,) of token ids."""
        import mlx.core as mx
        from mlx_lm.sample_utils import apply_top_p

        scaled = logprobs * (1.0 / self._sampling.temperature)
        if self._sampling.top_p < 1.0:
            # apply_top_p compares masses: far below 0 all of them would underflow.
            scaled = apply_top_p(scaled - mx.logsumexp(scaled, axis=-1, keepdims=True), self._sampling.top_p)
        key = mx.random.key(_mix(self._sampling.seed & _MASK64, self._num_drawn))
        self._num_drawn += 1
        return mx.random.categorical(scaled, key=key)


def _mix(seed: int, position: int) -> int:
    """A 64-bit key for one draw (SplitMix64; Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
