"""How much to prefill between two decode steps, and of which prompts. Pure arithmetic.

Called by `worker.mlx.batch` after each decode step. A GPU prefills thousands of tokens in the time in which a CPU prefills a
hundred, and the next decode step has to wait, so the budget adapts to how long prefilling takes.
"""

from __future__ import annotations

from typing import NamedTuple

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

_COPY_SECONDS = 0.004
"""How long it takes to keep the caches of a prefix, to find and copy them, and to merge them into a batch. Measured with 32 arrays
on an H200, where it does not depend on their lengths."""

INITIAL_TOKENS = 64
"""The budgets before anything was observed or measured. The slowest machine must prefill so many tokens within the time after which the
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
    """See the module.

    Attributes:
        num_tokens: Budget for complete prompts, all together and padding included; at most `max_tokens`.
        piece_tokens: Budget for prompts that are prefilled in pieces.
        burst_wait_seconds: How long to wait for the rest of a burst: a small part of what a prefill takes.
        pause_seconds: How long no prefill begins after a prefill if few sequences wait and many decode: a GPU prefills a few
            short prompts in the same time as one.
        copy_tokens: How many tokens are prefilled in the time that it takes to copy a cached prefix.

    Args:
        max_tokens: The largest budget: as set by the operator, or see `worker.mlx.prefill.step_size`.
        first_tokens: The budgets before anything was observed.
    """

    def __init__(self, max_tokens: int, first_tokens: int = INITIAL_TOKENS) -> None:
        self._max_tokens = max_tokens
        self.num_tokens = min(max_tokens, first_tokens)
        self.piece_tokens = min(max_tokens, first_tokens)
        self.burst_wait_seconds = 0.0
        self.pause_seconds = 0.0
        self._best_per_second = 0.0
        self._is_first = True

    def set_max_tokens(self, max_tokens: int) -> None:
        """Change the largest budget."""
        self._max_tokens = max_tokens
        self.num_tokens = min(max_tokens, self.num_tokens)
        self.piece_tokens = min(max_tokens, self.piece_tokens)

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
