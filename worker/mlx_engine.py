"""The other door to MLX: an `Engine` on mlx-lm's `BatchGenerator`.

The generation loop makes it on its thread and uses it there, the model's load included: MLX's streams and lazy arrays do
not cross threads. mlx-lm's integer `uid` stays in this file. Signatures of mlx-lm move between minor releases: this file
and `mlx_model` are what changes then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TokenLogprob
from worker import answer_format, answer_parser, mlx_model, prompts
from worker.cache_memory import expected_tokens
from worker.detokenizer import Detokenizer, TokenBytes
from worker.engine import Inserted, ModelInfo, RowFailure, StepToken
from worker.prefill import MOST_PROMPTS, PrefillBudget

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
    num_prompt: int
    num_done: int
    max_tokens: int

    @property
    def expected_tokens(self) -> int:
        return expected_tokens(self.num_prompt, self.num_done, self.max_tokens)


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
        self._format = answer_format.of_model(self._tokenizer)
        self._rows: dict[str, _Row] = {}
        self._by_uid: dict[int, _Row] = {}
        self._failures: dict[str, Exception] = {}  # of this step, by job id
        self._memory = mlx_model.cache_memory(loaded, settings.memory_limit_gb)
        # A prompt that can never fit is refused like one that is longer than the model's context.
        self._info = replace(self._info, context_length=self._memory.longest_row(self._info.context_length))
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
        return prompts.tokenize(job, self._tokenizer, self._info.context_length, self._format)

    def has_room(self, job: GenerationJob, num_prompt: int, num_done: int) -> bool:
        new = expected_tokens(num_prompt, num_done, self._max_tokens(job, num_prompt))
        return self._memory.fits([new, *(row.expected_tokens for row in self._rows.values())])

    @property
    def is_over_memory(self) -> bool:
        return not self._memory.fits([row.num_prompt + row.num_done for row in self._rows.values()])

    def _max_tokens(self, job: GenerationJob, num_prompt: int) -> int:
        room = self._info.context_length - num_prompt
        return min(job.max_tokens or room, room)

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> Inserted:
        max_tokens = self._max_tokens(job, len(prompt))
        detokenizer = self._token_bytes.detokenizer(after_template=isinstance(job.prompt, ChatPrompt))
        replayed_texts = [detokenizer.add(token_id) for token_id in replay]
        uid = self._generator.insert(
            prompt + replay,
            max_tokens=max_tokens - len(replay),
            sampler=self._alone(job.job_id, _sampler(job.sampling, num_drawn=len(replay)), _any_token),
            logits_processors=[
                self._alone(job.job_id, processor, _unchanged)
                for processor in _logits_processors(job.sampling)
            ],
        )
        self._rows[job.job_id] = self._by_uid[uid] = _Row(
            uid, job, detokenizer, len(prompt), len(replay), max_tokens
        )
        parser = answer_parser.for_job(job, self._format, prompt, self._token_bytes)
        return Inserted(len(prompt), max_tokens, replayed_texts=replayed_texts, parser=parser)

    def _alone(self, job_id: str, function: Any, instead: Callable[..., Any]) -> Any:
        """A row's sampler or processor whose error ends this row and no other; `instead` gets the step to its end."""
        if function is None:
            return None

        def guarded(*arguments: Any) -> Any:
            if job_id not in self._failures:
                try:
                    return function(*arguments)
                except Exception as error:  # noqa: BLE001 (told by `step`)
                    self._failures[job_id] = error
            return instead(*arguments)

        return guarded

    def remove(self, job_id: str) -> None:
        row = self._rows.pop(job_id, None)
        if row is not None:
            del self._by_uid[row.uid]
            self._generator.remove(row.uid)

    def step(self) -> list[StepToken | RowFailure]:
        try:
            responses = self._generator.next()
        except Exception:
            # What a failed step left half-done is not to be built upon.
            self._rows, self._by_uid, self._generator = {}, {}, self._new_generator()
            raise
        tokens: list[StepToken | RowFailure] = [self._token(response) for response in responses]
        if self._failures:
            tokens = self._with_failures(tokens)
        return tokens

    def _with_failures(self, tokens: list[StepToken | RowFailure]) -> list[StepToken | RowFailure]:
        """A row that failed is let go of; what the step drew for it is worth nothing."""
        failures = [RowFailure(job_id, error) for job_id, error in self._failures.items()]
        for failure in failures:
            self.remove(failure.job_id)
        kept = [token for token in tokens if token.job_id not in self._failures]
        self._failures.clear()
        return kept + failures

    def _token(self, response: Any) -> StepToken:
        row = self._by_uid[response.uid]
        token_id, reason = int(response.token), response.finish_reason
        row.num_done += 1
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
            prefill_batch_size=min(max_batch, MOST_PROMPTS),
            prefill_step_size=step_tokens,
            stream=mx.default_stream(mx.default_device()),
        )
        self._budget = PrefillBudget(step_tokens)
        # By row without a token yet: prompt tokens left to read; oldest first.
        self._reading: dict[int, int] = {}
        self._begun: set[int] = set()  # those of them that mlx-lm has in its prompt batch
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
        self._reading[uid] = len(prompt) - 1  # mlx-lm reads the last one in the first decode step
        return int(uid)

    def remove(self, uid: int) -> None:
        self._generator.remove([uid])
        self._reading.pop(uid, None)
        self._begun.discard(uid)

    def next(self) -> list[Any]:
        return list(self._read_and_decode() if self._reading else self._generator.next()[1])

    def _read_and_decode(self) -> list[Any]:
        left_before = dict(self._reading)
        self._plan()
        with self._generator.stats() as stats:
            prompts, responses = self._generator.next()
        num_read = []
        for prompt in prompts:
            self._begun.add(prompt.uid)
            if prompt.end_of_prompt:
                del self._reading[prompt.uid]
                self._begun.discard(prompt.uid)
            else:
                num_done, num_all = prompt.progress
                self._reading[prompt.uid] = num_all - num_done - 1
                num_read.append(left_before[prompt.uid] - self._reading[prompt.uid])
        if num_read:
            self._budget.took(len(num_read) * max(num_read), stats.prompt_time)
        return list(responses)

    def _plan(self) -> None:
        """Tell mlx-lm how many prompts to read in the next step, and how much of each."""
        begun = [num_left for uid, num_left in self._reading.items() if uid in self._begun]
        waiting = [num_left for uid, num_left in self._reading.items() if uid not in self._begun]
        unread = [num_left for num_left in begun if num_left]
        if len(unread) < len(begun):
            waiting = []  # whoever joined now would be put together with rows that leave in this very step
        plan = self._budget.plan(unread, waiting)
        self._generator.prefill_batch_size = max(len(begun), plan.num_prompts)
        self._generator.prefill_step_size = plan.num_tokens


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


def _any_token(logprobs: Any) -> Any:
    import mlx.core as mx

    return mx.argmax(logprobs, axis=-1)


def _unchanged(_token_ids: Any, logits: Any) -> Any:
    return logits


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
