"""Which tokens may be drawn, on the device: min_p, top_k, top_p and XTC, as `worker.sampling.filters` defines them.

A filter keeps the tokens between two logits, so that nothing but these bounds is computed from the sorted rows.
"""

from __future__ import annotations

import math

import mlx.core as mx

Arrays = dict[str, mx.array]


def bounds(values: mx.array, constants: Arrays, xtc_bits: mx.array | None) -> list[mx.array]:
    """The smallest logit that is kept in each row, and with XTC the largest.

    Args:
        values: Logits of all rows, (rows, vocab) float32.
        constants: Of `filtered` rows: their indices, and by row (filtered, 1): `filter_inverse_temperature`, `filter_floor` (logarithm of
            min_p), `filter_max_tokens` (top_k), `filter_share` (top_p), `xtc_limit` and `xtc_threshold`; and by rank from the
            last, (1, vocab) int32: `ranks`. If some rows are not filtered, `filter_rows` has the row of each bound, (rows,).
        xtc_bits: 64 random bits of each row, (rows,) uint64; None: no row uses XTC.

    Returns:
        One or two arrays (rows, 1) float32, infinite for rows that are not filtered.
    """
    indices = constants.get("filtered")
    ascending = mx.sort(values if indices is None else values[indices], axis=-1)
    scaled = (ascending - ascending[:, -1:]) * constants["filter_inverse_temperature"]
    mass = mx.exp(scaled)
    cumulative = mx.cumsum(mass, axis=-1, reverse=True)
    ranks, share = constants["ranks"], constants["filter_share"]
    kept = (scaled >= constants["filter_floor"]) & (ranks < constants["filter_max_tokens"])
    total = mx.max(mx.where(kept, cumulative, 0.0), axis=-1, keepdims=True)
    # top_p keeps a token while the ones before it have less than its share of the mass; the first is always kept.
    kept = kept & ((cumulative - mass < share * total) | (share >= 1.0) | (ranks == 0))
    found = [mx.min(mx.where(kept, ascending, math.inf), axis=-1, keepdims=True)]
    if xtc_bits is not None:
        bits = xtc_bits if indices is None else xtc_bits[indices]
        applies = (bits >> 40).astype(mx.uint32)[:, None] < constants["xtc_limit"]
        probs = mass / mx.sum(mx.where(kept, mass, 0.0), axis=-1, keepdims=True)
        # If several tokens are above the threshold, only the least likely of them is kept.
        is_above = kept & (probs > constants["xtc_threshold"]) & applies
        found.append(mx.min(mx.where(is_above, ascending, math.inf), axis=-1, keepdims=True))
    if indices is None:
        return found
    neutral = (-math.inf, math.inf)
    rows = constants["filter_rows"]
    return [
        mx.concatenate([each, mx.full((1, 1), value)])[rows]
        for each, value in zip(found, neutral, strict=False)
    ]
