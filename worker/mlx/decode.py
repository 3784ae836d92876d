"""The sequences that are decoding: one step computes the next token of each.

Made and called by `worker.mlx.batch`. A sequence's index in `DecodeBatch.sequences` is its row in every array of a step and its
slot in the caches; nothing else knows that order. On a GPU a decode step of a small model takes as long as the CPU
needs to feed it, some ten microseconds an operation, so a step is built of as few operations as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import TokenBuffer
from mlx_lm.sample_utils import make_logits_processors

from common.protocol import SamplingParams
from worker.mlx import caches as kv
from worker.mlx.backends.cpu_ops import FusedCpuOps
from worker.mlx.backends.cuda_attention import PaddedAttention
from worker.mlx.kv_slots import SlotKVCache, moves_to
from worker.sampling.sampler import BatchSampler, SequenceSampler

LogitsProcessor = Callable[[Any, Any], Any]
"""As mlx-lm's: (token ids so far, logits (1, vocab)) to logits."""

_MAX_MOVES = 8
"""Copies of neighbouring sequences into slots of others; instead of more there are new buffers."""


@dataclass(slots=True, eq=False)
class BatchSequence:
    """A sequence on its way through the batch: waiting, prefilling, decoding.

    Attributes:
        token_ids: The prompt, at least one token, then each token that was generated.
        max_tokens: To be generated, at least 1.
        num_cached: How many of `token_ids` are in the caches, those of the step under way included.
        caches: The sequence's own, with `num_cached` tokens, until it is prefilled; None: there are none yet.
        context: What the processors are given, on the device; made with the first step.
    """

    job_id: str
    token_ids: list[int]
    max_tokens: int
    sampler: SequenceSampler
    processors: list[LogitsProcessor] = field(default_factory=list)
    num_cached: int = 0
    caches: kv.Caches | None = None
    num_generated: int = 0
    context: TokenBuffer | None = None

    @property
    def num_left(self) -> int:
        """Prompt tokens to prefill; the last one is computed in the first decode step."""
        return len(self.token_ids) - 1 - self.num_cached


class BatchToken(NamedTuple):
    """A sequence's next token.

    Attributes:
        logprobs: mx.array (vocab,), natural log, for those who asked.
        finish_reason: With the last token; the sequence has left the batch then.
    """

    job_id: str
    token_id: int
    logprobs: Any
    finish_reason: Literal["stop", "length"] | None


