"""Which tokens may be drawn: min_p, top_k, top_p and XTC, on rows of log-probabilities.

Called by `worker.sampling.sampler` before a draw. For a GPU, `worker.mlx.sampling.filters` computes the same.
"""

from __future__ import annotations

import math

import numpy as np

from common.protocol import SamplingParams
from worker.sampling.arrays import Array, column

_NUM_CANDIDATES = 1024
"""How many of the most likely tokens are sorted first: the filters seldom keep more."""
_NO_TOP_K = 2**31 - 1  # int32


def apply_filters(
    samplings: list[SamplingParams],
    scaled: Array,
    uniforms: list[float],
    never_excluded: list[int],
) -> Array:
    """Set the tokens that min_p, top_k, top_p and XTC exclude to -inf.

    Args:
        scaled: Log-probabilities divided by the temperature, the maximum subtracted, (rows, vocab).
        uniforms: A random number in [0, 1) for each row: XTC applies if it is less than `xtc_probability`.
        never_excluded: Token ids that XTC does not exclude.
    """
    result = np.where(scaled >= _filter_thresholds(samplings, scaled), scaled, -math.inf)
    if any(s.xtc_probability > u for s, u in zip(samplings, uniforms, strict=True)):
        result = _apply_xtc(samplings, uniforms, result, never_excluded)
    return result


def _apply_xtc(
    samplings: list[SamplingParams], uniforms: list[float], scaled: Array, never_excluded: list[int]
) -> Array:
    """XTC (exclude top choices): if several tokens are above the threshold, keep only the least likely of them."""
    mass = np.exp(scaled)
    probs = mass / np.sum(mass, axis=-1, keepdims=True)
    # A row to which XTC does not apply gets a threshold that no probability exceeds.
    thresholds = column(
        [s.xtc_threshold if s.xtc_probability > u else 2.0 for s, u in zip(samplings, uniforms, strict=True)],
    )
    min_above = np.min(np.where(probs > thresholds, probs, math.inf), axis=-1, keepdims=True)
    excluded = probs > min_above
    if never_excluded:
        is_excludable = np.ones(scaled.shape[-1], dtype=bool)
        is_excludable[[i for i in never_excluded if i < len(is_excludable)]] = False
        excluded = excluded & is_excludable[None, :]
    return np.where(excluded, -math.inf, scaled)


def _filter_thresholds(samplings: list[SamplingParams], scaled: Array) -> Array:
    """The smallest value of each row that min_p, top_k and top_p keep, (rows, 1)."""
    vocab_size = scaled.shape[-1]
    total = np.sum(np.exp(scaled), axis=-1, keepdims=True)
    if vocab_size > _NUM_CANDIDATES:
        # Most often only a few tokens are kept, and the others need not be sorted.
        best = np.partition(scaled, vocab_size - _NUM_CANDIDATES, axis=-1)[:, vocab_size - _NUM_CANDIDATES :]
        kept, threshold = _kept_candidates(samplings, -np.sort(-best, axis=-1), total)
        if not kept[:, -1].any():
            return threshold
    return _kept_candidates(samplings, -np.sort(-scaled, axis=-1), total)[1]


def _kept_candidates(samplings: list[SamplingParams], best_first: Array, total: Array) -> tuple[Array, Array]:
    """Apply min_p, top_k and top_p to the most likely tokens of each row.

    Args:
        best_first: Scaled values in descending order, (rows, candidates).
        total: The sum of `exp` over the complete vocabulary, (rows, 1).

    Returns:
        Which candidates are kept, (rows, candidates) bool; and the smallest value that is kept, (rows, 1).
    """
    mass = np.exp(best_first)
    cumulative = np.cumsum(mass, axis=-1)
    indices = np.arange(best_first.shape[-1])[None, :]
    floors = column([math.log(s.min_p) if s.min_p > 0 else -math.inf for s in samplings])
    max_tokens = column([min(s.top_k or _NO_TOP_K, _NO_TOP_K) for s in samplings], np.int32)
    kept = (best_first >= floors) & (indices < max_tokens)
    mass_kept = np.max(np.where(kept, cumulative, 0.0), axis=-1, keepdims=True)
    shares = column([s.top_p for s in samplings])
    total = np.where(kept[:, -1:], total, mass_kept)
    # top_p keeps a token while the ones before it have less than its share of the mass; the first is always kept.
    kept = kept & ((cumulative - mass < shares * total) | (shares >= 1.0) | (indices == 0))
    num_kept = np.sum(kept, axis=-1, keepdims=True)
    return kept, np.take_along_axis(best_first, num_kept - 1, axis=-1)
