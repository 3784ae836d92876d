"""The sequences that are decoding: one step computes the next token of each.

Created and called by `worker.mlx.batch`. A sequence's index in `DecodeBatch.sequences` is its row in every array of a step and its
slot in the caches; nothing else depends on that order. On a GPU a decode step of a small model takes as long as the CPU
needs to launch it, about ten microseconds per operation, so a step is built of as few operations as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import TokenBuffer

from worker.mlx.backends.cpu_ops import FusedCpuOps
from worker.mlx.backends.cuda_attention import PaddedAttention
from worker.mlx.caches import kinds as kv
from worker.mlx.caches.kv_slots import SlotKVCache, moves_to
from worker.mlx.decoding.compiled_forward import CompiledForward
from worker.mlx.memory.cache_memory import expected_tokens
from worker.mlx.sampling.chosen import ChosenRow, ChosenTokens, PreviousTokens, StepSampler
from worker.mlx.sampling.host_sampler import LogitsProcessor
from worker.sampling.scores import Score
from worker.sampling.sequence_sampler import SequenceSampler

OfferCaches = Callable[[Sequence[kv.CacheOffer]], None]
"""Offers the caches of sequences to the prefix cache."""

_MAX_MOVES = 8
"""How many groups of adjacent sequences are copied into freed slots; if more would move, new buffers are made instead."""


@dataclass(slots=True, eq=False)
class BatchSequence:
    """A sequence on its way through the batch: waiting, prefilling, decoding.

    Attributes:
        token_ids: The prompt, at least one token, then each token that was generated.
        max_tokens: How many to generate, at least 1.
        num_replayed: How many tokens at the end of the prompt are of the answer: other workers generated them.
        num_cached: How many of `token_ids` are in the caches, including those of the step under way.
        caches: The sequence's own, with `num_cached` tokens, until it is prefilled; None: there are none yet.
        ignores_eos: Whether an end-of-text token does not end the answer.
        min_tokens: One of the first so many does not either.
        stop_token_ids: Further tokens that end the answer, also with `ignores_eos`.
        processors: mlx-lm's, on a CPU; on a GPU `DeviceSampler` does the same by the sampling parameters.
        context: The token ids that the processors receive; created in the first step.
    """

    job_id: str
    token_ids: list[int]
    max_tokens: int
    sampler: SequenceSampler
    processors: list[LogitsProcessor] = field(default_factory=list)
    num_cached: int = 0
    caches: kv.Caches | None = None
    num_generated: int = 0
    ignores_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    context: TokenBuffer | None = None
    num_replayed: int = 0

    @property
    def expected_tokens(self) -> int:
        """How long the sequence is expected to become: what memory is reserved for, and what buffers have room for."""
        num_answer_tokens = self.num_replayed + self.num_generated
        num_prompt_tokens = len(self.token_ids) - num_answer_tokens
        return expected_tokens(num_prompt_tokens, num_answer_tokens, self.num_replayed + self.max_tokens)

    @property
    def num_left(self) -> int:
        """Prompt tokens to prefill; the last one is computed in the first decode step."""
        return len(self.token_ids) - 1 - self.num_cached


class BatchToken(NamedTuple):
    """A sequence's next token.

    Attributes:
        score: None unless the job asks for log-probabilities.
        finish_reason: Set on the last token; the sequence has left the batch by then.
    """

    job_id: str
    token_id: int
    score: Score | None
    finish_reason: Literal["stop", "length"] | None


class DecodeBatch:
    """See the module.

    Args:
        offer_caches: See `offer`.
        attention: Computes the attention of padded sequences on CUDA; None: MLX does.
        fused_ops: For MLX's CPU back-end; None elsewhere.
        compiled: The model's compiled forward pass; None: it is not compiled.
    """

    def __init__(
        self,
        model: Any,
        sampler: StepSampler,
        *,
        eos_token_ids: Sequence[int],
        max_sequences: int,
        offer_caches: OfferCaches,
        attention: PaddedAttention | None = None,
        fused_ops: FusedCpuOps | None = None,
        compiled: CompiledForward | None = None,
    ) -> None:
        self.sequences: list[BatchSequence] = []
        self.caches: kv.Caches = []
        self.attention = attention
        self._model = model
        self._sampler = sampler
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_sequences = max_sequences
        self._offer_caches = offer_caches
        self._fused_ops = fused_ops
        self.compiled = compiled
        # Whether the caches' own arrays of positions are up to date: compiled steps have others.
        self._has_offsets = True
        # By index, then those of slots without a sequence: the next step's input tokens.
        self._inputs: Any = None
        # By index: where the input token was chosen; None: it is a prompt's last token.
        self._chosen: list[ChosenRow | None] = []

    def join(self, sequences: list[BatchSequence], caches: kv.Caches) -> None:
        """Add sequences that are prefilled.

        If all layers keep every token, they take part in the next step. Other kinds of caches may not be merged while they are
        empty, so their sequences take a first decode step of their own, now.

        Args:
            caches: Of these sequences, in their order.
        """
        inputs: Any = mx.array([sequence.token_ids[-1] for sequence in sequences], mx.uint32)
        chosen: list[ChosenRow | None] = [None] * len(sequences)
        if not kv.keep_every_token(caches):
            first = self._compute(sequences, caches, inputs, _previous(sequences, chosen))
            inputs, chosen = first.token_ids, _rows(first, len(sequences))
            for sequence in sequences:
                sequence.num_cached += 1
        if self.sequences:
            self._expect([*self.sequences, *sequences])
            kv.extend(self.caches, caches)
            inputs = mx.concatenate([self._inputs[: len(self.sequences)], inputs])
        else:
            self.caches = kv.with_slots(caches, self._max_sequences, self.attention)
            self._expect(sequences)
        self._inputs = inputs
        self.sequences += sequences
        self._chosen += chosen
        self._update_positions()

    def remove(self, sequence: BatchSequence) -> None:
        self._keep([index for index, each in enumerate(self.sequences) if each is not sequence])

    def step(self) -> list[BatchToken]:
        """Start computing the next step, and return the tokens of the previous one; sequences that have just joined have none yet."""
        if not self.sequences:
            return []
        previous = _previous(self.sequences, self._chosen)
        chosen = self._compute(self.sequences, self.caches, self._inputs, previous)
        self._inputs, self._chosen = chosen.token_ids, _rows(chosen, len(self.sequences))
        tokens: list[BatchToken] = []
        finished: list[int] = []
        unfinished: list[int] = []
        for index, (sequence, token) in enumerate(zip(self.sequences, previous.read(), strict=True)):
            sequence.num_cached += 1
            reason = None
            if token is not None:
                token_id, score = token
                sequence.token_ids.append(token_id)
                sequence.num_generated += 1
                reason = self._finish_reason(sequence, token_id)
                tokens.append(BatchToken(sequence.job_id, token_id, score, reason))
            (unfinished if reason is None else finished).append(index)
        if finished:
            self.offer(finished)
            self._keep(unfinished)
        return tokens

    def offer(self, indices: Sequence[int]) -> None:
        """Offer caches to the prefix cache: of sequences that have joined, and of finished ones before they leave."""
        if kv.can_extract(self.caches):
            self._offer_caches(
                [
                    kv.CacheOffer(
                        self.sequences[index].token_ids[: self.sequences[index].num_cached],
                        partial(kv.extract, self.caches, index),
                    )
                    for index in indices
                ]
            )

    def _finish_reason(self, sequence: BatchSequence, token_id: int) -> Literal["stop", "length"] | None:
        is_eos = token_id in self._eos_token_ids and not sequence.ignores_eos
        if (is_eos or token_id in sequence.stop_token_ids) and sequence.num_generated > sequence.min_tokens:
            return "stop"
        return "length" if sequence.num_generated >= sequence.max_tokens else None

    def _keep(self, indices: list[int]) -> None:
        """Remove all other sequences. Those that stay may change their indices: the last ones fill the gaps."""
        if indices:
            self._expect([self.sequences[index] for index in indices])
        order = self._order(indices) if indices else []
        self.sequences = [self.sequences[index] for index in order]
        self._chosen = [self._chosen[index] for index in order]
        if not order:
            self.caches, self._inputs = [], None
            return
        for cache in self.caches:
            cache.filter(order)
        self._inputs = self._inputs[mx.array(order)]
        self._update_positions()

    def _order(self, indices: list[int]) -> list[int]:
        """The order in which sequences stay: with gaps filled by copies, or unchanged if new buffers are the better choice."""
        slots = self._slots(self.caches)
        order = fill_gaps(indices)
        moves = moves_to(order)
        if len(moves) > _MAX_MOVES or any(cache.is_wasteful(indices) for cache in slots):
            return indices
        if moves:
            mx.async_eval([copied for cache in slots for copied in cache.lift(moves)])
        return order

    def _expect(self, sequences: list[BatchSequence]) -> None:
        """If steps are compiled, give new buffers room for these sequences' answers: longer buffers need another trace."""
        if self.compiled is not None:
            for cache in self._slots(self.caches):
                cache.expected_tokens = max(sequence.expected_tokens for sequence in sequences)

    def _update_positions(self) -> None:
        slots = self._slots(self.caches)
        for cache in slots:
            cache.update_positions(None if cache is slots[0] else slots[0])
        self._has_offsets = True
        if self.compiled is not None:
            self.compiled.forget_positions()
        # Now: as part of the next step they would be known only at its end.
        mx.async_eval(self._inputs)

    def _compute(
        self, sequences: list[BatchSequence], caches: kv.Caches, inputs: Any, previous: PreviousTokens
    ) -> ChosenTokens:
        """Start computing one token per sequence.

        Args:
            previous: The tokens of `inputs`; read if the choice depends on them.
        """
        slots = self._slots(caches)
        if self.compiled is not None and len(slots) == len(caches) and slots[0].keys is not None:
            for cache in slots:
                cache.make_room(1, has_common_shape=True)
            if (logits := self._compiled_logits(self.compiled, inputs, slots)) is not None:
                return self._sampler.choose(sequences, self._inputs, logits, previous)
        inputs = inputs[: len(sequences)]
        with self._operations(slots):
            logits = self._model(inputs[:, None], cache=caches)[:, -1, :]
        for cache in slots[1:]:
            cache.share_offset(slots[0])
        return self._sampler.choose(sequences, inputs, logits, previous)

    def _compiled_logits(
        self, compiled: CompiledForward, inputs: Any, slots: list[SlotKVCache]
    ) -> mx.array | None:
        """The logits of all slots, (slots, vocab); None if the forward pass cannot be compiled for them."""
        if compiled.can_run(slots):
            self._inputs = _padded(inputs, slots[0].num_slots)
            if (logits := compiled.logits(self._inputs, slots)) is not None:
                self._has_offsets = False
                return logits
        if not self._has_offsets:
            self._update_positions()
        return None

    @contextmanager
    def _operations(self, slots: list[SlotKVCache]) -> Iterator[None]:
        """Replace some of MLX's functions while the graph of a step is built."""
        if self._fused_ops is not None and slots:
            self._fused_ops.expect(slots[0].offset)
        with self._fused_ops or nullcontext(), self.attention or nullcontext():
            yield

    @staticmethod
    def _slots(caches: kv.Caches) -> list[SlotKVCache]:
        return [cache for cache in caches if isinstance(cache, SlotKVCache)]


def fill_gaps(indices: Sequence[int]) -> list[int]:
    """The same indices, in an order in which as few as possible move: the last ones fill the gaps."""
    stay = {index for index in indices if index < len(indices)}
    last = (index for index in indices if index >= len(indices))
    return [index if index in stay else next(last) for index in range(len(indices))]


def _padded(token_ids: mx.array, num_slots: int) -> mx.array:
    """(slots,) token ids; any for slots without a sequence. There are fewer slots than before if buffers were made anew."""
    num_missing = num_slots - token_ids.shape[0]
    if num_missing <= 0:
        return token_ids[:num_slots] if num_missing else token_ids
    return mx.concatenate([token_ids, mx.zeros((num_missing,), mx.uint32)])


def _previous(sequences: list[BatchSequence], chosen: list[ChosenRow | None]) -> PreviousTokens:
    return PreviousTokens([sequence.sampler for sequence in sequences], chosen)


def _rows(chosen: ChosenTokens, num_sequences: int) -> list[ChosenRow | None]:
    return list(zip(repeat(chosen), range(num_sequences)))
