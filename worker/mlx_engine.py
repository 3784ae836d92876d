"""The other door to MLX: an `Engine` on mlx-lm's `BatchGenerator`.

The generation loop makes it on its thread and uses it there, the model's load included: MLX's streams and lazy arrays do
not cross threads. mlx-lm's integer `uid` stays in this file. Signatures of mlx-lm move between minor releases: this file
and `mlx_model` are what changes then.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TokenLogprob
from worker import mlx_model, prompts
from worker.cache_memory import expected_tokens
from worker.detokenizer import Detokenizer, TokenBytes
from worker.engine import Inserted, ModelInfo, RowFailure, StepToken
from worker.mlx_batch import Batch, NewRow, OneAtATime, Response, alone
from worker.sampler import RowSampler

if TYPE_CHECKING:
    from common.settings import Settings

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Row:
    uid: int
    job: GenerationJob
    detokenizer: Detokenizer
    sampler: RowSampler
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
        self._rows: dict[str, _Row] = {}
        self._by_uid: dict[int, _Row] = {}
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
        return prompts.tokenize(job, self._tokenizer, self._info.context_length)

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
        sampler = RowSampler(job.sampling, num_drawn=len(replay), wants_logprobs=job.top_logprobs is not None)
        sampler.took(replay)
        processors = _logits_processors(job.sampling, sampler)
        uid = self._generator.insert(NewRow(prompt + replay, max_tokens - len(replay), sampler, processors))
        self._rows[job.job_id] = self._by_uid[uid] = _Row(
            uid, job, detokenizer, sampler, len(prompt), len(replay), max_tokens
        )
        return Inserted(len(prompt), max_tokens, replayed_texts=replayed_texts)

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
        # What was drawn for a row that failed is worth nothing.
        failed = {job_id: row for job_id, row in self._rows.items() if row.sampler.error is not None}
        if not failed:
            return tokens
        tokens = [token for token in tokens if token.job_id not in failed]
        for job_id, row in failed.items():
            self.remove(job_id)
            tokens.append(RowFailure(job_id, row.sampler.error or RuntimeError("no reason")))
        return tokens

    def _token(self, response: Response) -> StepToken:
        row = self._by_uid[response.uid]
        token_id, reason = int(response.token), response.finish_reason
        row.num_done += 1
        logprobs = row.sampler.logprobs.popleft() if row.sampler.logprobs else response.logprobs
        text = "" if reason == "stop" else row.detokenizer.add(token_id)  # an end-of-text token is not text
        if reason is not None:
            text += row.detokenizer.flush()
            del self._rows[row.job.job_id], self._by_uid[row.uid]
        if row.job.top_logprobs is None:
            return StepToken(row.job.job_id, token_id, text, reason)
        own, top = self._logprobs(logprobs, token_id, row.job.top_logprobs)
        return StepToken(row.job.job_id, token_id, text, reason, own, top)

    def _logprobs(
        self, logprobs: Any, token_id: int, num_top: int
    ) -> tuple[TokenLogprob, list[TokenLogprob]]:
        """The token's own log-probability and the `num_top` best, best first.

        Args:
            logprobs: mx.array or NumPy's (vocab,), natural log, computed with the step.
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

    def _new_generator(self) -> Batch | OneAtATime:
        eos_token_ids = list(self._tokenizer.eos_token_ids)
        step_tokens = self._settings.prefill_step_tokens
        how: dict[str, Any] = {
            "on_host": not mlx_model.has_gpu(),
            "never_excluded": [*eos_token_ids, *self._tokenizer.encode("\n", add_special_tokens=False)],
        }
        if not mlx_model.can_batch(self._model):
            return OneAtATime(self._model, eos_token_ids, step_tokens, **how)
        max_batch, wire = self._info.max_batch, self._settings.wired_limit
        return Batch(self._model, eos_token_ids, max_batch, step_tokens, wire=wire, **how)


def _as_float32(logprobs: Any) -> Any:
    if isinstance(logprobs, np.ndarray):
        return logprobs
    import mlx.core as mx

    # NumPy knows no bfloat16.
    return logprobs if logprobs.dtype == mx.float32 else logprobs.astype(mx.float32)


def _logits_processors(sampling: SamplingParams, row: RowSampler) -> list[Any]:
    """What needs the logits themselves; everything else is the sampler's."""
    if sampling.repetition_penalty == 1.0:
        return []
    from mlx_lm.sample_utils import make_logits_processors

    made = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty,
        repetition_context_size=sampling.repetition_context_size,
    )
    return [alone(row, processor) for processor in made]
