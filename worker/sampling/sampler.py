"""Token sampling: one batch sampler chooses the next token of all sequences in a step, whatever their sampling parameters.

Called by `worker.mlx.batch` with a step's log-probabilities, before they are evaluated; each sequence's state is its `SequenceSampler`. A draw
depends on the seed, the position and the log-probabilities alone, so a sequence draws the same token in any batch and after a takeover.
Each token of the vocabulary has its own random number: rounding, which does depend on the batch, then affects no other
token's chances. The array code is written once for NumPy and MLX, passed in as `xp`: a GPU samples where the log-probabilities are; a CPU
samples with NumPy, row by row, so that a row stays in its cache. Independent of MLX itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
from worker.sampling.sequence_sampler import SequenceSampler


class BatchSampler:
    """Samples one token for each sequence of a step. Used on one thread.

    Args:
        xp: `numpy`, to sample on the CPU, or `mlx.core`.
        async_eval: Starts evaluating an array without waiting for it, as `mlx.core.async_eval`; CPU work overlaps with it.
        xtc_special_token_ids: Tokens that XTC never excludes: line breaks and end of text, without which an answer would not end.
        eos_token_ids: End-of-text tokens, which `min_tokens` bans.
    """

    def __init__(
        self,
        xp: Any,
        *,
        async_eval: Callable[[Array], None],
        xtc_special_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._xp = xp
        self._async_eval = async_eval
        self._xtc_special_token_ids = list(xtc_special_token_ids)
        self._eos_ban = _ban(eos_token_ids)
        self._unobserved: list[tuple[list[SequenceSampler], Array]] = []
        self._token_hashes: Array = None

    def sample(self, samplers: list[SequenceSampler], logprobs: Array) -> Array | None:
        """Choose the next token of each sequence.

        Args:
            samplers: In the order of the batch.
            logprobs: mx.array (batch, vocab) float32, natural log; evaluated here only if necessary.

        Returns:
            Token ids, (batch,), not necessarily evaluated; None if each sequence takes its most likely token.
        """
        adjusted = [
            i for i, sampler in enumerate(samplers) if sampler.has_adjustments and sampler.error is None
        ]
        drawn = [i for i, sampler in enumerate(samplers) if not sampler.is_greedy]
        if not adjusted and not drawn:
            return None
        xp = self._xp
        depends_on_history = any(sampler.depends_on_history for sampler in samplers)
        if depends_on_history:
            self._async_eval(logprobs)
            self._observe_sampled()
        adjusted = [i for i in adjusted if samplers[i].is_adjusted]
        values = np.array(logprobs, copy=False) if xp is np else logprobs
        if adjusted:
            values = self._adjust(samplers, adjusted, values)
        token_ids = xp.argmax(values, axis=-1) if len(drawn) < len(samplers) else None
        if drawn:
            chosen = self._draw([samplers[i] for i in drawn], take_rows(xp, values, drawn, len(samplers)))
            token_ids = chosen if token_ids is None else replace_rows(xp, token_ids, drawn, chosen)
        if depends_on_history:
            self._unobserved.append((samplers, token_ids))
        for sampler in samplers:
            sampler.num_sampled += 1
        return token_ids

    def _observe_sampled(self) -> None:
        """Record the previous step's tokens in their samplers; they have been evaluated by now, or soon will be."""
        for samplers, token_ids in self._unobserved:
            for sampler, token_id in zip(samplers, token_ids.tolist(), strict=True):
                if sampler.depends_on_history:
                    sampler.observe([token_id])
        self._unobserved.clear()

    def _adjust(self, samplers: list[SequenceSampler], adjusted: list[int], values: Array) -> Array:
        """Apply biases, penalties and grammars.

        Args:
            adjusted: Indices of the samplers with adjustments.
            values: Log-probabilities, (batch, vocab).

        Returns:
            (batch, vocab); unnormalized if adjusted, as the draw does not need it.
        """
        xp = self._xp
        part = take_rows(xp, values, adjusted, len(samplers))
        part = add_sparse(xp, part, [self._sparse_adjustments(samplers[i]) for i in adjusted])
        constrained = [k for k, i in enumerate(adjusted) if _is_constrained(samplers[i])]
        if constrained:
            words = self._fill_masks([samplers[adjusted[k]] for k in constrained], values.shape[-1])
            masked = apply_mask(xp, words, take_rows(xp, part, constrained, len(adjusted)))
            part = replace_rows(xp, part, constrained, masked)
        reporting = [k for k, i in enumerate(adjusted) if samplers[i].wants_logprobs]
        if reporting:
            normalized = log_softmax(xp, take_rows(xp, part, reporting, len(adjusted)))
            self._async_eval(normalized)
            for index, k in enumerate(reporting):
                samplers[adjusted[k]].logprobs.append(normalized[index])
        return replace_rows(xp, values, adjusted, part)

    def _sparse_adjustments(self, sampler: SequenceSampler) -> list[tuple[IntArray, FloatArray]]:
        adjustments = sampler.sparse_adjustments()
        if sampler.bans_eos and not _is_constrained(sampler):
            adjustments.append(self._eos_ban)
            if stops := sampler.sampling.stop_token_ids:
                adjustments.append(_ban(stops))
        return adjustments

    def _fill_masks(self, samplers: list[SequenceSampler], vocab_size: int) -> np.ndarray[Any, Any]:
        words = np.zeros((len(samplers), -(-vocab_size // 32)), dtype=np.uint32)
        for sampler, row_words in zip(samplers, words, strict=True):
            assert sampler.matcher is not None
            try:
                sampler.matcher.fill(row_words)
                if sampler.bans_eos:
                    self._ban_eos(row_words, sampler.sampling.stop_token_ids)
            except Exception as error:  # noqa: BLE001 (it concerns this sequence alone; the engine reports it)
                sampler.error = error
                row_words[:] = 0xFFFFFFFF
        return words

    def _ban_eos(self, words: np.ndarray[Any, Any], stop_token_ids: list[int]) -> None:
        """Forbid end-of-text and stop tokens, unless a grammar allows nothing else: then they come until there are enough tokens."""
        banned = words.copy()
        for token_id in [*self._eos_ban[0].tolist(), *stop_token_ids]:
            if token_id // 32 < len(banned):
                banned[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        if banned.any():
            words[:] = banned

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
        xp = self._xp
        if xp is np and len(samplers) > 1:
            return np.concatenate(
                [self._draw([sampler], values[i : i + 1]) for i, sampler in enumerate(samplers)]
            )
        keys = [sampler.draw_keys() for sampler in samplers]
        scaled = values - xp.max(values, axis=-1, keepdims=True)
        scaled = scaled * column(xp, [1.0 / sampler.sampling.temperature for sampler in samplers])
        filtered = [i for i, sampler in enumerate(samplers) if sampler.is_filtered]
        if filtered:
            part = apply_filters(
                xp,
                [samplers[i].sampling for i in filtered],
                take_rows(xp, scaled, filtered, len(samplers)),
                [_uniform(keys[i][1]) for i in filtered],
                self._xtc_special_token_ids,
            )
            scaled = replace_rows(xp, scaled, filtered, part)
        return xp.argmax(
            xp.exp(scaled) / self._exponential_times([key for key, _ in keys], scaled.shape[-1]), axis=-1
        )

    def _exponential_times(self, keys: list[int], vocab_size: int) -> Array:
        """Exponentially distributed times with mean 1, from 1e-10 to 17, by key and token id.

        Args:
            keys: 64 random bits for each row.

        Returns:
            (len(keys), vocab) float32.
        """
        xp = self._xp
        if self._token_hashes is None or self._token_hashes.shape[-1] != vocab_size:
            self._token_hashes = xp.array(np.arange(vocab_size, dtype=np.uint32) * np.uint32(0x9E3779B9))
        low = column(xp, [key & 0xFFFFFFFF for key in keys], np.uint32)
        high = column(xp, [key >> 32 for key in keys], np.uint32)
        # A 32-bit mixer of low bias (lowbias32 of C. Wellons' hash-prospector); the two halves of the key enter at two points.
        bits = self._token_hashes[None, :] + low
        bits = (bits ^ (bits >> 16)) * 0x21F0AAAD + high
        bits = (bits ^ (bits >> 15)) * 0x735A2D97
        bits = bits ^ (bits >> 15)
        uniform = bits.astype(xp.float32) * 2.0**-32 + 2.0**-33
        return -xp.log1p(-xp.minimum(uniform, 1 - 2.0**-24))


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
