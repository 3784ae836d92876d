"""How much of the waiting prompts is read between two decode steps.

A GPU reads thousands of tokens in the time in which a CPU reads a hundred, and a decode step waits for what is read
beside it. Pure arithmetic, learned from what reading took; `mlx_engine` asks it before each step and does what it says.
"""

from __future__ import annotations

from typing import NamedTuple

TARGET_SECONDS = 1.0
"""How long reading may hold up the streams that run beside it, and whoever wants to leave or to come meanwhile. Less
costs throughput: each group of prompts pays for a decode step of its own."""

LEAST_TOKENS = 32
MOST_PROMPTS = 8
_FIRST_TOKENS = 512

_GATHER_SECONDS = 0.02
_GATHER_SHARE = 0.05


class PrefillPlan(NamedTuple):
    """What the next step reads.

    Attributes:
        num_prompts: How many prompts, the ones already begun and the first of those that wait.
        num_tokens: How many tokens of each, at most.
    """

    num_prompts: int
    num_tokens: int


class PrefillBudget:
    """See the module.

    Attributes:
        num_tokens: Of all prompts together, padding included; at most what the setting says.
        gather_seconds: A small part of what a step takes, in which the rest of a burst comes.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self.num_tokens = min(most_tokens, _FIRST_TOKENS)
        self.gather_seconds = 0.0

    def plan(self, begun: list[int], waiting: list[int]) -> PrefillPlan:
        """Decide what is read next.

        1. As many prompts are read whole as the budget has room for: a decode step that runs with half a batch because
           the other half is read in pieces is a waste.
        2. A prompt that is longer than the budget is read in pieces. Short ones are not kept waiting for it: they are
           read beside it, and it takes smaller pieces meanwhile.
        3. Something is always read.

        Args:
            begun: Tokens left of the prompts that are being read.
            waiting: Tokens of the others, in the order in which they came.
        """
        chosen = list(begun)
        for num_left in waiting[: MOST_PROMPTS - len(begun)]:
            if chosen and not self._has_room(chosen, num_left):
                break
            chosen.append(num_left)
        num_prompts = max(1, len(chosen))
        return PrefillPlan(num_prompts, max(1, self.num_tokens // num_prompts))

    def _has_room(self, chosen: list[int], num_left: int) -> bool:
        share, longest = self.num_tokens // (len(chosen) + 1), max(chosen)
        is_read_in_pieces = longest > self.num_tokens // len(chosen)
        return num_left <= share and (longest <= share or is_read_in_pieces)

    def took(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that read `num_tokens`, padding included."""
        self.gather_seconds = min(_GATHER_SECONDS, _GATHER_SHARE * seconds)
        affordable = min(int(num_tokens * TARGET_SECONDS / max(seconds, 1e-6)), 2 * self.num_tokens)
        if num_tokens < self.num_tokens and seconds <= TARGET_SECONDS:
            # A few tokens cost more apiece than many: they say nothing against the budget.
            affordable = max(affordable, self.num_tokens)
        self.num_tokens = max(min(LEAST_TOKENS, self._most_tokens), min(self._most_tokens, affordable))
