"""The prompts that are prefilling, in batches.

Created and called by `worker.mlx.batch`, which decides which sequences join and how much is prefilled. There is one batch, except on CUDA:
a mask is expensive there, so prompts with and without cached prefixes are in different batches (`grouped`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from worker.mlx.backends.prompt_attention import PromptAttention
from worker.mlx.caches import kinds as kv
from worker.mlx.caches.prompt_cache import PromptKVCache
from worker.mlx.decoding.decode_batch import BatchSequence
from worker.mlx.memory.cache_memory import columns

_MAX_FREE_BYTES = 256 * 2**20
"""How much freed memory MLX may keep for reuse in any case."""

_MAX_RECOMPUTED_TOKENS = 256
"""How many tokens of a cached prefix are prefilled again, at most, so that all prompts of a batch have the same number left: padding would
need a mask, and all rows would be copied to remove it."""


class PromptBatches:
    """See the module.

    Args:
        attention: Computes attention on CUDA; None: MLX does.
        limit_bytes: Below this, MLX may keep all freed memory for reuse.
    """

    def __init__(
        self, model: object, attention: PromptAttention | None = None, limit_bytes: float = 0.0
    ) -> None:
        self.limit_bytes = limit_bytes
        self._model = model
        self._attention = attention
        self._batches: list[PromptBatch] = []

    @property
    def sequences(self) -> list[BatchSequence]:
        return [sequence for batch in self._batches for sequence in batch.sequences]

    def join(self, sequences: Sequence[BatchSequence], max_tokens: int) -> None:
        """Add sequences, each with the tokens in its caches.

        Args:
            max_tokens: How many tokens of each prompt are prefilled next, at most.
        """
        if self._attention is None and self._batches:
            self._batches[0].join(sequences, max_tokens)
            return
        for group in grouped(sequences, self._attention):
            batch = PromptBatch(self._model, self._attention)
            batch.join(group, max_tokens)
            self._batches.append(batch)

    def prefill(self, max_tokens: int) -> int:
        """Prefill the next tokens of each prompt, `max_tokens` at most; returns their number, padding included."""
        num_tokens = sum(batch.prefill(max_tokens) for batch in self._batches)
        mx.eval([batch.states for batch in self._batches])
        free_bytes = mx.get_cache_memory()
        if free_bytes > _MAX_FREE_BYTES and free_bytes + mx.get_active_memory() > self.limit_bytes:
            mx.clear_cache()
        return num_tokens

    def take_prefilled(self) -> list[tuple[list[BatchSequence], kv.Caches]]:
        """Remove the sequences with all but the last token of their prompts in their caches; returns them and their caches, by batch."""
        taken = [batch.take_prefilled() for batch in self._batches]
        self._drop_empty()
        return [(sequences, caches) for sequences, caches in taken if sequences]

    def remove(self, sequence: BatchSequence) -> None:
        for batch in self._batches:
            batch.remove(sequence)
        self._drop_empty()

    def _drop_empty(self) -> None:
        self._batches = [batch for batch in self._batches if batch.sequences]


def grouped(
    sequences: Sequence[BatchSequence], attention: PromptAttention | None
) -> list[list[BatchSequence]]:
    """The sequences that should prefill together.

    On CUDA these are the ones without a cached prefix, and the ones with few tokens left after one; each of the others is alone. Elsewhere
    all are together.
    """
    if attention is None:
        return [list(sequences)] if sequences else []
    new, short, long = [], [], []
    for each in sequences:
        if not each.num_cached:
            new.append(each)
        elif attention.is_large(1, each.num_left, len(each.token_ids)):
            long.append([each])
        else:
            short.append(each)
    return [group for group in (new, short, *long) if group]


class PromptBatch:
    """Prompts that prefill together. Sequence i is row i of the caches.

    Args:
        attention: See `PromptBatches`.
    """

    def __init__(self, model: object, attention: PromptAttention | None) -> None:
        self.sequences: list[BatchSequence] = []
        self._model: Any = model
        self._attention = attention
        self._caches: kv.Caches = []

    @property
    def states(self) -> list[Any]:
        """Arrays to be evaluated after a prefill."""
        return kv.states(self._caches)

    def join(self, sequences: Sequence[BatchSequence], max_tokens: int) -> None:
        """Add sequences, each with the tokens in its caches.

        Args:
            max_tokens: How many tokens of each prompt are prefilled next, at most.
        """
        if not sequences:
            return
        if not self.sequences:
            self._even_out(sequences, max_tokens)
        num_left = max(each.num_left for each in sequences)
        num_columns = self._room(sequences, num_left) if len(sequences) > 1 else 0
        caches = merge_own_caches(self._model, sequences, num_columns)
        if self.sequences:
            kv.extend(self._caches, caches)
        else:
            self._caches = caches
        self.sequences += sequences

    def _even_out(self, sequences: Sequence[BatchSequence], max_tokens: int) -> None:
        """Cut cached prefixes: those of several sequences so that they need no padding, a single one on CUDA so that its pieces begin at multiples.

        Args:
            max_tokens: Several sequences are cut only if all their tokens fit into one step.
        """
        if not all(_is_divisible(each.caches) for each in sequences):
            return
        num_left = max(each.num_left for each in sequences)
        if self._attention is not None and len(sequences) == 1:
            (only,) = sequences
            if self._attention.is_large(1, num_left, only.num_cached + num_left):
                _cut(only, only.num_cached % self._attention.multiple)
        elif num_left <= min(_MAX_RECOMPUTED_TOKENS, max_tokens) and all(
            len(each.token_ids) > num_left for each in sequences
        ):
            for each in sequences:
                _cut(each, num_left - each.num_left)

    def prefill(self, max_tokens: int) -> int:
        """Start to prefill the next tokens of each prompt, `max_tokens` at most; returns their number, padding included."""
        num_before = {each.num_cached for each in self.sequences}
        if self._attention is not None and max(each.num_left for each in self.sequences) > max_tokens:
            max_tokens = self._attention.rounded_down(max_tokens, min(num_before))
        pieces = [
            each.token_ids[each.num_cached : each.num_cached + min(each.num_left, max_tokens)]
            for each in self.sequences
        ]
        lengths = [len(piece) for piece in pieces]
        longest = max(lengths)
        if self._attention is not None and len(num_before) == 1 and self._keeps_every_token:
            longest = self._attention.rounded_up(len(lengths), longest, min(num_before) + longest)
        padding = [longest - length for length in lengths]
        if any(padding):
            for cache in self._caches:
                cache.prepare(lengths=lengths, right_padding=padding)
        self._reserve(longest)
        with self._attention or nullcontext():
            self._model(
                mx.array([piece + [0] * rest for piece, rest in zip(pieces, padding, strict=True)]),
                cache=self._caches,
            )
        if any(padding):
            for cache in self._caches:
                cache.finalize()
        for sequence, length in zip(self.sequences, lengths, strict=True):
            sequence.num_cached += length
        return longest * len(lengths)

    @property
    def _keeps_every_token(self) -> bool:
        return all(isinstance(cache, PromptKVCache) for cache in self._caches)

    def _room(self, sequences: Sequence[BatchSequence], num_next: int) -> int:
        """How many columns the caches' arrays should have: enough for the complete prompts, or 0, no spare ones.

        Before a large piece on CUDA there should be none: cuDNN makes a plan for each length of the arrays, not only of what is used.

        Args:
            num_next: How many tokens of each prompt are prefilled next.
        """
        num_tokens = max(len(each.token_ids) for each in sequences)
        if self._attention is not None and self._attention.is_large(len(sequences), num_next, num_tokens):
            return 0
        return columns(num_tokens)

    def _reserve(self, num_next: int) -> None:
        num_columns = self._room(self.sequences, num_next)
        for cache in self._caches:
            if isinstance(cache, PromptKVCache):
                cache.num_columns = num_columns

    def take_prefilled(self) -> tuple[list[BatchSequence], kv.Caches]:
        """Remove the sequences with all but the last token of their prompts in their caches; returns them and their batch's caches."""
        return self._take([index for index, each in enumerate(self.sequences) if not each.num_left])

    def remove(self, sequence: BatchSequence) -> None:
        """Does nothing if the sequence is in another batch."""
        if sequence in self.sequences:
            self._take([self.sequences.index(sequence)])

    def _take(self, leaving: list[int]) -> tuple[list[BatchSequence], kv.Caches]:
        staying = [index for index in range(len(self.sequences)) if index not in leaving]
        sequences = [self.sequences[index] for index in leaving]
        if not leaving:
            caches: kv.Caches = []
        elif staying:
            caches = kv.split(self._caches, leaving, staying)
        else:
            caches, self._caches = self._caches, []
        self.sequences = [self.sequences[index] for index in staying]
        return sequences, caches


def merge_own_caches(model: Any, sequences: Sequence[BatchSequence], num_columns: int = 0) -> kv.Caches:
    """Merge the sequences' own caches, which they lose, into a batch's; see `kv.merge`."""
    own = [kv.new(model) if each.caches is None else each.caches for each in sequences]
    for sequence in sequences:
        sequence.caches = None
    return kv.merge(own, num_columns)


def _is_divisible(caches: kv.Caches | None) -> bool:
    """Whether caches can be cut at any token."""
    return caches is not None and all(type(cache) is KVCache for cache in caches)


def _cut(sequence: BatchSequence, num_tokens: int) -> None:
    """Remove the last tokens from a sequence's own caches."""
    sequence.num_cached -= num_tokens
    for cache in sequence.caches or []:
        cache.trim(num_tokens)
