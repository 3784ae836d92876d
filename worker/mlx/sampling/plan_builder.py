"""Makes the plans of steps, from the parameters of sequences and the tokens that the host knows.

Called by `DeviceSampler` when sequences join or leave. Between two steps the host knows all tokens but the latest, which is the next
step's input: the state that is made of the known tokens is therefore the state with which the old plan would have gone on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from worker.mlx.sampling.choose import MASK_BITS, PlanKey
from worker.mlx.sampling.filters import Arrays
from worker.mlx.sampling.plan import Plan, SampledSequence, padded, shared_size
from worker.mlx.sampling.random_times import token_hashes
from worker.sampling.arrays import BANNED_LOGPROB
from worker.sampling.sequence_sampler import SequenceSampler

_INT32_MAX = 2**31 - 1
_MIN_BIASES = 8
_TOP_SIZES = (0, 2, 5, 10, 20)
"""`PlanKey.num_top` is one of these, or the exact number above: a compiled step serves any number up to its own."""

_WINDOW_GROWTH_TOKENS = 64
"""How many tokens a window that is not full has room for, at least; then the plan is made anew."""

Value = Callable[[SequenceSampler], float]


class PlanBuilder:
    """Makes the plans of one model.

    Args:
        vocab_size: Number of logits.
        xtc_special_token_ids: Tokens that XTC never excludes.
        eos_token_ids: End-of-text tokens, which `min_tokens` bans.
    """

    def __init__(
        self, vocab_size: int, *, xtc_special_token_ids: Sequence[int], eos_token_ids: Sequence[int]
    ) -> None:
        self._vocab_size = vocab_size
        self._xtc_special_token_ids = xtc_special_token_ids
        self._eos_token_ids = list(eos_token_ids)

    def build(self, sequences: Sequence[SampledSequence], num_rows: int, previous: Plan | None) -> Plan:
        """The plan of these sequences.

        Args:
            num_rows: At least as many; the rest are spare.
            previous: The plan of the latest step.
        """
        draft = _Draft(sequences, num_rows)
        samplers = draft.samplers
        if any(not each.is_greedy for each in samplers):
            self._add_draws(draft)
        if any(each.sampling.repetition_penalty != 1.0 for each in samplers):
            _add_windows(draft)
        if any(each.has_adjustments for each in samplers):
            self._add_biases(draft)
        if any(each.is_penalized for each in samplers):
            self._add_penalties(draft, previous)
        if draft.key.is_penalized or draft.key.has_min_tokens:
            positions = [each.num_sampled for each in samplers]
            draft.state["positions"] = draft.by_row(positions, np.int32)
        if any(each.matcher is not None for each in samplers):
            self._add_masks(draft)
        if any(each.num_top_logprobs is not None for each in samplers):
            self._add_scores(draft)
        return Plan(
            draft.key,
            sequences,
            draft.state,
            draft.constants,
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos_token_ids,
            steps_left=draft.steps_left,
        )

    @cached_property
    def _token_hashes(self) -> mx.array:
        return token_hashes(self._vocab_size)

    @cached_property
    def _token_ids(self) -> mx.array:
        return mx.arange(self._vocab_size, dtype=mx.uint32)[None, :]

    @cached_property
    def _ranks(self) -> mx.array:
        return mx.arange(self._vocab_size - 1, -1, -1, dtype=mx.int32)[None, :]

    @cached_property
    def _is_never_excluded(self) -> mx.array:
        return mx.array(np.isin(np.arange(self._vocab_size), self._xtc_special_token_ids)[None, :])

    @cached_property
    def _mask_shifts(self) -> mx.array:
        return mx.arange(MASK_BITS, dtype=mx.uint32)

    def _add_draws(self, draft: _Draft) -> None:
        """Temperatures, random numbers and filters."""
        samplers = draft.samplers
        draft.state["random"] = draft.by_row([each.random_states[0] for each in samplers], np.uint64)
        draft.constants["token_hashes"] = self._token_hashes
        draft.add_column("inverse_temperature", _inverse_temperature, np.float32, 1.0)
        draft.add_column("is_drawn", lambda s: not s.is_greedy, np.float32, 0.0)
        draft.key = draft.key._replace(is_drawn=True)
        filtered = [row for row, each in enumerate(samplers) if each.is_filtered and not each.is_greedy]
        if filtered:
            self._add_filters(draft, filtered)

    def _add_filters(self, draft: _Draft, filtered: list[int]) -> None:
        """Constants of the rows with filters; one more, which keeps no token, stands for all rows without."""
        num_rows, samplers = draft.key.num_rows, draft.samplers
        size = shared_size(len(filtered), num_rows)
        if size < num_rows:
            repeated = filtered + filtered[:1] * (size - len(filtered))
            draft.constants["filtered"] = mx.array(np.array(repeated, np.int32))
            draft.constants["filter_rows"] = _shared_rows(filtered, size, num_rows)
            samplers = [samplers[row] for row in filtered]
        columns: dict[str, tuple[Value, Any, float]] = {
            "filter_inverse_temperature": (_inverse_temperature, np.float32, 1.0),
            "filter_floor": (_log_min_p, np.float32, -math.inf),
            "filter_max_tokens": (lambda s: min(s.sampling.top_k or _INT32_MAX, _INT32_MAX), np.int32, 0),
            "filter_share": (lambda s: s.sampling.top_p, np.float32, 1.0),
        }  # fmt: skip
        has_limits = any(each.sampling.top_k or each.sampling.min_p > 0 for each in samplers)
        has_xtc = any(each.sampling.xtc_probability > 0 for each in samplers)
        if has_xtc:
            columns["xtc_limit"] = (_xtc_limit, np.uint32, 0)
            columns["xtc_threshold"] = (lambda s: s.sampling.xtc_threshold, np.float32, 0.0)
            draft.constants["is_never_excluded"] = self._is_never_excluded
            xtc_random = [each.random_states[1] for each in draft.samplers]
            draft.state["xtc_random"] = draft.by_row(xtc_random, np.uint64)
        for name, (value_of, dtype, neutral) in columns.items():
            draft.constants[name] = _column(samplers, size, value_of, dtype, neutral)
        draft.constants["ranks"] = self._ranks
        draft.key = draft.key._replace(num_filtered=size, has_limits=has_limits, has_xtc=has_xtc)

    def _add_biases(self, draft: _Draft) -> None:
        """What is added to the logits of single tokens: biases, and bans of the end of text."""
        found: list[tuple[int, int, float, int]] = []  # row, token, amount, and the position at which it ends
        for row, sampler in enumerate(draft.samplers):
            s = sampler.sampling
            found += [(row, token_id, amount, _INT32_MAX) for token_id, amount in s.logit_bias.items()]
            # With a matcher the ban is part of the mask: a grammar may allow nothing else.
            if sampler.bans_eos and sampler.matcher is None:
                banned = {*self._eos_token_ids, *s.stop_token_ids}
                found += [(row, token_id, BANNED_LOGPROB, s.min_tokens) for token_id in sorted(banned)]
        found = [each for each in found if 0 <= each[1] < self._vocab_size]
        if not found:
            return
        has_min_tokens = any(until < _INT32_MAX for *_, until in found)
        size = max(_MIN_BIASES, padded(len(found)))
        found += [(0, 0, 0.0, _INT32_MAX)] * (size - len(found))
        rows, tokens, amounts, until = zip(*found, strict=True)
        draft.constants["bias_rows"] = mx.array(np.array(rows, np.int32))
        draft.constants["bias_tokens"] = mx.array(np.array(tokens, np.int32))
        draft.constants["bias_amounts"] = mx.array(np.array(amounts, np.float32))
        if has_min_tokens:
            draft.constants["bias_until"] = mx.array(np.array(until, np.int32))
            draft.add_column("min_tokens", lambda s: s.sampling.min_tokens, np.int32, 0)
        draft.key = draft.key._replace(num_biases=size, has_min_tokens=has_min_tokens)

    def _add_penalties(self, draft: _Draft, previous: Plan | None) -> None:
        """Frequency and presence penalties."""
        draft.constants["token_ids"] = self._token_ids
        draft.add_column("frequency_penalty", lambda s: s.sampling.frequency_penalty, np.float32, 0.0)
        draft.add_column("presence_penalty", lambda s: s.sampling.presence_penalty, np.float32, 0.0)
        draft.state["counts"] = self._counts(draft.sequences, draft.key.num_rows, previous)
        draft.key = draft.key._replace(is_penalized=True)

    def _counts(self, sequences: Sequence[SampledSequence], num_rows: int, previous: Plan | None) -> mx.array:
        """How often each token is in each answer before the next step's input, (num_rows, vocab) uint16.

        Rows that were in the previous plan are moved on the device; others are counted here, which are few: most join with no answer.
        """
        parts = [mx.zeros((1, self._vocab_size), mx.uint16)]
        known: dict[int, int] = {}  # by sequence: its index in all parts
        num_known = 1
        if previous is not None and "counts" in previous.state:
            parts.append(previous.state["counts"])
            known = {id(each): 1 + row for row, each in enumerate(previous.sequences)}
            num_known += previous.key.num_rows
        counted: list[Any] = []
        indices = np.zeros(num_rows, np.int32)
        for row, sequence in enumerate(sequences):
            if not sequence.sampler.is_penalized:
                continue
            if id(sequence) in known:
                indices[row] = known[id(sequence)]
            elif answer := _answer_tokens(sequence):
                indices[row] = num_known + len(counted)
                counts = np.bincount([i for i in answer if i < self._vocab_size], minlength=self._vocab_size)
                counted.append(counts.astype(np.uint16))
        if counted:
            parts.append(mx.array(np.stack(counted)))
        return mx.concatenate(parts)[mx.array(indices)]

    def _add_masks(self, draft: _Draft) -> None:
        """What masks need; they are made in each step, by `Plan.masks`."""
        num_rows = draft.key.num_rows
        draft.constants["mask_shifts"] = self._mask_shifts
        constrained = [row for row, each in enumerate(draft.samplers) if each.matcher is not None]
        size = shared_size(len(constrained), num_rows)
        if size < num_rows:
            draft.constants["mask_rows"] = _shared_rows(constrained, size, num_rows)

    def _add_scores(self, draft: _Draft) -> None:
        """Log-probabilities, and the most likely tokens."""
        samplers = draft.samplers
        asked = max(each.num_top_logprobs for each in samplers if each.num_top_logprobs is not None)
        asked = min(asked, self._vocab_size - 1)
        num_top = next((size for size in _TOP_SIZES if asked <= size < self._vocab_size), asked)
        draft.constants["columns"] = mx.arange(num_top + 1, dtype=mx.uint32)[None, :]
        if any(each.has_adjustments for each in samplers):
            draft.add_column("is_adjusted", _is_always_adjusted, np.bool_, False)
        draft.key = draft.key._replace(num_top=num_top)


class _Draft:
    """A plan in the making.

    Attributes:
        samplers: Sampler i is in row i; further rows are spare.
        steps_left: See `Plan`.
    """

    def __init__(self, sequences: Sequence[SampledSequence], num_rows: int) -> None:
        self.sequences = sequences
        self.samplers = [each.sampler for each in sequences]
        self.key = PlanKey(num_rows)
        self.state: Arrays = {}
        self.constants: Arrays = {}
        self.steps_left = _INT32_MAX

    def add_column(self, name: str, value_of: Value, dtype: Any, neutral: float) -> None:
        """Add a constant (num_rows, 1); `neutral` in spare rows."""
        self.constants[name] = _column(self.samplers, self.key.num_rows, value_of, dtype, neutral)

    def by_row(self, values: Sequence[int], dtype: Any) -> mx.array:
        """An array (num_rows,); 0 in spare rows."""
        found = np.zeros(self.key.num_rows, dtype)
        found[: len(values)] = np.array(values, dtype)
        return mx.array(found)


def _add_windows(draft: _Draft) -> None:
    """The windows of repetition penalties; the plan serves until one of them needs more columns."""
    penalized = [
        (row, each)
        for row, each in enumerate(draft.sequences)
        if each.sampler.sampling.repetition_penalty != 1.0
    ]
    needed = [
        min(each.sampler.sampling.repetition_context_size, each.num_cached + _WINDOW_GROWTH_TOKENS)
        for _, each in penalized
    ]
    size = padded(max(needed))
    window = np.full((draft.key.num_rows, size), -1, np.int32)
    for row, sequence in penalized:
        latest = sequence.token_ids[max(0, sequence.num_cached - size) : sequence.num_cached]
        if latest:
            window[row, -len(latest) :] = latest
        if sequence.sampler.sampling.repetition_context_size > size:
            draft.steps_left = min(draft.steps_left, size - sequence.num_cached)
    draft.state["window"] = mx.array(window)
    draft.constants["window_columns"] = mx.arange(size, dtype=mx.int32)[None, :]
    draft.add_column("window_start", lambda s: max(0, size - s.sampling.repetition_context_size), np.int32, 0)
    draft.add_column("repetition_penalty", lambda s: s.sampling.repetition_penalty, np.float32, 1.0)
    draft.key = draft.key._replace(window_tokens=size)


def _answer_tokens(sequence: SampledSequence) -> list[int]:
    """The tokens of an answer before the next step's input."""
    num_tokens = max(0, sequence.sampler.num_sampled - 1)
    return sequence.token_ids[sequence.num_cached - num_tokens : sequence.num_cached]


