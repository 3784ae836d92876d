"""How much memory the caches of sequences may take, and whether one more sequence fits.

Called by `worker.mlx.engine`; `worker.mlx.caches.kinds` measures what a model's caches cost. A batch's caches are arrays as long as its
longest sequence, with slots for a few sequences more (`worker.mlx.caches.kv_slots`): what counts is slots times longest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mlx.utils import tree_flatten

from common.errors import StartupError
from common.machine import memory_claims

_MIN_CONTEXT_TOKENS = 512

_GROWS_BY_TOKENS = 256
"""Caches grow in steps of so many tokens: mlx-lm's (0.32, `KVCache.step`), and those in slots."""

_MIN_SPARE_TOKENS = 128
"""Free columns of new buffers, so that they are not too short again soon."""

_ODD_COLUMNS = 8
"""So that buffers are never multiples of 256 columns: MLX's CUDA back-end (0.32) would use cuDNN for decode steps then, and make a
plan for each number of sequences."""

EXPECTED_TOKENS = 512
"""What is reserved for an answer without a limit, or with a larger one: few are longer, and to reserve a full context for each
would leave most of the memory unused. A batch that outgrows its room has a sequence requeued."""


@dataclass(frozen=True, slots=True)
class CacheCost:
    """What one sequence's caches cost.

    Attributes:
        bytes_per_token: Of layers that keep every token.
        bytes_per_sequence: Of layers with a state of a fixed size.
        windows: (bytes per token, maximum of tokens) of layers that keep the last tokens only.
    """

    bytes_per_token: float
    bytes_per_sequence: int = 0
    windows: tuple[tuple[float, int], ...] = ()

    def total_bytes(self, num_sequences: int, num_tokens: int) -> float:
        """The memory of `num_sequences`, the longest of which has `num_tokens`, prompt and answer together."""
        num_columns = columns(num_tokens + 1)
        windows = sum(each * min(num_columns, max_tokens) for each, max_tokens in self.windows)
        return (
            num_sequences * (self.bytes_per_sequence + windows)
            + slots(num_sequences) * self.bytes_per_token * num_columns
        )


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """Room for caches, and what fits into it.

    Attributes:
        room_bytes: For all sequences together.
        weight_bytes: Of the model.
    """

    cost: CacheCost
    room_bytes: float
    weight_bytes: int = 0

    def with_limit(self, limit_bytes: float) -> CacheMemory:
        """A copy with the room that is left in a process that may use `limit_bytes`."""
        return replace(self, room_bytes=memory_claims.room_bytes(limit_bytes, self.weight_bytes))

    def fits(self, num_tokens_each: list[int]) -> bool:
        """Whether sequences of these lengths have room together."""
        return self.left_bytes(num_tokens_each) >= 0

    def left_bytes(self, num_tokens_each: list[int], held_bytes: float = 0.0) -> float:
        """What these sequences leave of the room; below 0 if it is too small for them.

        Args:
            held_bytes: What the caches take now; it may be more than these sequences need, since others have left.
        """
        if not num_tokens_each:
            return self.room_bytes - held_bytes
        needed_bytes = self.cost.total_bytes(len(num_tokens_each), max(num_tokens_each))
        return self.room_bytes - max(needed_bytes, held_bytes)

    def longest_sequence(self, max_tokens: int) -> int:
        """The length of the longest sequence that has room by itself, up to `max_tokens`."""
        low, high = 0, max_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits([middle]) else (low, middle - 1)
        return low


def slots(num_sequences: int) -> int:
    """How many slots buffers for so many sequences have: from 8 sequences on, some are free for newcomers."""
    return common_size(num_sequences + num_sequences // 8)


def common_size(num_slots: int) -> int:
    """The next number of slots that buffers have: one of eight between a power of two and the next, as a compiled decode step serves one number."""
    step = 1 << max(0, num_slots.bit_length() - 4)
    return -(-num_slots // step) * step


def columns(num_tokens: int) -> int:
    """How many columns buffers for so many tokens have, some of them free."""
    return -(-(num_tokens + _MIN_SPARE_TOKENS) // _GROWS_BY_TOKENS) * _GROWS_BY_TOKENS + _ODD_COLUMNS


def is_common_length(num_columns: int) -> bool:
    """Whether this is a number of columns that buffers have: few numbers are, as a compiled decode step serves one."""
    return columns(num_columns - _GROWS_BY_TOKENS) == num_columns


def expected_tokens(num_prompt_tokens: int, num_answer_tokens: int, max_tokens: int) -> int:
    """How long a sequence is expected to become.

    Args:
        num_answer_tokens: Tokens of its answer so far.
        max_tokens: Of its answer.
    """
    return num_prompt_tokens + min(max_tokens, max(num_answer_tokens, EXPECTED_TOKENS))


def cache_memory(model: Any, cost: CacheCost, limit_bytes: float) -> CacheMemory:
    """What is left for caches, of the memory that this process may use.

    Raises:
        StartupError: The weights leave no room.
    """
    parameters: Any = tree_flatten(model.parameters())
    weight_bytes = sum(weight.nbytes for _, weight in parameters)
    memory = CacheMemory(cost, 0.0, weight_bytes).with_limit(limit_bytes)
    if not memory.longest_sequence(_MIN_CONTEXT_TOKENS):
        raise StartupError(
            f"the model's weights are {weight_bytes / 2**30:.1f} GB, which leaves no room for requests in "
            f"{limit_bytes / 2**30:.3g} GB; take a smaller model, or give more with --memory-limit-gb"
        )
    return memory
