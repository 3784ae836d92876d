"""How many prompt tokens to prefill at a time on this GPU, measured at warm-up.

Called by `worker.mlx.engine`, before the worker registers. Larger steps keep a fast GPU busy; on others they only delay everyone else. A
step must also fit into the memory that a worker has in addition to weights and caches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from worker.mlx.prefill.budget import INITIAL_TOKENS, PIECE_SECONDS

log = logging.getLogger(__name__)

DEFAULT_TOKENS = 2048
_FIRST_TOKENS = 128
_MIN_TOKENS = 512
_MAX_TOKENS = 32_768

_MIN_GAIN = 1.05
"""Steps of twice the size must prefill so much more per second to be worth the delay."""


class Measurement(NamedTuple):
    """What a prefill of some number of tokens takes."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class StepSize:
    """The size of a step.

    Attributes:
        num_tokens: With more, prefilling would not be faster.
        first_tokens: The most that were measured to take no longer than `PIECE_SECONDS`.
        bytes_per_token: Memory that a step takes in addition to caches.
    """

    num_tokens: int = DEFAULT_TOKENS
    first_tokens: int = INITIAL_TOKENS
    bytes_per_token: float = 0.0

    def within(self, limit_bytes: float) -> int:
        """The number of tokens of a step that takes at most `limit_bytes`; at least a few hundred."""
        if not self.bytes_per_token:
            return self.num_tokens
        return max(_MIN_TOKENS, min(self.num_tokens, int(limit_bytes / self.bytes_per_token)))


def choose(measure: Callable[[int], Measurement], max_tokens: int, limit_bytes: float) -> StepSize:
    """Measure steps, each of twice as many tokens, until larger ones are no faster, or would probably take longer than `PIECE_SECONDS`.

    Args:
        max_tokens: The longest prompt.
        limit_bytes: Memory that a step may take; nothing is measured beyond the first step that takes more.
    """
    best_tokens, first_tokens, best_per_second, bytes_per_token = 0, INITIAL_TOKENS, 0.0, 0.0
    num_tokens = min(_FIRST_TOKENS, max_tokens)
    while num_tokens <= min(max_tokens, _MAX_TOKENS):
        seconds, peak_bytes = measure(num_tokens)
        bytes_per_token = peak_bytes / num_tokens
        if seconds <= PIECE_SECONDS:
            first_tokens = num_tokens
        if num_tokens / seconds >= _MIN_GAIN * best_per_second:
            best_tokens, best_per_second = num_tokens, num_tokens / seconds
        elif num_tokens > DEFAULT_TOKENS:
            break
        if 2 * seconds > PIECE_SECONDS or peak_bytes > limit_bytes:
            break
        num_tokens *= 2
    best_tokens = max(best_tokens, DEFAULT_TOKENS)
    return StepSize(best_tokens, min(first_tokens, best_tokens), bytes_per_token)


def measured(prefill: Callable[[int, int], Any], max_tokens: int, limit_bytes: float) -> StepSize:
    """Choose the step size of this GPU. A failure is logged; the default is used then.

    Args:
        prefill: Prefills a prompt; receives its number of tokens and that of a step, and returns its caches.
    """
    began = time.monotonic()
    try:
        size = choose(lambda num_tokens: _measure(prefill, num_tokens), max_tokens, limit_bytes)
        if size.first_tokens >= DEFAULT_TOKENS and 2 * size.first_tokens <= max_tokens:
            prefill(2 * size.first_tokens, size.first_tokens)  # the kernels for the second piece of a prompt
    except Exception:
        log.exception("the prefill step cannot be measured; using %d tokens", DEFAULT_TOKENS)
        return StepSize()
    finally:
        mx.clear_cache()
    log.info(
        "prefill steps have %d tokens (measured in %.1f s)",
        size.within(limit_bytes),
        time.monotonic() - began,
    )
    return size


def _measure(prefill: Callable[[int, int], Any], num_tokens: int) -> Measurement:
    prefill(num_tokens, num_tokens)  # kernels are loaded and plans are made at first use
    mx.synchronize()
    mx.reset_peak_memory()
    before_bytes, began = mx.get_active_memory(), time.perf_counter()
    caches = prefill(num_tokens, num_tokens)
    seconds = time.perf_counter() - began
    kept_bytes = mx.get_active_memory() - before_bytes
    peak_bytes = mx.get_peak_memory() - before_bytes - kept_bytes
    del caches
    return Measurement(seconds, max(0, peak_bytes))
