"""How tokens are chosen: all rows of a step at once, whatever mixture of greedy, seeded, filtered and constrained they are.

Called by `mlx_batch` with a step's log-probabilities, while the step is still to be computed; knows which row is which by
the states that it is given. A draw depends on seed and position alone, so that a row draws the same whatever is beside it and
wherever it goes on; each token has a random number of its own, so that rounding, which does change with what is beside a row,
moves no other token's chances. Array code is written once for NumPy and MLX, which are given as `xp`: a GPU chooses where
the numbers are, a CPU does it with NumPy's vector units, row by row, so that a row stays in the cache.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from common.protocol import SamplingParams

Array = Any
"""NumPy's or MLX's."""

IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float32]]

_GREEDY_BELOW_TEMPERATURE = 1e-5
"""Dividing by less overflows float32; the most likely token is what it comes to."""

_MASK64 = (1 << 64) - 1
_BANNED = -1e9
"""Added to a log-probability: no other number of a model comes near, and unlike infinity it never becomes NaN."""

_CANDIDATES = 1024
_NO_TOP_K = 2**31 - 1


class Matcher(Protocol):
    """What an answer may go on with, by a grammar; see `worker.sampling.grammar`."""

    def advance(self, token_id: int) -> None:
        """Go on by a token."""

    def fill(self, words: np.ndarray[Any, Any]) -> None:
        """Write a bit for each token id, 1 where it is allowed, into uint32 words, the lowest bit first."""


@dataclass(slots=True)
class SequenceSampler:
    """One row's sampling state.

    Attributes:
        num_sampled: Tokens of the answer so far, other workers' included.
        counts: How often each token is in the answer; kept where a penalty asks for it.
        matcher: None: anything goes.
        logprobs: Of the tokens that were drawn and not yet reported, where grammar, bias or penalties changed them.
        error: What its matcher raised; the row is of no use any more.
        biases: Token ids and amounts of the biases, once they were asked for.
        is_greedy: Whether it takes the most likely token.
        is_penalized: Whether tokens of the answer get less likely.
        depends_on_history: Whether the next token depends on the last one beyond what the model makes of it.
        is_adjusted: Whether its log-probabilities are not the model's own.
        is_filtered: Whether unlikely (or, with XTC, too likely) tokens are left out.
    """

    sampling: SamplingParams
    num_sampled: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    matcher: Matcher | None = None
    wants_logprobs: bool = False
    logprobs: deque[Array] = field(default_factory=deque)
    error: Exception | None = None
    biases: tuple[IntArray, FloatArray] | None = None

    # Asked for each row in each step.
    is_greedy: bool = field(init=False)
    is_penalized: bool = field(init=False)
    depends_on_history: bool = field(init=False)
    is_adjusted: bool = field(init=False)
    is_filtered: bool = field(init=False)

    def __post_init__(self) -> None:
        s = self.sampling
        self.is_greedy = s.temperature < _GREEDY_BELOW_TEMPERATURE
        self.is_penalized = bool(s.presence_penalty or s.frequency_penalty)
        self.depends_on_history = self.is_penalized or self.matcher is not None
        self.is_adjusted = self.depends_on_history or bool(s.logit_bias)
        self.is_filtered = s.top_p < 1.0 or s.top_k > 0 or s.min_p > 0.0 or s.xtc_probability > 0.0

    def observe(self, token_ids: Sequence[int]) -> None:
        """Account for tokens of the answer, in order."""
        if self.error is not None:
            return
        try:
            for token_id in token_ids:
                if self.is_penalized:
                    self.counts[token_id] = self.counts.get(token_id, 0) + 1
                if self.matcher is not None:
                    self.matcher.advance(token_id)
        except Exception as error:  # noqa: BLE001 (a row's own failure; told by the engine)
            self.error = error

    def additions(self) -> list[tuple[IntArray, FloatArray]]:
        """What is added to the log-probabilities of single tokens: ids and amounts, of biases and of penalties.

        Penalties as in OpenAI's description: ``-count * frequency - (count > 0) * presence``, of sampled tokens.
        """
        s = self.sampling
        if s.logit_bias and self.biases is None:
            ids, amounts = np.array(list(s.logit_bias), np.int64), list(s.logit_bias.values())
            self.biases = ids, np.array(amounts, np.float32)
        found = [] if self.biases is None else [self.biases]
        if self.counts:
            counts = np.array(list(self.counts.values()), np.float32)
            amounts_off = -counts * np.float32(s.frequency_penalty) - np.float32(s.presence_penalty)
            found.append((np.array(list(self.counts), np.int64), amounts_off))
        return found

    def keys(self) -> tuple[int, int]:
        """64 random bits each for the next draw: which token, and whether XTC takes place."""
        seed, position = self.sampling.seed & _MASK64, self.num_sampled
        return _mix(seed, position), _mix(seed ^ 0x5851F42D4C957F2D, position)


class BatchSampler:
    """Chooses for all rows of a step.

    Args:
        xp: `numpy`, to choose on the CPU, or `mlx.core`.
        start: Begins to compute an array; what is done on the CPU meanwhile costs nothing.
        never_excluded: Token ids that XTC leaves in: line ends and the end of text, without which texts never end.
    """

    def __init__(
        self, xp: Any, *, start: Callable[[Array], None], never_excluded: Sequence[int] = ()
    ) -> None:
        self._xp = xp
        self._start = start
        self._never_excluded = list(never_excluded)
        self._unread: list[tuple[list[SequenceSampler], Array]] = []
        self._token_hashes: Array = None

    def sample(self, rows: list[SequenceSampler], logprobs: Array) -> Array | None:
        """Choose one token for each row.

        Args:
            rows: In the order of the batch.
            logprobs: mx.array (rows, vocab), float32, natural log; evaluated here only if it must be.

        Returns:
            (rows,) token ids; None where every row just wants the most likely one.
        """
        adjusted = [i for i, row in enumerate(rows) if row.is_adjusted and row.error is None]
        drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
        if not adjusted and not drawn:
            return None
        xp = self._xp
        depends_on_history = any(row.depends_on_history for row in rows)
        if depends_on_history:
            self._start(logprobs)
            self._read()
        values = np.array(logprobs, copy=False) if xp is np else logprobs
        if adjusted:
            values = self._adjusted(rows, adjusted, values)
        token_ids = xp.argmax(values, axis=-1) if len(drawn) < len(rows) else None
        if drawn:
            chosen = self._drawn([rows[i] for i in drawn], _rows_of(xp, values, drawn, len(rows)))
            token_ids = chosen if token_ids is None else _with_rows(xp, token_ids, drawn, chosen)
        if depends_on_history:
            self._unread.append((rows, token_ids))
        for row in rows:
            row.num_sampled += 1
        return token_ids

    def _read(self) -> None:
        """Tell the rows what was drawn for them; it has been computed by now, or is about to be."""
        for rows, token_ids in self._unread:
            for row, token_id in zip(rows, token_ids.tolist(), strict=True):
                if row.depends_on_history:
                    row.observe([token_id])
        self._unread.clear()

    # -- grammar, biases, penalties ---------------------------------------------------------------------------------

    def _adjusted(self, rows: list[SequenceSampler], adjusted: list[int], values: Array) -> Array:
        """With what grammars, biases and penalties do to them, still log-probabilities."""
        xp = self._xp
        part = _rows_of(xp, values, adjusted, len(rows))
        part = _add_sparse(xp, part, [rows[i].additions() for i in adjusted])
        constrained = [k for k, i in enumerate(adjusted) if rows[i].matcher is not None]
        if constrained:
            words = self._masks([rows[adjusted[k]] for k in constrained], values.shape[-1])
            masked = _masked(xp, words, _rows_of(xp, part, constrained, len(adjusted)))
            part = _with_rows(xp, part, constrained, masked)
        reporting = [k for k, i in enumerate(adjusted) if rows[i].wants_logprobs]
        if reporting:
            normalized = _log_softmax(xp, _rows_of(xp, part, reporting, len(adjusted)))
            self._start(normalized)
            for place, k in enumerate(reporting):
                rows[adjusted[k]].logprobs.append(normalized[place])
        return _with_rows(xp, values, adjusted, part)

    def _masks(self, rows: list[SequenceSampler], vocab_size: int) -> np.ndarray[Any, Any]:
        words = np.zeros((len(rows), -(-vocab_size // 32)), dtype=np.uint32)
        for row, row_words in zip(rows, words, strict=True):
            assert row.matcher is not None
            try:
                row.matcher.fill(row_words)
            except Exception as error:  # noqa: BLE001 (a row's own failure; told by the engine)
                row.error = error
                row_words[:] = 0xFFFFFFFF
        return words

    # -- draws ------------------------------------------------------------------------------------------------------

    def _drawn(self, rows: list[SequenceSampler], values: Array) -> Array:
        """One token id a row, drawn by its temperature, filters and seed.

        1. Temperature; then the filters, in vLLM's order: min_p, top_k, top_p; XTC last, as llama.cpp has it.
        2. Of what is left, the token that wins a race: each arrives after an exponentially distributed time, the sooner the
           likelier it is (Gumbel-max in another form). Its time is its own: a sum over the vocabulary, in which a number is
           looked up, would draw another of the unlikely tokens as soon as one before them is rounded otherwise.
        """
        xp = self._xp
        if xp is np and len(rows) > 1:
            return np.concatenate([self._drawn([row], values[i : i + 1]) for i, row in enumerate(rows)])
        keys = [row.keys() for row in rows]
        scaled = values - xp.max(values, axis=-1, keepdims=True)
        scaled = scaled * _column(xp, [1.0 / row.sampling.temperature for row in rows])
        filtered = [i for i, row in enumerate(rows) if row.is_filtered]
        if filtered:
            part = self._filtered(
                [rows[i].sampling for i in filtered],
                _rows_of(xp, scaled, filtered, len(rows)),
                [_uniform(keys[i][1]) for i in filtered],
            )
            scaled = _with_rows(xp, scaled, filtered, part)
        return xp.argmax(xp.exp(scaled) / self._times([key for key, _ in keys], scaled.shape[-1]), axis=-1)

    def _times(self, keys: list[int], vocab_size: int) -> Array:
        """(rows, vocab), exponentially distributed with mean 1, from 1e-10 to 17: the row's key and the token say which."""
        xp = self._xp
        if self._token_hashes is None or self._token_hashes.shape[-1] != vocab_size:
            self._token_hashes = xp.array(np.arange(vocab_size, dtype=np.uint32) * np.uint32(0x9E3779B9))
        low = _column(xp, [key & 0xFFFFFFFF for key in keys], np.uint32)
        high = _column(xp, [key >> 32 for key in keys], np.uint32)
        # A mixing of 32 bits with little bias (lowbias32 of C. Wellons' hash-prospector), the key's halves at two places.
        bits = self._token_hashes[None, :] + low
        bits = (bits ^ (bits >> 16)) * 0x21F0AAAD + high
        bits = (bits ^ (bits >> 15)) * 0x735A2D97
        bits = bits ^ (bits >> 15)
        uniform = bits.astype(xp.float32) * 2.0**-32 + 2.0**-33
        return -xp.log1p(-xp.minimum(uniform, 1 - 2.0**-24))

    def _filtered(self, samplings: list[SamplingParams], scaled: Array, uniforms: list[float]) -> Array:
        """What each row's filters leave of it: others get -inf. All of them keep a range of the order by probability."""
        xp = self._xp
        result = xp.where(scaled >= _min_kept(xp, samplings, scaled), scaled, -math.inf)
        if any(s.xtc_probability > u for s, u in zip(samplings, uniforms, strict=True)):
            result = self._without_top_choices(samplings, uniforms, result)
        return result

    def _without_top_choices(
        self, samplings: list[SamplingParams], uniforms: list[float], scaled: Array
    ) -> Array:
        """XTC: where several tokens are above the threshold, only the least likely of those is left of them."""
        xp = self._xp
        mass = xp.exp(scaled)
        probs = mass / xp.sum(mass, axis=-1, keepdims=True)
        # A row that XTC passes over has a threshold that nothing is above.
        thresholds = _column(
            xp,
            [
                s.xtc_threshold if s.xtc_probability > u else 2.0
                for s, u in zip(samplings, uniforms, strict=True)
            ],
        )
        min_above = xp.min(xp.where(probs > thresholds, probs, math.inf), axis=-1, keepdims=True)
        excluded = probs > min_above
        if self._never_excluded:
            free = np.ones(scaled.shape[-1], dtype=bool)
            free[[i for i in self._never_excluded if i < len(free)]] = False
            excluded = excluded & xp.array(free)[None, :]
        return xp.where(excluded, -math.inf, scaled)


