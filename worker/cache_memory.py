"""How much memory the caches of running rows may take, and whether one more row fits. Pure arithmetic.

The caches of a batch are in arrays that are as long as its longest row, with slots for a few rows more (`mlx_slots`): what counts
is slots times longest. Made by `mlx_model`, asked by `mlx_engine`.
"""

from __future__ import annotations

from dataclasses import dataclass

_GROWS_BY_TOKENS = 256
"""Caches get longer in steps of this, mlx-lm's (0.32, `KVCache.step`) and those in slots."""

EXPECTED_TOKENS = 512
"""What is set aside for an answer without a limit, or with a larger one: few are longer, and to keep room for a whole
context for each would leave most of the memory empty. A batch that grows past its room gives a row back."""


@dataclass(frozen=True, slots=True)
class CacheCost:
    """What one row's cache takes.

    Attributes:
        bytes_per_token: Of layers that keep every token.
        bytes_per_row: Of layers with a state of a fixed size.
        windows: (bytes per token, most tokens) of layers that keep the last tokens only.
    """

    bytes_per_token: float
    bytes_per_row: int = 0
    windows: tuple[tuple[float, int], ...] = ()

    def row_bytes(self, num_tokens: int) -> float:
        """For a row of so many tokens, prompt and answer together."""
        num_tokens = -(-(num_tokens + 1) // _GROWS_BY_TOKENS) * _GROWS_BY_TOKENS
        windows = sum(each * min(num_tokens, most) for each, most in self.windows)
        return self.bytes_per_row + self.bytes_per_token * num_tokens + windows


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """See the module.

    Attributes:
        room_bytes: For all rows together.
    """

    cost: CacheCost
    room_bytes: float

    def fits(self, num_tokens_by_row: list[int]) -> bool:
        """Whether these rows, with so many tokens each, have room together."""
        return self.left_bytes(num_tokens_by_row) >= 0

    def left_bytes(self, num_tokens_by_row: list[int]) -> float:
        """What these rows leave of the room; below 0 where it is too small for them."""
        if not num_tokens_by_row:
            return self.room_bytes
        return self.room_bytes - num_slots(len(num_tokens_by_row)) * self.cost.row_bytes(
            max(num_tokens_by_row)
        )

    def longest_row(self, most_tokens: int) -> int:
        """The longest row that has room alone, up to `most_tokens`."""
        low, high = 0, most_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits([middle]) else (low, middle - 1)
        return low


def num_slots(num_rows: int) -> int:
    """How many rows there is a place for where there are `num_rows`: who comes next costs no other row anything."""
    return num_rows + num_rows // 8


def expected_tokens(num_prompt: int, num_done: int, max_tokens: int) -> int:
    """How long a row is expected to become.

    Args:
        num_done: Tokens of its answer that are there.
        max_tokens: Of its answer.
    """
    return num_prompt + min(max_tokens, max(num_done, EXPECTED_TOKENS))
