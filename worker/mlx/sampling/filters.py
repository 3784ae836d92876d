"""Which tokens may be drawn, on the device: min_p, top_k, top_p and XTC, as `worker.sampling.filters` defines them.

A filter keeps the tokens between two logits, so that nothing but these bounds is computed from the sorted rows.
"""

from __future__ import annotations

import math

import mlx.core as mx

Arrays = dict[str, mx.array]


def bounds(
    values: mx.array, constants: Arrays, xtc_bits: mx.array | None, *, has_limits: bool
) -> list[mx.array]:
    """The smallest logit that is kept in each row, and with XTC the largest.

    Args:
        values: Logits of all rows, (rows, vocab).
        constants: Of `filtered` rows: their indices, and by row (filtered, 1): `filter_inverse_temperature`, `filter_floor` (logarithm of
            min_p), `filter_max_tokens` (top_k), `filter_share` (top_p), `xtc_limit` and `xtc_threshold`; and by rank from the
            last, (1, vocab) int32: `ranks`. If some rows are not filtered, `filter_rows` has the row of each bound, (rows,); for those it
            is one that keeps no token.
        xtc_bits: 64 random bits of each row, (rows,) uint64; None: no row uses XTC.
        has_limits: Whether some row uses min_p or top_k.

    Returns:
        One or two arrays (rows, 1) float32; infinity: the row is not filtered.
    """
    indices = constants.get("filtered")
    ascending = mx.sort(values if indices is None else values[indices], axis=-1).astype(mx.float32)
    scaled = (ascending - ascending[:, -1:]) * constants["filter_inverse_temperature"]
    mass = mx.exp(scaled)
    cumulative = mx.cumsum(mass, axis=-1, reverse=True)
    ranks, share = constants["ranks"], constants["filter_share"]
    kept = ranks < constants["filter_max_tokens"]
    if has_limits:
        kept = kept & (scaled >= constants["filter_floor"])
        total = mx.max(mx.where(kept, cumulative, 0.0), axis=-1, keepdims=True)
    else:
        total = cumulative[:, :1]
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
    return found if indices is None else [each[constants["filter_rows"]] for each in found]
