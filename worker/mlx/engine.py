"""The `Engine` of the generation loop on MLX: one model, its batch and its cached prefixes.

Created and used on the generation thread, which also loads the model: MLX's streams and lazy arrays do not cross threads. Only
`encode` is called on another thread. Independent of RQ and Redis.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.machine import memory_claims
from common.protocol import GenerationJob
from worker.loop.engine import (
    InsertResult,
    ModelInfo,
    PromptEcho,
    PromptTokenizer,
    SequenceFailure,
    StepEvent,
    StepToken,
)
from worker.mlx import model as mlx_model
from worker.mlx.batch import Batch, make_sampler
from worker.mlx.caches import kinds as kv
from worker.mlx.decoding.compiled_forward import compiled_forward
from worker.mlx.decoding.decode_batch import BatchToken
from worker.mlx.generation import Generation, GenerationBuilder
from worker.mlx.memory.cache_memory import CacheMemory, cache_memory, expected_tokens
from worker.mlx.memory.memory_share import MemoryShare
from worker.mlx.prefill.step_size import StepSize, measured
from worker.mlx.prefixes.prefix_cache import CachedPrefix, PrefixCache, should_wait_for
from worker.mlx.sampling.chosen import StepSampler
from worker.mlx.scoring import LogprobReport, PromptScoring
from worker.mlx.warm_up import warm_up
from worker.text.detokenizer import TokenBytes

if TYPE_CHECKING:
    from common.settings import Settings

log = logging.getLogger(__name__)

_STEPS_PER_ROOM_CHECK = 16
"""Steps after which cached prefixes make room for answers that grew; to add up all layers' caches takes 20 to 60 µs."""

_PROMPT_CACHE_SHARE = 1 / 8
"""Of the sequences' memory, by default: they get it back when they need it, but other processes would not."""