# -- array code for NumPy and MLX -----------------------------------------------------------------------------------


def _min_kept(xp: Any, samplings: list[SamplingParams], scaled: Array) -> Array:
    """(rows, 1): the least number of each row that min_p, top_k and top_p keep."""
    vocab_size = scaled.shape[-1]
    total = xp.sum(xp.exp(scaled), axis=-1, keepdims=True)
    if xp is np and vocab_size > _CANDIDATES:
        # Most often a few tokens are all that is kept: the others need no order.
        best = np.partition(scaled, vocab_size - _CANDIDATES, axis=-1)[:, vocab_size - _CANDIDATES :]
        kept, least = _kept(xp, samplings, -np.sort(-best, axis=-1), total)
        if not kept[:, -1].any():
            return least
    return _kept(xp, samplings, -xp.sort(-scaled, axis=-1), total)[1]


def _kept(xp: Any, samplings: list[SamplingParams], best_first: Array, total: Array) -> tuple[Array, Array]:
    """Which of `best_first` are kept, of rows whose mass is `total`; and the last of those, (rows, 1)."""
    mass = xp.exp(best_first)
    cumulative = xp.cumsum(mass, axis=-1)
    num_most = best_first.shape[-1]
    places = xp.arange(num_most)[None, :]
    floors = _column(xp, [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in samplings])
    most = _column(xp, [min(s.top_k or _NO_TOP_K, _NO_TOP_K) for s in samplings], np.int32)
    kept = (best_first >= floors) & (places < most)
    of_kept = xp.max(xp.where(kept, cumulative, 0.0), axis=-1, keepdims=True)
    shares = _column(xp, [s.top_p for s in samplings])
    total = xp.where(kept[:, -1:], total, of_kept)
    # A token is kept while those before it have less than the share; the first always is.
    kept = kept & ((cumulative - mass < shares * total) | (shares >= 1.0) | (places == 0))
    num_kept = xp.sum(kept, axis=-1, keepdims=True)
    return kept, xp.take_along_axis(best_first, num_kept - 1, axis=-1)