class DecodeBatch:
    """See the module.

    Args:
        offer: Called with a sequence's index when it is finished, before it leaves: its caches are still in the batch.
        attention: Of padded sequences, on CUDA; None: MLX's own.
        fused_ops: For MLX's CPU back-end; None elsewhere.
    """

    def __init__(
        self,
        model: Any,
        sampler: BatchSampler,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int,
        offer: Callable[[int], None],
        attention: PaddedAttention | None = None,
        fused_ops: FusedCpuOps | None = None,
    ) -> None:
        self.sequences: list[BatchSequence] = []
        self.caches: kv.Caches = []
        self.attention = attention
        self._model = model
        self._sampler = sampler
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_sequences = max_sequences
        self._offer = offer
        self._fused_ops = fused_ops
        # By index: the token that the next step computes, sampled or a prompt's last, and the log-probabilities that it was sampled by.
        self._inputs: Any = None
        self._logprobs: list[Any] = []

    def join(self, sequences: list[BatchSequence], caches: kv.Caches) -> None:
        """Take sequences that are prefilled.

        Those of layers that keep every token take part in the next step. Other kinds of caches may not join with no token in them:
        their sequences take a first step of their own now.

        Args:
            caches: Of these sequences, in their order.
        """
        inputs: Any = mx.array([sequence.token_ids[-1] for sequence in sequences], mx.uint32)
        logprobs: list[Any] = [None] * len(sequences)
        if not kv.keep_every_token(caches):
            inputs, logprobs = self._compute(sequences, caches, inputs)
            for sequence in sequences:
                sequence.num_cached += 1
        if self.sequences:
            kv.extend(self.caches, caches)
            inputs = mx.concatenate([self._inputs, inputs])
        else:
            self.caches = kv.with_slots(caches, self._max_sequences, self.attention)
        self._inputs = inputs
        self.sequences += sequences
        self._logprobs += logprobs
        self._count()

    def remove(self, sequence: BatchSequence) -> None:
        """Drop a sequence."""
        self._keep([index for index, each in enumerate(self.sequences) if each is not sequence])

    def step(self) -> list[BatchToken]:
        """Start the next step, and return what the one before has sampled; those who have just joined have no token yet."""
        if not self.sequences:
            return []
        inputs, logprobs = self._inputs, self._logprobs
        self._inputs, self._logprobs = self._compute(self.sequences, self.caches, inputs)
        mx.eval(inputs, [each for each in logprobs if each is not None])
        tokens: list[BatchToken] = []
        unfinished: list[int] = []
        for index, (sequence, token_id) in enumerate(zip(self.sequences, inputs.tolist(), strict=True)):
            sequence.num_cached += 1
            reason = None
            if sequence.num_cached > len(sequence.token_ids):  # not the prompt's last token
                sequence.token_ids.append(token_id)
                sequence.num_generated += 1
                reason = self._finish_reason(sequence, token_id)
                tokens.append(BatchToken(sequence.job_id, token_id, logprobs[index], reason))
            if reason is None:
                unfinished.append(index)
            else:
                self._offer(index)
        if len(unfinished) < len(self.sequences):
            self._keep(unfinished)
        return tokens

    def _finish_reason(self, sequence: BatchSequence, token_id: int) -> Literal["stop", "length"] | None:
        if token_id in self._eos_token_ids:
            return "stop"
        return "length" if sequence.num_generated >= sequence.max_tokens else None

    # -- sequences leave ---------------------------------------------------------------------------------------------

    def _keep(self, indices: list[int]) -> None:
        """The others leave. Those that stay may change places: the last ones go where others have left."""
        order = self._order(indices) if indices else []
        self.sequences = [self.sequences[index] for index in order]
        self._logprobs = [self._logprobs[index] for index in order]
        if not order:
            self.caches, self._inputs = [], None
            return
        for cache in self.caches:
            cache.filter(order)
        self._inputs = self._inputs[mx.array(order)]
        self._count()

    def _order(self, indices: list[int]) -> list[int]:
        slots = self._slots(self.caches)
        order = filled_gaps(indices)
        moves = moves_to(order)
        if len(moves) > _MAX_MOVES or any(cache.is_wasteful(indices) for cache in slots):
            return indices
        if moves:
            mx.async_eval([copied for cache in slots for copied in cache.lift(moves)])
        return order

    def _count(self) -> None:
        slots = self._slots(self.caches)
        for cache in slots:
            cache.count(None if cache is slots[0] else slots[0])
        # Else they were computed as a part of the next step, and known only when that has ended.
        mx.async_eval(self._inputs)

    # -- a step ------------------------------------------------------------------------------------------------------

    def _compute(
        self, sequences: list[BatchSequence], caches: kv.Caches, inputs: Any
    ) -> tuple[Any, list[Any]]:
        """Start to compute a token of each sequence: token ids (sequences,), and log-probabilities for those who want them."""
        slots = self._slots(caches)
        with self._operations(slots):
            logits = self._model(inputs[:, None], cache=caches)[:, -1, :]
        for cache in slots[1:]:
            cache.share_offset(slots[0])
        if any(sequence.processors for sequence in sequences):
            logits = _processed(sequences, inputs, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        wanted = [logprobs[i] if each.sampler.wants_logprobs else None for i, each in enumerate(sequences)]
        token_ids = _sampled(self._sampler, [sequence.sampler for sequence in sequences], logprobs)
        mx.async_eval(token_ids, [each for each in wanted if each is not None])
        return token_ids, wanted

    @contextmanager
    def _operations(self, slots: list[SlotKVCache]) -> Iterator[None]:
        """What the model is computed with."""
        if self._fused_ops is not None and slots:
            self._fused_ops.expect(slots[0].offset)
        with self._fused_ops or nullcontext(), self.attention or nullcontext():
            yield

    @staticmethod
    def _slots(caches: kv.Caches) -> list[SlotKVCache]:
        return [cache for cache in caches if isinstance(cache, SlotKVCache)]


def filled_gaps(indices: Sequence[int]) -> list[int]:
    """The same indices, as few as possible at another place of the list than their own: the last ones fill the gaps."""
    stay = {index for index in indices if index < len(indices)}
    last = (index for index in indices if index >= len(indices))
    return [index if index in stay else next(last) for index in range(len(indices))]


def _processed(sequences: list[BatchSequence], inputs: Any, logits: Any) -> Any:
    """Logits (sequences, vocab) as the sequences' processors change them."""
    rows = []
    for index, sequence in enumerate(sequences):
        row = logits[index : index + 1]
        if sequence.processors:
            if sequence.context is None:
                sequence.context = TokenBuffer(sequence.token_ids[: sequence.num_cached])
            token_ids = sequence.context.update_and_fetch(inputs[index : index + 1])
            for processor in sequence.processors:
                row = processor(token_ids, row)
        rows.append(row)
    return mx.concatenate(rows)


def logits_processors(sampling: SamplingParams, sampler: SequenceSampler) -> list[LogitsProcessor]:
    """What needs the logits themselves; everything else is the sampler's."""
    if sampling.repetition_penalty == 1.0:
        return []
    made = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty,
        repetition_context_size=sampling.repetition_context_size,
    )
    return [guarded(sampler, processor) for processor in made]


def guarded(sampler: SequenceSampler, processor: LogitsProcessor) -> LogitsProcessor:
    """A logits processor whose error ends its own sequence and no other."""

    def process(token_ids: Any, logits: Any) -> Any:
        if sampler.error is None:
            try:
                return processor(token_ids, logits)
            except Exception as error:  # noqa: BLE001 (the engine reports it)
                sampler.error = error
        return logits

    return process


def _sampled(sampler: BatchSampler, samplers: list[SequenceSampler], logprobs: Any) -> Any:
    """mx.array (sequences,) of token ids."""
    values = logprobs if logprobs.dtype == mx.float32 else logprobs.astype(mx.float32)
    token_ids = sampler.sample(samplers, values)
    if token_ids is None:
        return mx.argmax(logprobs, axis=-1)
    if isinstance(token_ids, np.ndarray):
        return mx.array(token_ids.astype(np.uint32))
    return token_ids.astype(mx.uint32)
