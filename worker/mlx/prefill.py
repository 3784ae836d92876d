"""How much of the waiting prompts is read between two decode steps, and of which.

A GPU reads thousands of tokens in the time in which a CPU reads a hundred, and a decode step waits for what is read
beside it. Pure arithmetic, learned from what reading took; `mlx_batch` asks it before each step and does what it says.
"""

from __future__ import annotations

from typing import NamedTuple

TARGET_SECONDS = 1.0
"""How long reading whole prompts may hold up the streams that run beside it, and whoever wants to leave or to come
meanwhile. Less costs throughput: a batch decodes as long for the first rows of a burst as for all of them."""

PIECE_SECONDS = 0.25
"""The same for a piece of a prompt that is longer than that: it holds them up again and again."""

MIN_TOKENS = 32
MAX_PROMPTS = 64
MAX_IN_PIECES = 8
"""Beside a long prompt: each of its pieces is divided among them."""

_COPY_SECONDS = 0.004
"""What it takes to keep the caches of a beginning, to find and copy them, and to put them into a batch: 32 arrays on an H200,
and there it does not depend on their lengths."""

_FIRST_TOKENS = 512
_FIRST_PIECE_TOKENS = 64  # it is doubled as long as that takes less than it may

_GATHER_SECONDS = 0.02
_GATHER_SHARE = 0.05

_REST_SECONDS = 0.02
_FEW_SHARE = 1 / 8


class PrefillPlan(NamedTuple):
    """What the next step reads.

    Attributes:
        joining: Which of the waiting prompts begin, by their places in the line, in order.
        num_tokens: How many tokens of each prompt, at most.
    """

    joining: list[int]
    num_tokens: int


class PrefillBudget:
    """See the module.

    Attributes:
        num_tokens: Of whole prompts together, padding included; at most what the setting says.
        piece_tokens: Of prompts that are read in pieces.
        burst_wait_seconds: A small part of what a step takes, in which the rest of a burst comes.
        rest_seconds: How long nothing is read after something was, where few wait beside many that decode: to read a
            few short prompts takes a GPU as long as to read one.
        copy_tokens: As many are read in the time in which a beginning that was read before is copied.
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
        """Decide what is read next.

        1. As many prompts are read whole as the budget has room for, in the order in which they came: a decode step that
           runs with half a batch because the other half is read in pieces is a waste.
        2. A prompt that is longer than the budget is read in pieces, smaller ones: they hold up others again and again.
        3. While one is, those that are at most half as long do not wait for it: they share the pieces, whatever long ones
           are before them in the line.
        4. Something is always read.

        Args:
            begun: Tokens left of the prompts that are being read.
            waiting: Tokens of the others, in the order in which they came.
        """
        chosen, joining = list(begun), []
        for place, num_left in enumerate(waiting):
            in_pieces = self._is_in_pieces(chosen)
            if len(chosen) >= (MAX_IN_PIECES if in_pieces else MAX_PROMPTS):
                break
            if not chosen or (
                num_left <= max(chosen) // 2 if in_pieces else self._has_room(chosen, num_left)
            ):
                chosen.append(num_left)
                joining.append(place)
            elif not in_pieces:
                break
        num_tokens = self.piece_tokens if self._is_in_pieces(chosen) else self.num_tokens
        return PrefillPlan(joining, max(1, num_tokens // max(1, len(chosen))))

    def may_rest(self, num_waiting: int, num_decoding: int, since_seconds: float) -> bool:
        """Whether those that wait may do so for a step more.

        Args:
            since_seconds: Since something was read.
        """
        return since_seconds < self.rest_seconds and num_waiting <= _FEW_SHARE * num_decoding

    def _is_in_pieces(self, chosen: list[int]) -> bool:
        return bool(chosen) and max(chosen) > self.num_tokens // len(chosen)

    def _has_room(self, chosen: list[int], num_left: int) -> bool:
        return max(*chosen, num_left) <= self.num_tokens // (len(chosen) + 1)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that read `num_tokens`, padding included."""
        self.burst_wait_seconds = min(_GATHER_SECONDS, _GATHER_SHARE * seconds)
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
            # A few tokens cost more apiece than many: only the best of many steps speaks against the budget.
            best = int(self._best_per_second * target_seconds) or before
            affordable = max(affordable, min(before, best))
        return max(min(MIN_TOKENS, self._max_tokens), min(self._max_tokens, affordable))