class MLXEngine:
    """See `worker.loop.engine.Engine`.

    Args:
        folder: The model's files; None: `settings.model` is their folder.
        samples_on_device: Whether MLX chooses the tokens; None: on a GPU. Elsewhere NumPy does.

    Raises:
        StartupError: The model cannot be loaded.
    """

    def __init__(
        self, settings: Settings, folder: Path | None = None, *, samples_on_device: bool | None = None
    ) -> None:
        self._settings = settings
        self._samples_on_device = mlx_model.has_gpu() if samples_on_device is None else samples_on_device
        self._share = MemoryShare(settings)
        loaded = mlx_model.load_model(settings, folder, before_loading=self._share.claim)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._info = mlx_model.describe(loaded, settings.max_batch)
        self._token_bytes = TokenBytes(self._tokenizer)
        self._report = LogprobReport(self._tokenizer, self._token_bytes)
        self._eos_token_ids = list(self._tokenizer.eos_token_ids)
        self._limit_bytes = self._share.limit_bytes()
        self._memory = cache_memory(self._model, kv.measured_cost(self._model), self._limit_bytes)
        # A prompt that can never fit is refused like one that is longer than the model's context.
        context_length = self._memory.longest_sequence(self._info.context_length)
        self._info = replace(self._info, context_length=context_length)
        self._builder = GenerationBuilder(
            self._tokenizer, self._token_bytes, self._info, loaded.template_arguments
        )
        self._info = replace(self._info, can_reason=self._builder.can_reason)
        self._sampler = self._make_sampler()
        self._compiled = compiled_forward(self._model)
        self._step_size = StepSize()
        self._start_empty()
        self._batch.warm_up_sampler()
        warm_up(self, on_gpu=mlx_model.has_gpu())
        if mlx_model.has_gpu() and settings.prefill_step_tokens is None:
            self._step_size = measured(self._prefill_dummy, context_length, self._working_bytes)
        self._start_empty()  # the slow first steps must not influence the prefill budget

    def _make_sampler(self) -> StepSampler:
        newline = self._tokenizer.encode("\n", add_special_tokens=False)
        return make_sampler(
            self._info.vocab_size,
            xtc_special_token_ids=[*self._eos_token_ids, *newline],
            eos_token_ids=self._eos_token_ids,
            on_device=self._samples_on_device,
        )

    def _start_empty(self) -> None:
        self._prefixes = PrefixCache(_prompt_cache_bytes(self._settings, self._memory))
        self._reset()

    def _reset(self) -> None:
        """Start with an empty batch: a failed step may have left the old one in an inconsistent state."""
        self._running: dict[str, Generation] = {}
        self._sampler.reset()
        self._steps_since_check = self._checked_prefix_bytes = 0
        self._batch = Batch(
            self._model,
            eos_token_ids=self._eos_token_ids,
            max_sequences=self._info.max_batch,
            step_tokens=self._step_tokens,
            first_step_tokens=self._step_size.first_tokens,
            sampler=self._sampler,
            on_cpu=not mlx_model.has_gpu(),
            compiled=self._compiled,
            offer_caches=self._prefixes.offer,
            working_bytes=self._working_bytes,
            limit_bytes=self._limit_bytes,
        )

    @property
    def _working_bytes(self) -> float:
        return memory_claims.working_bytes(self._limit_bytes)

    @property
    def _step_tokens(self) -> int:
        return self._settings.prefill_step_tokens or self._step_size.within(self._working_bytes)

    def _prefill_dummy(self, num_tokens: int, step_tokens: int) -> kv.Caches:
        token_ids = [i % self._info.vocab_size for i in range(num_tokens)]
        return self._batch.prefill_alone(token_ids, step_tokens)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def num_sequences(self) -> int:
        return len(self._running)

    @property
    def burst_wait_seconds(self) -> float:
        return self._batch.burst_wait_seconds

    def encode(self, job: GenerationJob) -> list[int]:
        return self._builder.encode(job)

    def make_prompt_tokenizer(self) -> PromptTokenizer:
        return self._builder.make_prompt_tokenizer()

    def _update_memory_limit(self) -> None:
        """Follow this worker's share of the memory: it changes when other workers on this machine start or end."""
        limit_bytes = self._share.limit_bytes()
        if limit_bytes != self._limit_bytes:
            log.info("this worker may now use %.1f GB of memory", limit_bytes / 2**30)
            self._limit_bytes = limit_bytes
            self._memory = self._memory.with_limit(limit_bytes)
            self._batch.set_limits(self._step_tokens, limit_bytes, self._working_bytes)
            self._make_room()

    def has_room(self, job: GenerationJob, num_prompt_tokens: int, num_answer_tokens: int) -> bool:
        self._update_memory_limit()
        new = expected_tokens(num_prompt_tokens, num_answer_tokens, self._max_tokens(job, num_prompt_tokens))
        return self._memory.fits([new, *(each.expected_tokens for each in self._running.values())])

    @property
    def is_over_memory(self) -> bool:
        self._update_memory_limit()
        return not self._memory.fits(
            [each.num_prompt_tokens + each.num_answer_tokens for each in self._running.values()]
        )

    def _max_tokens(self, job: GenerationJob, num_prompt_tokens: int) -> int:
        room = self._info.context_length - num_prompt_tokens
        return room if job.max_tokens is None else min(job.max_tokens, room)

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        new = self._builder.build(job, prompt, replay, self._max_tokens(job, len(prompt)))
        has_tokens = new.max_tokens > new.num_answer_tokens
        if job.echo:
            new.is_echoed = False
            if job.top_logprobs is not None:
                new.scoring = PromptScoring(
                    self._model,
                    prompt,
                    job.top_logprobs,
                    self._info.vocab_size,
                    on_device=self._samples_on_device,
                )
        elif has_tokens:
            self._begin(new)
        if job.echo or has_tokens:
            self._running[job.job_id] = new
            self._make_room()
        return new.insert_result

    def remove(self, job_id: str) -> None:
        if (removed := self._running.pop(job_id, None)) is not None:
            self._batch.remove(removed.sequence)

    def _make_room(self) -> None:
        """Evict cached prefixes if the sequences need their memory."""
        if self._prefixes.num_bytes:
            num_tokens = [each.expected_tokens for each in self._running.values()]
            self._prefixes.shrink_to(self._memory.left_bytes(num_tokens, self._batch.cache_bytes))
        self._steps_since_check, self._checked_prefix_bytes = 0, self._prefixes.num_bytes

    def _make_room_if_due(self) -> None:
        """After each step: at once if prefixes were added, else every few steps."""
        self._steps_since_check += 1
        is_due = self._steps_since_check >= _STEPS_PER_ROOM_CHECK
        if is_due or self._prefixes.num_bytes != self._checked_prefix_bytes:
            self._make_room()

    def step(self) -> list[StepEvent]:
        try:
            self._begin_waiting()
            echoes = self._echo()
            tokens = self._batch.step()
            self._prefixes.set_copy_tokens(self._batch.copy_tokens)
        except Exception:
            self._reset()
            raise
        events = self._events(tokens)
        self._make_room_if_due()
        return [*echoes, *events]

    def _begin_waiting(self) -> None:
        waiting = [each for each in self._running.values() if each.waits_for is not None]
        for each in waiting:
            if each.waits_for not in self._batch.prefilling:
                self._begin(each)

    def _begin(self, new: Generation) -> None:
        """Start a sequence after its longest cached prefix, or let it wait for another one that is prefilling a longer prefix."""
        sequence = new.sequence
        found = self._prefixes.find(sequence.token_ids)
        if new.scoring is not None:
            found = CachedPrefix(new.scoring.caches, new.num_prompt_tokens - 1)
        prefilling = self._batch.prefilling
        index = should_wait_for(
            sequence.token_ids,
            found.num_tokens,
            [each.token_ids for each in prefilling],
            self._prefixes.min_tokens,
        )
        if index is not None and self._prefixes.is_enabled:
            new.waits_for = prefilling[index]
            return
        new.waits_for = None
        new.insert_result.cached_tokens = 0 if new.scoring else min(found.num_tokens, new.num_prompt_tokens)
        sequence.caches, sequence.num_cached = found.caches, found.num_tokens
        new.scoring = None  # else it would keep the prompt's keys and values until the answer ends
        self._batch.insert(sequence)

    def _echo(self) -> list[PromptEcho]:
        """Continue scoring the first prompt that is to be echoed; returns its echo once it is complete."""
        first = next((each for each in self._running.values() if not each.is_echoed), None)
        if first is None:
            return []
        if first.scoring is not None and not first.scoring.is_done:
            with self._batch.prompt_attention():
                first.scoring.step()
            if not first.scoring.is_done:
                return []
        first.is_echoed = True
        prompt = first.sequence.token_ids[: first.num_prompt_tokens]
        echo = self._report.echo(first.job, prompt, first.scoring.scores if first.scoring else None)
        if first.max_tokens:
            self._begin(first)
        else:
            del self._running[first.job.job_id]
        return [echo]

    def _events(self, tokens: list[BatchToken]) -> list[StepEvent]:
        events: list[StepEvent] = [self._event(token) for token in tokens]
        # Tokens that were sampled for a failed sequence are dropped.
        failed = {k: error for k, each in self._running.items() if (error := each.sequence.sampler.error)}
        if not failed:
            return events
        for job_id in failed:
            self.remove(job_id)
        events = [event for event in events if event.job_id not in failed]
        return [*events, *(SequenceFailure(job_id, error) for job_id, error in failed.items())]

    def _event(self, token: BatchToken) -> StepToken:
        job_id, token_id, score, reason = token
        running = self._running[job_id]
        running.num_answer_tokens += 1
        text = "" if token_id in running.tokens_without_text else running.detokenizer.add(token_id)
        if reason is not None:
            text += running.detokenizer.flush()
            del self._running[job_id]
        if score is None:
            return StepToken(job_id, token_id, text, reason)
        return StepToken(job_id, token_id, text, reason, *self._report.sampled(token_id, score))


def _prompt_cache_bytes(settings: Settings, memory: CacheMemory) -> int:
    if settings.prompt_cache_gb is not None:
        return int(settings.prompt_cache_gb * 2**30)
    return int(memory.room_bytes * _PROMPT_CACHE_SHARE)
