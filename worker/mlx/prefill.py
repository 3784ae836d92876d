"""Prompts: how much of them is prefilled between two decode steps (`PrefillBudget`), and their batch (`PromptBatch`).

Called by `worker.mlx.batch` before and after each decode step. A GPU prefills thousands of tokens in the time in which a CPU
prefills a hundred, and a decode step waits for what is prefilled beside it: the budget learns from what prefilling took.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from worker.mlx import caches as kv
from worker.mlx.decode import BatchSequence

TARGET_SECONDS = 1.0
"""How long prefilling complete prompts may hold up the streams beside it, and sequences that come or leave meanwhile. Less costs
throughput: a decode step takes as long for the first sequences of a burst as for all of them."""

PIECE_SECONDS = 0.25
"""The same for a piece of a prompt that is longer than that: it holds them up again and again."""

MIN_TOKENS = 32
MAX_PROMPTS = 64
MAX_IN_PIECES = 8
"""Beside a long prompt: each of its pieces is divided among them."""

_MAX_FREE_BYTES = 256 * 2**20
"""Of freed buffers that MLX keeps for later."""

_COPY_SECONDS = 0.004
"""What it takes to keep the caches of a prefix, to find and copy them, and to merge them into a batch: 32 arrays on an H200, where
it does not depend on their lengths."""

_FIRST_TOKENS = 512
_FIRST_PIECE_TOKENS = 64  # doubled while a piece takes less than `PIECE_SECONDS`

_BURST_WAIT_SECONDS = 0.02
_BURST_WAIT_SHARE = 0.05

_REST_SECONDS = 0.02
_FEW_SHARE = 1 / 8


class PrefillPlan(NamedTuple):
    """What to prefill next.

    Attributes:
        joining: Indices of the waiting prompts that begin, ascending.
        num_tokens: Of each prompt, at most.
    """

    joining: list[int]
    num_tokens: int


class PrefillBudget:
    """How much to prefill between two decode steps, and of which prompts. Pure arithmetic.

    Attributes:
        num_tokens: Of complete prompts together, padding included; at most what the setting says.
        piece_tokens: Of prompts that are prefilled in pieces.
        burst_wait_seconds: A small part of what a prefill takes, in which the rest of a burst arrives.
        rest_seconds: How long nothing is prefilled after a prefill if few wait beside many that decode: to prefill a few short
            prompts takes a GPU as long as to prefill one.
        copy_tokens: As many are prefilled in the time in which a cached prefix is copied.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.num_tokens = min(max_tokens, _FIRST_TOKENS)
        self.piece_tokens = min(max_tokens, _FIRST_PIECE_TOKENS)
        self.burst_wait_seconds = 0.0
        self.rest_seconds = 0.0
        self._best_per_second = 0.0

    @property
    def copy_tokens(self) -> int:
        return int(_COPY_SECONDS * self._best_per_second)

    def plan(self, begun: list[int], waiting: list[int]) -> PrefillPlan:
        """Decide what to prefill next.

        1. As many complete prompts as the budget has room for, first come, first served: a decode step of half a batch, because the
           other half prefills in pieces, is a waste.
        2. A prompt that is longer than the budget is prefilled in pieces, smaller ones: they hold up others again and again.
        3. While one is, prompts at most half as long do not wait for it: they share the pieces, even if long ones are before them
           in the queue.
        4. Something is always prefilled.

        Args:
            begun: Tokens left of the prompts that are prefilling.
            waiting: Tokens of the others, in the order of arrival.
        """
        chosen, joining = list(begun), []
        for index, num_left in enumerate(waiting):
            in_pieces = self._is_in_pieces(chosen)
            if len(chosen) >= (MAX_IN_PIECES if in_pieces else MAX_PROMPTS):
                break
            if not chosen or (
                num_left <= max(chosen) // 2 if in_pieces else self._has_room(chosen, num_left)
            ):
                chosen.append(num_left)
                joining.append(index)
            elif not in_pieces:
                break
        num_tokens = self.piece_tokens if self._is_in_pieces(chosen) else self.num_tokens
        return PrefillPlan(joining, max(1, num_tokens // max(1, len(chosen))))

    def may_rest(self, num_waiting: int, num_decoding: int, since_seconds: float) -> bool:
        """Whether the waiting prompts may wait for one step more.

        Args:
            since_seconds: Since the last prefill.
        """
        return since_seconds < self.rest_seconds and num_waiting <= _FEW_SHARE * num_decoding

    def _is_in_pieces(self, chosen: list[int]) -> bool:
        return bool(chosen) and max(chosen) > self.num_tokens // len(chosen)

    def _has_room(self, chosen: list[int], num_left: int) -> bool:
        return max(*chosen, num_left) <= self.num_tokens // (len(chosen) + 1)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a prefill of `num_tokens`, padding included."""
        self.burst_wait_seconds = min(_BURST_WAIT_SECONDS, _BURST_WAIT_SHARE * seconds)
        self.rest_seconds = min(_REST_SECONDS, seconds)
        per_second = num_tokens / max(seconds, 1e-6)
        if num_tokens >= MIN_TOKENS:
            # Of many steps the best: a few tokens, and the first of a shape, take longer than what they add.
            self._best_per_second = max(per_second, 0.98 * self._best_per_second)
        self.num_tokens = self._learned(self.num_tokens, num_tokens, seconds, per_second, TARGET_SECONDS)
        self.piece_tokens = self._learned(self.piece_tokens, num_tokens, seconds, per_second, PIECE_SECONDS)

    def _learned(
        self, before: int, num_tokens: int, seconds: float, per_second: float, target_seconds: float
    ) -> int:
        affordable = min(int(per_second * target_seconds), 2 * before)
        if num_tokens < before and seconds <= target_seconds:
            # A few tokens cost more apiece than many: only the best of many steps lowers the budget.
            best = int(self._best_per_second * target_seconds) or before
            affordable = max(affordable, min(before, best))
        return max(min(MIN_TOKENS, self._max_tokens), min(self._max_tokens, affordable))


class PromptBatch:
    """Prompts that prefill together, each from where it is. Index i is row i of the caches."""

    def __init__(self, model: object) -> None:
        self.sequences: list[BatchSequence] = []
        self._model: Any = model
        self._caches: kv.Caches = []

    def join(self, sequences: Sequence[BatchSequence]) -> None:
        """Take sequences with what their caches have."""
        if not sequences:
            return
        caches = taken_caches(self._model, sequences)
        if self.sequences:
            kv.extend(self._caches, caches)
        else:
            self._caches = caches
        self.sequences += sequences

    def prefill(self, max_tokens: int) -> int:
        """Compute the next tokens of each prompt, `max_tokens` at most; how many that were, padding included."""
        pieces = [
            each.token_ids[each.num_cached : each.num_cached + min(each.num_left, max_tokens)]
            for each in self.sequences
        ]
        lengths = [len(piece) for piece in pieces]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        if any(padding):
            for cache in self._caches:
                cache.prepare(lengths=lengths, right_padding=padding)
        self._model(
            mx.array([piece + [0] * rest for piece, rest in zip(pieces, padding, strict=True)]),
            cache=self._caches,
        )
        if any(padding):
            for cache in self._caches:
                cache.finalize()
        mx.eval(kv.states(self._caches))
        if mx.get_cache_memory() > _MAX_FREE_BYTES:
            mx.clear_cache()
        for sequence, length in zip(self.sequences, lengths, strict=True):
            sequence.num_cached += length
        return longest * len(lengths)

    def take_prefilled(self) -> tuple[list[BatchSequence], kv.Caches]:
        """Sequences that have all but the last token of their prompts in their caches leave; they and their batch's caches."""
        return self._take([index for index, each in enumerate(self.sequences) if not each.num_left])

    def remove(self, sequence: BatchSequence) -> None:
        """Drop a sequence."""
        self._take([index for index, each in enumerate(self.sequences) if each is sequence])

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


def taken_caches(model: Any, sequences: Sequence[BatchSequence]) -> kv.Caches:
    """A batch's caches of what the sequences bring, which they do not keep."""
    own = [kv.new(model) if each.caches is None else each.caches for each in sequences]
    for sequence in sequences:
        sequence.caches = None
    return kv.merged(own)
