"""Continuous batching: which sequences wait, prefill and decode, and what the next step does for each.

Created and called by `worker.mlx.engine`, on one thread. Decides when to prefill and how much; `PromptBatches` and `DecodeBatch`
compute. Built on mlx-lm's models and caches, not on its `BatchGenerator`; independent of jobs, text and cached prefixes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

from common.machine import memory_claims
from worker.mlx import model as mlx_model
from worker.mlx.backends.cpu_ops import FusedCpuOps
from worker.mlx.backends.cuda_attention import PaddedAttention, cuda_kernel
from worker.mlx.backends.prompt_attention import PromptAttention
from worker.mlx.caches import kinds as kv
from worker.mlx.decoding.compiled_forward import CompiledForward
from worker.mlx.decoding.decode_batch import BatchSequence, BatchToken, DecodeBatch, OfferCaches
from worker.mlx.prefill.budget import INITIAL_TOKENS, PrefillBudget
from worker.mlx.prefill.prompts import PromptBatches, merge_own_caches
from worker.mlx.sampling.chosen import StepSampler
from worker.mlx.sampling.device_sampler import STEPS_BEFORE_COMPILING, DeviceSampler
from worker.mlx.sampling.host_sampler import HostSampler
from worker.sampling.sampler import BatchSampler

_STEPS_PER_CACHE_CLEAR = 512


class Batch:
    """See the module.

    Attributes:
        decoding: The sequences that have been prefilled.

    Args:
        max_sequences: How many are in the batch at most; 1 for a model whose caches cannot batch.
        step_tokens: Prompt tokens to prefill between two decode steps, at most.
        first_step_tokens: The same until a prefill has been observed.
        sampler: Chooses the tokens; see `make_sampler`.
        on_cpu: Whether MLX computes on a CPU.
        compiled: See `DecodeBatch`.
        offer_caches: Called with prompts when they are prefilled, and with sequences when they are finished.
        working_bytes: The memory that a step may take in addition to weights and caches.
        limit_bytes: The memory that the process may use; see `set_limits`.
    """

    def __init__(
        self,
        model: object,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int,
        step_tokens: int,
        first_step_tokens: int = INITIAL_TOKENS,
        sampler: StepSampler,
        on_cpu: bool,
        compiled: CompiledForward | None = None,
        offer_caches: OfferCaches = lambda _offers: None,
        working_bytes: float = memory_claims.WORKING_BYTES,
        limit_bytes: float = 0.0,
    ) -> None:
        self._model: Any = model
        self._sampler = sampler
        self._budget = PrefillBudget(step_tokens, first_step_tokens)
        self._waiting: list[BatchSequence] = []
        on_cuda = not on_cpu and mx.cuda.is_available()
        self._prompt_attention = PromptAttention(working_bytes) if on_cuda else None
        self._prompts = PromptBatches(
            model,
            self._prompt_attention,
        )
        self.set_limits(step_tokens, limit_bytes, working_bytes)
        self.decoding = DecodeBatch(
            model,
            sampler,
            eos_token_ids=eos_token_ids,
            max_sequences=max_sequences,
            offer_caches=offer_caches,
            attention=PaddedAttention(cuda_kernel()) if on_cuda else None,
            fused_ops=FusedCpuOps() if on_cpu else None,
            compiled=compiled,
        )
        self._num_steps = 0
        self._prefilled_mono = 0.0

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding.sequences)

    @property
    def burst_wait_seconds(self) -> float:
        """See `worker.loop.engine.Engine`."""
        return self._budget.burst_wait_seconds

    @property
    def copy_tokens(self) -> int:
        """See `worker.mlx.prefill.budget.PrefillBudget`."""
        return self._budget.copy_tokens

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches of decoding sequences take."""
        return kv.num_bytes(self.decoding.caches)

    @property
    def prefilling(self) -> list[BatchSequence]:
        """The sequences whose prompts are not completely prefilled, including those that have not begun."""
        return [*self._prompts.sequences, *self._waiting]

    def warm_up_sampler(self) -> None:
        """Let the sampler compile what it needs for any kind of sequence."""
        logits = self._model(mx.zeros((1, 1), mx.int32), cache=kv.new(self._model))
        self._sampler.warm_up(logits.dtype)

    def set_limits(self, step_tokens: int, limit_bytes: float, working_bytes: float) -> None:
        """Change how many prompt tokens are prefilled between two decode steps, and the memory that the process may use."""
        self._budget.set_max_tokens(step_tokens)
        if self._prompt_attention is not None:
            self._prompt_attention.set_working_bytes(working_bytes)
            # CUDA takes milliseconds to free memory, and more to get it again. What is kept is not available to other processes,
            # but this one's share is its own; on a Mac the GPU shares memory with everything else.
            self._prompts.limit_bytes = limit_bytes - working_bytes

    def prompt_attention(self) -> AbstractContextManager[Any]:
        """In this context, models compute the attention of prompts as in this batch."""
        return self._prompt_attention or nullcontext()

    def prefill_alone(self, token_ids: list[int], step_tokens: int) -> kv.Caches:
        """Prefill tokens that belong to no sequence, as a test; returns their caches."""
        caches = kv.merge([kv.new(self._model)])
        for first in range(0, len(token_ids), step_tokens):
            with self.prompt_attention():
                self._model(mx.array([token_ids[first : first + step_tokens]]), cache=caches)
            mx.eval(kv.states(caches))
        return caches

    def insert(self, sequence: BatchSequence) -> None:
        """Add a sequence; there may be `max_sequences` at most."""
        self._waiting.append(sequence)

    def remove(self, sequence: BatchSequence) -> None:
        """Remove a sequence in any state; does nothing if it is not in the batch."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._prompts.sequences:
            self._prompts.remove(sequence)
        elif sequence in self.decoding.sequences:
            self.decoding.remove(sequence)

    def step(self) -> list[BatchToken]:
        """Run one decode step, then prefill some more of the prompts; returns the decoded tokens."""
        tokens = self.decoding.step()
        self._num_steps += 1
        if self._num_steps % _STEPS_PER_CACHE_CLEAR == 0:
            mx.clear_cache()
        if self._prompts.sequences or (self._waiting and not self._may_pause()):
            self._prefill()
        return tokens

    def _may_pause(self) -> bool:
        since_seconds = time.monotonic() - self._prefilled_mono
        return self._budget.may_pause(len(self._waiting), len(self.decoding.sequences), since_seconds)

    def _prefill(self) -> None:
        plan = self._budget.plan(
            [sequence.num_left for sequence in self._prompts.sequences],
            [sequence.num_left for sequence in self._waiting],
        )
        joining = [self._waiting[index] for index in plan.joining]
        self._waiting = [each for index, each in enumerate(self._waiting) if index not in plan.joining]
        self._prompts.join([sequence for sequence in joining if sequence.num_left], plan.num_tokens)
        if cached := [sequence for sequence in joining if not sequence.num_left]:
            self._join(cached, merge_own_caches(self._model, cached))
        if not self._prompts.sequences:
            return
        began = time.perf_counter()
        num_tokens = self._prompts.prefill(plan.num_tokens)
        self._budget.observe(num_tokens, time.perf_counter() - began)
        self._prefilled_mono = time.monotonic()
        for prefilled, caches in self._prompts.take_prefilled():
            self._join(prefilled, caches)

    def _join(self, sequences: list[BatchSequence], caches: kv.Caches) -> None:
        first = len(self.decoding.sequences)
        self.decoding.join(sequences, caches)
        self.decoding.offer(range(first, first + len(sequences)))


def make_sampler(
    vocab_size: int,
    *,
    xtc_special_token_ids: Sequence[int] = (),
    eos_token_ids: Sequence[int] = (),
    on_device: bool,
) -> StepSampler:
    """Create what chooses the tokens of a batch; see `DeviceSampler` for the other arguments.

    Args:
        on_device: Whether MLX chooses them, for a GPU; otherwise NumPy does.
    """
    if on_device:
        return DeviceSampler(
            vocab_size,
            xtc_special_token_ids=xtc_special_token_ids,
            eos_token_ids=eos_token_ids,
            compile_after=STEPS_BEFORE_COMPILING if mlx_model.has_gpu() else None,
            compiles_new=not mx.cuda.is_available(),
        )
    return HostSampler(BatchSampler(xtc_special_token_ids=xtc_special_token_ids, eos_token_ids=eos_token_ids))