def _rows_of(xp: Any, values: Array, places: list[int], num_rows: int) -> Array:
    """Those rows of `values`; itself where it is all of them."""
    return values if len(places) == num_rows else values[xp.array(places)]


def _with_rows(xp: Any, values: Array, places: list[int], rows: Array) -> Array:
    """`values` with some rows replaced, or all of them."""
    if len(places) == len(values):
        return rows
    values = xp.array(
        values
    )  # MLX makes a new name for the same numbers, and changes what the name stands for
    values[xp.array(places)] = rows
    return values


def _column(xp: Any, values: Sequence[float], dtype: Any = np.float32) -> Array:
    return xp.array(np.array(values, dtype=dtype)[:, None])


def _add_sparse(xp: Any, values: Array, additions: list[list[tuple[IntArray, FloatArray]]]) -> Array:
    """`values` with what is added to single tokens of each row; a token may be there twice."""
    flat = [(place, ids, amounts) for place, row in enumerate(additions) for ids, amounts in row]
    if not flat:
        return values
    if xp is np:
        values = values.copy()
        for place, ids, amounts in flat:
            values[place, ids] += amounts
        return values
    rows = xp.array(np.concatenate([np.full(len(ids), place) for place, ids, _ in flat]))
    columns = xp.array(np.concatenate([ids for _, ids, _ in flat]))
    return values.at[rows, columns].add(xp.array(np.concatenate([amounts for *_, amounts in flat])))


def _masked(xp: Any, words: np.ndarray[Any, Any], values: Array) -> Array:
    """`values` where the bits of `words` are 1, else what is never chosen."""
    vocab_size = values.shape[-1]
    if xp is np:
        bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[:, :vocab_size]
        return np.where(bits, values, values + np.float32(_BANNED))
    shifts = xp.arange(32, dtype=xp.uint32)
    bits = (xp.array(words)[:, :, None] >> shifts) & 1
    allowed = bits.reshape(words.shape[0], -1)[:, :vocab_size] > 0
    return xp.where(allowed, values, values + _BANNED)


def _log_softmax(xp: Any, values: Array) -> Array:
    top = xp.max(values, axis=-1, keepdims=True)
    return values - top - xp.log(xp.sum(xp.exp(values - top), axis=-1, keepdims=True))


# -- random numbers -------------------------------------------------------------------------------------------------


def _uniform(bits: int) -> float:
    """In [0, 1), with as many bits as float32 holds."""
    return (bits >> 40) / 2.0**24


def _mix(seed: int, position: int) -> int:
    """64 random bits for one draw (SplitMix64; Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
