"""Continuous batching: which sequences wait, prefill and decode, and what the next step does for each.

Created and called by `worker.mlx.engine`, on one thread. Decides when to prefill and how much; `PromptBatch` and `DecodeBatch`
compute. Built on mlx-lm's models and caches, not on its `BatchGenerator`; independent of jobs, text and cached prefixes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from worker.mlx import caches as kv
from worker.mlx.backends.cpu_ops import FusedCpuOps
from worker.mlx.backends.cuda_attention import PaddedAttention, cuda_kernel
from worker.mlx.decode import BatchSequence, BatchToken, DecodeBatch
from worker.mlx.prefill import PrefillBudget, PromptBatch, merge_own_caches
from worker.mlx.sampling.chosen import StepSampler
from worker.mlx.sampling.device_sampler import DeviceSampler
from worker.mlx.sampling.host_sampler import HostSampler
from worker.sampling.sampler import BatchSampler

OfferCaches = Callable[[list[int], Callable[[], kv.Caches]], None]
"""Offers a sequence's caches to the prefix cache: its token ids, and a function that extracts the caches from the batch's, at a cost."""

_STEPS_PER_CACHE_CLEAR = 512


class Batch:
    """See the module.

    Attributes:
        decoding: The sequences that have been prefilled.

    Args:
        max_sequences: How many are in the batch at most; 1 for a model whose caches cannot batch.
        step_tokens: Prompt tokens to prefill between two decode steps, at most.
        sampler: Chooses the tokens; see `make_sampler`.
        on_cpu: Whether MLX computes on a CPU.
        offer_caches: Called for each prompt when it is prefilled, and for each sequence when it is finished.
    """

    def __init__(
        self,
        model: object,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int,
        step_tokens: int,
        sampler: StepSampler,
        on_cpu: bool,
        offer_caches: OfferCaches = lambda _token_ids, _extract: None,
    ) -> None:
        self._model = model
        self._offer_caches = offer_caches
        self._budget = PrefillBudget(step_tokens)
        self._waiting: list[BatchSequence] = []
        self._prompts = PromptBatch(model)
        self.decoding = DecodeBatch(
            model,
            sampler,
            eos_token_ids=eos_token_ids,
            max_sequences=max_sequences,
            offer=self._offer,
            attention=PaddedAttention(cuda_kernel()) if not on_cpu and mx.cuda.is_available() else None,
            fused_ops=FusedCpuOps() if on_cpu else None,
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
        """See `worker.mlx.prefill.PrefillBudget`."""
        return self._budget.copy_tokens

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches of decoding sequences take."""
        return kv.num_bytes(self.decoding.caches)

    @property
    def prefilling(self) -> list[BatchSequence]:
        """The sequences whose prompts are not completely prefilled, including those that have not begun."""
        return [*self._prompts.sequences, *self._waiting]

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
        self._prompts.join([sequence for sequence in joining if sequence.num_left])
        if cached := [sequence for sequence in joining if not sequence.num_left]:
            self._join(cached, merge_own_caches(self._model, cached))
        if not self._prompts.sequences:
            return
        began = time.perf_counter()
        num_tokens = self._prompts.prefill(plan.num_tokens)
        self._budget.observe(num_tokens, time.perf_counter() - began)
        self._prefilled_mono = time.monotonic()
        prefilled, caches = self._prompts.take_prefilled()
        if prefilled:
            self._join(prefilled, caches)

    def _join(self, sequences: list[BatchSequence], caches: kv.Caches) -> None:
        first = len(self.decoding.sequences)
        self.decoding.join(sequences, caches)
        for index in range(first, first + len(sequences)):
            self._offer(index)

    def _offer(self, index: int) -> None:
        caches = self.decoding.caches
        if kv.can_extract(caches):
            sequence = self.decoding.sequences[index]
            self._offer_caches(sequence.token_ids[: sequence.num_cached], lambda: kv.extract(caches, index))


def make_sampler(
    vocab_size: int,
    *,
    xtc_special_token_ids: Sequence[int] = (),
    eos_token_ids: Sequence[int] = (),
    on_device: bool,
    compiles: bool = True,
) -> StepSampler:
    """Create what chooses the tokens of a batch. All arguments but one are those of `DeviceSampler`.

    Args:
        on_device: Whether MLX chooses them, for a GPU; otherwise NumPy does.
    """
    if on_device:
        return DeviceSampler(
            vocab_size,
            xtc_special_token_ids=xtc_special_token_ids,
            eos_token_ids=eos_token_ids,
            compiles=compiles,
        )
    return HostSampler(BatchSampler(xtc_special_token_ids=xtc_special_token_ids, eos_token_ids=eos_token_ids))
