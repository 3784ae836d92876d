"""How much memory the caches of running rows may take, and whether one more row fits. Pure arithmetic.

The caches of a batch are in arrays that are as long as its longest row, with slots for a few rows more (`mlx_slots`): what counts
is slots times longest. Made by `mlx_model`, asked by `mlx_engine`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.memory_claims import WORKING_BYTES, WORKING_SHARE

_GROWS_BY_TOKENS = 256
"""Caches get longer in steps of this, mlx-lm's (0.32, `KVCache.step`) and those in slots."""

_MIN_SPARE_TOKENS = 128
"""Or arrays that were just made would soon be too short again."""

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

    def rows_bytes(self, num_rows: int, num_tokens: int) -> float:
        """For so many rows, the longest of which has so many tokens, prompt and answer together."""
        num_columns = columns(num_tokens + 1)
        windows = sum(each * min(num_columns, most) for each, most in self.windows)
        return (
            num_rows * (self.bytes_per_row + windows) + slots(num_rows) * self.bytes_per_token * num_columns
        )


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """See the module.

    Attributes:
        room_bytes: For all rows together.
        weight_bytes: Of the model.
    """

    cost: CacheCost
    room_bytes: float
    weight_bytes: int = 0

    def with_limit(self, limit_bytes: float) -> CacheMemory:
        """The same with the room that a process has which may use so much memory."""
        working_bytes = max(WORKING_BYTES, WORKING_SHARE * limit_bytes)
        return replace(self, room_bytes=limit_bytes - self.weight_bytes - working_bytes)

    def fits(self, num_tokens_by_row: list[int]) -> bool:
        """Whether these rows, with so many tokens each, have room together."""
        return self.left_bytes(num_tokens_by_row) >= 0

    def left_bytes(self, num_tokens_by_row: list[int], held_bytes: float = 0.0) -> float:
        """What these rows leave of the room; below 0 where it is too small for them.

        Args:
            held_bytes: By caches that are there, which may be larger than these rows need: others have left.
        """
        if not num_tokens_by_row:
            return self.room_bytes - held_bytes
        needed_bytes = self.cost.rows_bytes(len(num_tokens_by_row), max(num_tokens_by_row))
        return self.room_bytes - max(needed_bytes, held_bytes)

    def longest_row(self, max_tokens: int) -> int:
        """The longest row that has room alone, up to `max_tokens`."""
        low, high = 0, max_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits([middle]) else (low, middle - 1)
        return low


def slots(num_rows: int) -> int:
    """How many rows there is a place for where there are `num_rows`: of 8 and more, whoever comes next finds one."""
    return num_rows + num_rows // 8


def columns(num_tokens: int) -> int:
    """How long arrays for so many tokens are, with some to spare."""
    return -(-(num_tokens + _MIN_SPARE_TOKENS) // _GROWS_BY_TOKENS) * _GROWS_BY_TOKENS


def expected_tokens(num_prompt: int, num_done: int, max_tokens: int) -> int:
    """How long a row is expected to become.

    Args:
        num_done: Tokens of its answer that are there.
        max_tokens: Of its answer.
    """
    return num_prompt + min(max_tokens, max(num_done, EXPECTED_TOKENS))