def _shared_rows(rows: Sequence[int], size: int, num_rows: int) -> mx.array:
    """Where each row's values are in an array of `size` rows, (num_rows,) int32: in order for `rows`, the last one for all others."""
    found = np.full(num_rows, size - 1, np.int32)
    found[rows] = np.arange(len(rows))
    return mx.array(found)


def _column(
    samplers: Sequence[SequenceSampler], num_rows: int, value_of: Value, dtype: Any, neutral: float
) -> mx.array:
    """A value of each row, (num_rows, 1); `neutral` in spare rows."""
    values = np.full((num_rows, 1), neutral, dtype)
    values[: len(samplers), 0] = [value_of(each) for each in samplers]
    return mx.array(values)


def _inverse_temperature(sampler: SequenceSampler) -> float:
    return 1.0 if sampler.is_greedy else 1.0 / sampler.sampling.temperature


def _log_min_p(sampler: SequenceSampler) -> float:
    return math.log(sampler.sampling.min_p) if sampler.sampling.min_p > 0 else -math.inf


def _xtc_limit(sampler: SequenceSampler) -> int:
    """XTC applies if the upper 24 bits of a random number are less than this."""
    return 0 if sampler.is_greedy else math.ceil(sampler.sampling.xtc_probability * 2**24)


def _is_always_adjusted(sampler: SequenceSampler) -> bool:
    """Whether log-probabilities are not the model's own, apart from those that `min_tokens` changes."""
    return sampler.depends_on_history or bool(sampler.sampling.logit_bias)
