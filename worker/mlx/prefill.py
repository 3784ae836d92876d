"""Prefill: how much to prefill between two decode steps (`PrefillBudget`), and the batch of prompts (`PromptBatch`).

Called by `worker.mlx.batch` after each decode step. A GPU prefills thousands of tokens in the time in which a CPU prefills a
hundred, and the next decode step has to wait, so the budget adapts to how long prefilling takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from worker.mlx import caches as kv
from worker.mlx.decode import BatchSequence

TARGET_SECONDS = 1.0
"""How long a prefill of complete prompts may delay decoding sequences, and those that join or leave. A smaller value costs
throughput: a decode step takes as long for the first sequences of a burst as for all of them."""

PIECE_SECONDS = 0.25
"""The same for one piece of a longer prompt, which delays them again and again."""

MIN_TOKENS = 32
MAX_PROMPTS = 64
"""How many prompts prefill together, at most."""

MAX_IN_PIECES = 8
"""The same while a long prompt prefills in pieces, which are divided among them."""

_MAX_FREE_BYTES = 256 * 2**20
"""How much freed memory MLX may keep for reuse."""

_COPY_SECONDS = 0.004
"""How long it takes to keep the caches of a prefix, to find and copy them, and to merge them into a batch. Measured with 32 arrays
on an H200, where it does not depend on their lengths."""

_INITIAL_TOKENS = 64
"""The budgets before anything was observed. The slowest machine must prefill so many tokens within the time after which the
watchdog takes a step for hung. The price is one short step for the first prompt, a few milliseconds on a GPU."""

_SECOND_TOKENS = 512
"""The largest budget for complete prompts after the first prefill; then it is doubled at most by each."""

_MAX_BURST_WAIT_SECONDS = 0.02
_BURST_WAIT_SHARE = 0.05  # of the latest prefill's duration

_MAX_PAUSE_SECONDS = 0.02
_MAX_PAUSE_SHARE = 1 / 8  # of waiting sequences to decoding ones


class PrefillPlan(NamedTuple):
    """What to prefill next.

    Attributes:
        joining: Indices of the waiting prompts that begin, ascending.
        num_tokens: How many tokens of each prompt, at most.
    """

    joining: list[int]
    num_tokens: int


class PrefillBudget:
    """How much to prefill between two decode steps, and of which prompts. Pure arithmetic.

    Attributes:
        num_tokens: Budget for complete prompts, all together and padding included; at most `max_tokens`.
        piece_tokens: Budget for prompts that are prefilled in pieces.
        burst_wait_seconds: How long to wait for the rest of a burst: a small part of what a prefill takes.
        pause_seconds: How long no prefill begins after a prefill if few sequences wait and many decode: a GPU prefills a few
            short prompts in the same time as one.
        copy_tokens: How many tokens are prefilled in the time that it takes to copy a cached prefix.

    Args:
        max_tokens: The largest budget, as set by the operator.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.num_tokens = min(max_tokens, _INITIAL_TOKENS)
        self.piece_tokens = min(max_tokens, _INITIAL_TOKENS)
        self.burst_wait_seconds = 0.0
        self.pause_seconds = 0.0
        self._best_per_second = 0.0
        self._is_first = True

    @property
    def copy_tokens(self) -> int:
        return int(_COPY_SECONDS * self._best_per_second)

    def plan(self, begun: list[int], waiting: list[int]) -> PrefillPlan:
        """Decide what to prefill next.

        1. As many complete prompts as the budget has room for, first come, first served. Not pieces of more prompts: decode
           steps with half of a batch, while the other half still prefills, waste time.
        2. A prompt that is longer than the budget is prefilled in pieces. These are smaller, since they delay others repeatedly.
        3. Meanwhile, prompts at most half as long as the longest do not wait for it: they share the pieces, even if long prompts
           are before them in the queue.
        4. Something is always prefilled.

        Args:
            begun: For each prompt that is prefilling, the tokens that are left.
            waiting: The same for the prompts that have not begun, in the order of arrival.
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

    def may_pause(self, num_waiting: int, num_decoding: int, since_seconds: float) -> bool:
        """Whether the waiting prompts may wait for one more step.

        Args:
            since_seconds: Since the last prefill.
        """
        return since_seconds < self.pause_seconds and num_waiting <= _MAX_PAUSE_SHARE * num_decoding

    def _is_in_pieces(self, chosen: list[int]) -> bool:
        return bool(chosen) and max(chosen) > self.num_tokens // len(chosen)

    def _has_room(self, chosen: list[int], num_left: int) -> bool:
        return max(*chosen, num_left) <= self.num_tokens // (len(chosen) + 1)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Adapt to the duration of a prefill of `num_tokens`, padding included."""
        self.burst_wait_seconds = min(_MAX_BURST_WAIT_SECONDS, _BURST_WAIT_SHARE * seconds)
        self.pause_seconds = min(_MAX_PAUSE_SECONDS, seconds)
        per_second = num_tokens / max(seconds, 1e-6)
        if num_tokens >= MIN_TOKENS:
            # The best of many steps: the time of a few tokens, or of the first step of a shape, is mostly overhead.
            self._best_per_second = max(per_second, 0.98 * self._best_per_second)
        max_next = max(2 * self.num_tokens, _SECOND_TOKENS if self._is_first else 0)
        self._is_first = False
        self.num_tokens = self._adapted(self.num_tokens, max_next, num_tokens, seconds, TARGET_SECONDS)
        self.piece_tokens = self._adapted(
            self.piece_tokens, 2 * self.piece_tokens, num_tokens, seconds, PIECE_SECONDS
        )

    def _adapted(
        self,
        before: int,
        max_next: int,
        num_tokens: int,
        seconds: float,
        target_seconds: float,
    ) -> int:
        affordable = min(int(num_tokens / max(seconds, 1e-6) * target_seconds), max_next)
        if num_tokens < before and seconds <= target_seconds:
            # A few tokens take longer per token than many: only the best of many steps lowers the budget.
            best = int(self._best_per_second * target_seconds) or before
            affordable = max(affordable, min(before, best))
        return max(min(MIN_TOKENS, self._max_tokens), min(self._max_tokens, affordable))


class PromptBatch:
    """Prompts that prefill together, each from its own position. Sequence i is row i of the caches."""

    def __init__(self, model: object) -> None:
        self.sequences: list[BatchSequence] = []
        self._model: Any = model
        self._caches: kv.Caches = []

    def join(self, sequences: Sequence[BatchSequence]) -> None:
        """Add sequences, each with the tokens in its caches."""
        if not sequences:
            return
        caches = merge_own_caches(self._model, sequences)
        if self.sequences:
            kv.extend(self._caches, caches)
        else:
            self._caches = caches
        self.sequences += sequences

    def prefill(self, max_tokens: int) -> int:
        """Prefill the next tokens of each prompt, `max_tokens` at most; returns their number, padding included."""
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
        """Remove the sequences with all but the last token of their prompts in their caches; returns them and their batch's caches."""
        return self._take([index for index, each in enumerate(self.sequences) if not each.num_left])

    def remove(self, sequence: BatchSequence) -> None:
        """Remove a sequence."""
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


def merge_own_caches(model: Any, sequences: Sequence[BatchSequence]) -> kv.Caches:
    """Merge the sequences' own caches into a batch's; the sequences give theirs up."""
    own = [kv.new(model) if each.caches is None else each.caches for each in sequences]
    for sequence in sequences:
        sequence.caches = None
    return kv.merge(own)
