"""Token sampling: one batch sampler chooses the next token of all sequences in a step, whatever their sampling parameters.

Called by `worker.mlx.batch` with a step's log-probabilities, before they are evaluated; each sequence's state is its `SequenceSampler`. A draw
depends on the seed, the position and the log-probabilities alone, so a sequence draws the same token in any batch and after a takeover.
Each token of the vocabulary has its own random number: rounding, which does depend on the batch, then affects no other
token's chances. The array code is written once for NumPy and MLX, passed in as `xp`: a GPU samples where the log-probabilities are; a CPU
samples with NumPy, row by row, so that a row stays in its cache. Independent of MLX itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from common.protocol import SamplingParams
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

_GREEDY_BELOW_TEMPERATURE = 1e-5
"""Below it, dividing by the temperature overflows float32; sampling is greedy then, which is the limit."""

_MASK64 = (1 << 64) - 1


_NUM_CANDIDATES = 1024
"""How many of the most likely tokens are sorted first: the filters seldom keep more."""
_NO_TOP_K = 2**31 - 1  # int32


class Matcher(Protocol):
    """The tokens with which one answer may continue; see `worker.sampling.grammar.GrammarMatcher`."""

    @property
    def is_open(self) -> bool:
        """Whether any token may come next, so that no mask is needed."""

    def advance(self, token_id: int) -> None:
        """Append a token of the answer.

        Raises:
            Exception: The token is not allowed.
        """

    def fill(self, words: np.ndarray[Any, Any]) -> None:
        """Write the mask of allowed tokens.

        Args:
            words: (num_words,) uint32; bit i % 32 of word i // 32 is 1 if token id i is allowed.

        Raises:
            Exception: No token is allowed.
        """


@dataclass(slots=True)
class SequenceSampler:
    """The sampling state of one sequence.

    Attributes:
        num_sampled: Tokens of the answer so far, other workers' included; the position of the next draw.
        counts: How often each token id is in the answer; kept only if a penalty needs it.
        matcher: Restricts the answer to a grammar; None: unrestricted.
        wants_logprobs: Whether the log-probabilities of the tokens are reported.
        logprobs: The adjusted log-probabilities, (vocab,) float32, of tokens that were sampled and not reported yet, oldest first;
            only if grammar, biases or penalties changed them.
        error: What the matcher raised; the sequence cannot continue.
        biases: Token ids and amounts of `logit_bias`, once they were needed.
        is_greedy: Whether the most likely token is chosen.
        is_penalized: Whether tokens of the answer become less likely.
        depends_on_history: Whether the next token depends on previous ones other than through the model.
        has_adjustments: Whether its log-probabilities differ from the model's.
        is_filtered: Whether some tokens are excluded from a draw: the unlikely ones, or by XTC the most likely ones.
    """

    sampling: SamplingParams
    num_sampled: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    matcher: Matcher | None = None
    wants_logprobs: bool = False
    logprobs: deque[Array] = field(default_factory=deque)
    error: Exception | None = None
    biases: tuple[IntArray, FloatArray] | None = None

    # Computed once: read for each sequence in each step.
    is_greedy: bool = field(init=False)
    is_penalized: bool = field(init=False)
    depends_on_history: bool = field(init=False)
    has_adjustments: bool = field(init=False)
    is_filtered: bool = field(init=False)

    def __post_init__(self) -> None:
        s = self.sampling
        self.is_greedy = s.temperature < _GREEDY_BELOW_TEMPERATURE
        self.is_penalized = bool(s.presence_penalty or s.frequency_penalty)
        self.depends_on_history = self.is_penalized or self.matcher is not None
        self.has_adjustments = self.depends_on_history or bool(s.logit_bias) or s.min_tokens > 0
        self.is_filtered = s.top_p < 1.0 or s.top_k > 0 or s.min_p > 0.0 or s.xtc_probability > 0.0

    @property
    def bans_eos(self) -> bool:
        """Whether the next token may not end the answer."""
        return self.num_sampled < self.sampling.min_tokens

    @property
    def is_adjusted(self) -> bool:
        """Whether the next token's log-probabilities are changed; only if `has_adjustments`.

        If they are reported they may cease to be changed, but not become so later: see `logprobs`.
        """
        return (
            self.is_penalized
            or bool(self.sampling.logit_bias)
            or self.bans_eos
            or (self.matcher is not None and (self.wants_logprobs or not self.matcher.is_open))
        )

    def observe(self, token_ids: Sequence[int]) -> None:
        """Record tokens of the answer, in order. An error of the matcher is kept in `error`."""
        if self.error is not None:
            return
        try:
            for token_id in token_ids:
                if self.is_penalized:
                    self.counts[token_id] = self.counts.get(token_id, 0) + 1
                if self.matcher is not None:
                    self.matcher.advance(token_id)
        except Exception as error:  # noqa: BLE001 (it concerns this sequence alone; the engine reports it)
            self.error = error

    def sparse_adjustments(self) -> list[tuple[IntArray, FloatArray]]:
        """What is added to the log-probabilities of single tokens, by biases and penalties.

        Penalties as in OpenAI's API: ``-count * frequency - (count > 0) * presence``, for tokens of the answer.

        Returns:
            Token ids and amounts, up to two pairs of arrays of equal length; a token may be in both.
        """
        s = self.sampling
        if s.logit_bias and self.biases is None:
            ids, amounts = np.array(list(s.logit_bias), np.int64), list(s.logit_bias.values())
            self.biases = ids, np.array(amounts, np.float32)
        adjustments = [] if self.biases is None else [self.biases]
        if self.counts:
            counts = np.array(list(self.counts.values()), np.float32)
            penalties = -counts * np.float32(s.frequency_penalty) - np.float32(s.presence_penalty)
            adjustments.append((np.array(list(self.counts), np.int64), penalties))
        return adjustments

    def draw_keys(self) -> tuple[int, int]:
        """64 random bits each for the next draw: to choose the token, and to decide whether XTC applies."""
        seed, position = self.sampling.seed & _MASK64, self.num_sampled
        return _mix(seed, position), _mix(seed ^ 0x5851F42D4C957F2D, position)


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
            part = self._apply_filters(
                [samplers[i].sampling for i in filtered],
                take_rows(xp, scaled, filtered, len(samplers)),
                [_uniform(keys[i][1]) for i in filtered],
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

    def _apply_filters(self, samplings: list[SamplingParams], scaled: Array, uniforms: list[float]) -> Array:
        """Set the tokens that min_p, top_k, top_p and XTC exclude to -inf.

        Args:
            scaled: Log-probabilities divided by the temperature, the maximum subtracted, (rows, vocab).
            uniforms: A random number in [0, 1) for each row: XTC applies if it is less than `xtc_probability`.
        """
        xp = self._xp
        result = xp.where(scaled >= _filter_thresholds(xp, samplings, scaled), scaled, -math.inf)
        if any(s.xtc_probability > u for s, u in zip(samplings, uniforms, strict=True)):
            result = self._apply_xtc(samplings, uniforms, result)
        return result

    def _apply_xtc(self, samplings: list[SamplingParams], uniforms: list[float], scaled: Array) -> Array:
        """XTC (exclude top choices): if several tokens are above the threshold, keep only the least likely of them."""
        xp = self._xp
        mass = xp.exp(scaled)
        probs = mass / xp.sum(mass, axis=-1, keepdims=True)
        # A row to which XTC does not apply gets a threshold that no probability exceeds.
        thresholds = column(
            xp,
            [
                s.xtc_threshold if s.xtc_probability > u else 2.0
                for s, u in zip(samplings, uniforms, strict=True)
            ],
        )
        min_above = xp.min(xp.where(probs > thresholds, probs, math.inf), axis=-1, keepdims=True)
        excluded = probs > min_above
        if self._xtc_special_token_ids:
            is_excludable = np.ones(scaled.shape[-1], dtype=bool)
            is_excludable[[i for i in self._xtc_special_token_ids if i < len(is_excludable)]] = False
            excluded = excluded & xp.array(is_excludable)[None, :]
        return xp.where(excluded, -math.inf, scaled)


def _ban(token_ids: Sequence[int]) -> tuple[IntArray, FloatArray]:
    """What is added to the log-probabilities of tokens that may not come."""
    ids = np.array(sorted(token_ids), np.int64)
    return ids, np.full(len(ids), BANNED_LOGPROB, np.float32)


def _is_constrained(sampler: SequenceSampler) -> bool:
    """Whether a mask restricts the next token."""
    return sampler.matcher is not None and not sampler.matcher.is_open


def _filter_thresholds(xp: Any, samplings: list[SamplingParams], scaled: Array) -> Array:
    """The smallest value of each row that min_p, top_k and top_p keep, (rows, 1)."""
    vocab_size = scaled.shape[-1]
    total = xp.sum(xp.exp(scaled), axis=-1, keepdims=True)
    if xp is np and vocab_size > _NUM_CANDIDATES:
        # Most often only a few tokens are kept, and the others need not be sorted.
        best = np.partition(scaled, vocab_size - _NUM_CANDIDATES, axis=-1)[:, vocab_size - _NUM_CANDIDATES :]
        kept, threshold = _kept_candidates(xp, samplings, -np.sort(-best, axis=-1), total)
        if not kept[:, -1].any():
            return threshold
    return _kept_candidates(xp, samplings, -xp.sort(-scaled, axis=-1), total)[1]


def _kept_candidates(
    xp: Any, samplings: list[SamplingParams], best_first: Array, total: Array
) -> tuple[Array, Array]:
    """Apply min_p, top_k and top_p to the most likely tokens of each row.

    Args:
        best_first: Scaled values in descending order, (rows, candidates).
        total: The sum of `exp` over the complete vocabulary, (rows, 1).

    Returns:
        Which candidates are kept, (rows, candidates) bool; and the smallest value that is kept, (rows, 1).
    """
    mass = xp.exp(best_first)
    cumulative = xp.cumsum(mass, axis=-1)
    indices = xp.arange(best_first.shape[-1])[None, :]
    floors = column(xp, [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in samplings])
    max_tokens = column(xp, [min(s.top_k or _NO_TOP_K, _NO_TOP_K) for s in samplings], np.int32)
    kept = (best_first >= floors) & (indices < max_tokens)
    mass_kept = xp.max(xp.where(kept, cumulative, 0.0), axis=-1, keepdims=True)
    shares = column(xp, [s.top_p for s in samplings])
    total = xp.where(kept[:, -1:], total, mass_kept)
    # top_p keeps a token while the ones before it have less than its share of the mass; the first is always kept.
    kept = kept & ((cumulative - mass < shares * total) | (shares >= 1.0) | (indices == 0))
    num_kept = xp.sum(kept, axis=-1, keepdims=True)
    return kept, xp.take_along_axis(best_first, num_kept - 1, axis=-1)


def _uniform(bits: int) -> float:
    """Convert 64 random bits to a number in [0, 1) of 24 bits, the precision of float32."""
    return (bits >> 40) / 2.0**24


def _mix(seed: int, position: int) -> int:
    """64 random bits for one draw (SplitMix64; Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
