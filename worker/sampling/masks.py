"""The masks of a step: which tokens each sequence's grammar or thinking budget allows next.

Used by the samplers of both kinds of device: masks are always computed on the CPU. Independent of MLX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from worker.sampling.sequence_sampler import SequenceSampler

Words = np.ndarray[Any, np.dtype[np.uint32]]

ALL_ALLOWED = 0xFFFFFFFF


def fill_mask(sampler: SequenceSampler, words: Words, eos_token_ids: Iterable[int]) -> None:
    """Write the mask of the tokens that a sequence may choose next. An error of its matcher is kept in `sampler.error`.

    Args:
        sampler: With a matcher.
        words: (num_words,); bit i % 32 of word i // 32 becomes 1 if token id i is allowed.
        eos_token_ids: End-of-text tokens, which `min_tokens` bans.
    """
    assert sampler.matcher is not None
    if sampler.error is not None:
        words[:] = ALL_ALLOWED
        return
    try:
        sampler.matcher.fill(words)
        if sampler.bans_eos:
            _ban(words, [*eos_token_ids, *sampler.sampling.stop_token_ids])
    except Exception as error:  # noqa: BLE001 (it concerns this sequence alone; the engine reports it)
        sampler.error = error
        words[:] = ALL_ALLOWED


def _ban(words: Words, token_ids: Sequence[int]) -> None:
    """Forbid tokens, unless the grammar allows nothing else: then they come until there are enough tokens."""
    banned = words.copy()
    for token_id in token_ids:
        if token_id // 32 < len(banned):
            banned[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    if banned.any():
        words[:] = banned
