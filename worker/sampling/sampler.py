"""Token sampling on a CPU: one batch sampler chooses the next token of all sequences in a step, whatever their sampling parameters.

Called by `worker.mlx.sampling.host_sampler` with a step's log-probabilities; each sequence's state is its `SequenceSampler`. A draw
depends on the seed, the position and the log-probabilities alone, so a sequence draws the same token in any batch and after a takeover.
Each token of the vocabulary has its own random number: rounding, which does depend on the batch, then affects no other
token's chances. Rows are drawn one by one, so that a row stays in the CPU's cache. A GPU has a sampler of its own,
`worker.mlx.sampling`, which chooses the same tokens. Independent of MLX.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worker.sampling.arrays import (
    BANNED_LOGPROB,
    Array,
    FloatArray,
    IntArray,
    add_sparse,
    apply_mask,
    column,
    log_softmax,
    replace_rows,
    take_rows,
)
from worker.sampling.filters import apply_filters
from worker.sampling.masks import fill_mask
from worker.sampling.sequence_sampler import SequenceSampler

TOKEN_HASH_FACTOR = np.uint32(0x9E3779B9)
MIXER_FACTORS = np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)
"""Of a 32-bit mixer of low bias: lowbias32 of C. Wellons' hash-prospector."""


class BatchSampler:
    """Samples one token for each sequence of a step. Used on one thread.

    Args:
        xtc_special_token_ids: Tokens that XTC never excludes: line breaks and end of text, without which an answer would not end.
        eos_token_ids: End-of-text tokens, which `min_tokens` bans.
    """

    def __init__(
        self,
        *,
        xtc_special_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._xtc_special_token_ids = list(xtc_special_token_ids)
        self._eos_ban = _ban(eos_token_ids)
        self._token_hashes = np.zeros(0, np.uint32)

    def sample(
        self, samplers: list[SequenceSampler], logprobs: Array
    ) -> tuple[IntArray | None, dict[int, FloatArray]]:
        """Choose the next token of each sequence. Sequences that depend on their history have observed all previous tokens.

        Args:
            samplers: In the order of the batch.
            logprobs: (batch, vocab) float32, natural log, or an array that NumPy can read without a copy; not read unless necessary.

        Returns:
            Token ids, (batch,), or None if each sequence takes its most likely token; and by index, for sequences that report
            log-probabilities and whose own were adjusted, the adjusted ones, (vocab,) float32, natural log.
        """
        adjusted = [
            i
            for i, sampler in enumerate(samplers)
            if sampler.has_adjustments and sampler.error is None and sampler.is_adjusted
        ]
        drawn = [i for i, sampler in enumerate(samplers) if not sampler.is_greedy]
        reported: dict[int, FloatArray] = {}
        token_ids: IntArray | None = None
        if adjusted or drawn:
            values = np.array(logprobs, copy=False)
            if adjusted:
                values, reported = self._adjust(samplers, adjusted, values)
            if len(drawn) < len(samplers):
                token_ids = np.argmax(values, axis=-1)
            if drawn:
                chosen = self._draw([samplers[i] for i in drawn], take_rows(values, drawn))
                token_ids = chosen if token_ids is None else replace_rows(token_ids, drawn, chosen)
        for sampler in samplers:
            sampler.num_sampled += 1
        return token_ids, reported

    def _adjust(
        self, samplers: list[SequenceSampler], adjusted: list[int], values: Array
    ) -> tuple[Array, dict[int, FloatArray]]:
        """Apply biases, penalties and grammars.

        Args:
            adjusted: Indices of the samplers with adjustments.
            values: Log-probabilities, (batch, vocab).

        Returns:
            (batch, vocab), unnormalized if adjusted, as the draw does not need it; and what `sample` returns of those that report.
        """
        part = take_rows(values, adjusted)
        part = add_sparse(part, [self._sparse_adjustments(samplers[i]) for i in adjusted])
        constrained = [k for k, i in enumerate(adjusted) if _is_constrained(samplers[i])]
        if constrained:
            words = np.zeros((len(constrained), -(-values.shape[-1] // 32)), np.uint32)
            for k, row_words in zip(constrained, words, strict=True):
                fill_mask(samplers[adjusted[k]], row_words, self._eos_ban[0].tolist())
            part = replace_rows(part, constrained, apply_mask(words, take_rows(part, constrained)))
        reporting = [k for k, i in enumerate(adjusted) if samplers[i].num_top_logprobs is not None]
        reported = {adjusted[k]: log_softmax(part[k]) for k in reporting}
        return replace_rows(values, adjusted, part), reported

    def _sparse_adjustments(self, sampler: SequenceSampler) -> list[tuple[IntArray, FloatArray]]:
        adjustments = sampler.sparse_adjustments()
        if sampler.bans_eos and not _is_constrained(sampler):
            adjustments.append(self._eos_ban)
            if stops := sampler.sampling.stop_token_ids:
                adjustments.append(_ban(stops))
        return adjustments

    def _draw(self, samplers: list[SequenceSampler], values: Array) -> Array:
        """Draw one token for each sequence, by its temperature, filters and seed.

        1. Temperature, then the filters in vLLM's order: min_p, top_k, top_p; XTC last, as in llama.cpp.
        2. Of the remaining tokens, an exponential race: each has an exponentially distributed arrival time with its probability as
           the rate, and the earliest wins (equivalent to Gumbel-max). The times are independent per token: with one random number
           looked up in the cumulative distribution, a rounding error in one token would shift all tokens after it.

        Args:
            values: Log-probabilities, (len(samplers), vocab).

        Returns:
            Token ids, (len(samplers),).
        """
        if len(samplers) > 1:
            return np.concatenate(
                [self._draw([sampler], values[i : i + 1]) for i, sampler in enumerate(samplers)]
            )
        keys = [sampler.draw_keys() for sampler in samplers]
        scaled = values - np.max(values, axis=-1, keepdims=True)
        scaled = scaled * column([1.0 / sampler.sampling.temperature for sampler in samplers])
        filtered = [i for i, sampler in enumerate(samplers) if sampler.is_filtered]
        if filtered:
            part = apply_filters(
                [samplers[i].sampling for i in filtered],
                take_rows(scaled, filtered),
                [_uniform(keys[i][1]) for i in filtered],
                self._xtc_special_token_ids,
            )
            scaled = replace_rows(scaled, filtered, part)
        return np.argmax(
            np.exp(scaled) / self._exponential_times([key for key, _ in keys], scaled.shape[-1]), axis=-1
        )

    def _exponential_times(self, keys: list[int], vocab_size: int) -> Array:
        """Exponentially distributed times with mean 1, from 1e-10 to 17, by key and token id.

        Args:
            keys: 64 random bits for each row.

        Returns:
            (len(keys), vocab) float32.
        """
        if len(self._token_hashes) != vocab_size:
            self._token_hashes = np.arange(vocab_size, dtype=np.uint32) * TOKEN_HASH_FACTOR
        low = column([key & 0xFFFFFFFF for key in keys], np.uint32)
        high = column([key >> 32 for key in keys], np.uint32)
        # A 32-bit mixer of low bias (lowbias32 of C. Wellons' hash-prospector); the two halves of the key enter at two points.
        bits = self._token_hashes[None, :] + low
        bits = (bits ^ (bits >> 16)) * MIXER_FACTORS[0] + high
        bits = (bits ^ (bits >> 15)) * MIXER_FACTORS[1]
        bits = bits ^ (bits >> 15)
        uniform = bits.astype(np.float32) * 2.0**-32 + 2.0**-33
        return -np.log1p(-np.minimum(uniform, 1 - 2.0**-24))


def _ban(token_ids: Sequence[int]) -> tuple[IntArray, FloatArray]:
    """What is added to the log-probabilities of tokens that may not come."""
    ids = np.array(sorted(token_ids), np.int64)
    return ids, np.full(len(ids), BANNED_LOGPROB, np.float32)


def _is_constrained(sampler: SequenceSampler) -> bool:
    """Whether a mask restricts the next token."""
    return sampler.matcher is not None and not sampler.matcher.is_open


def _uniform(bits: int) -> float:
    """Convert 64 random bits to a number in [0, 1) of 24 bits, the precision of float32."""
    return (bits >> 40) / 2.0**24
