"""Makes the plans of steps, from the parameters of sequences and the tokens that the host knows.

Called by `DeviceSampler` when sequences join or leave. Between two steps the host knows all tokens but the latest, which is the next
step's input: the state that is made of the known tokens is therefore the state with which the old plan would have gone on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from worker.mlx.sampling.choose import MASK_BITS, PlanKey
from worker.mlx.sampling.filters import Arrays
from worker.mlx.sampling.plan import Plan, SampledSequence, num_mask_rows, padded
from worker.mlx.sampling.random_times import token_hashes
from worker.sampling.arrays import BANNED_LOGPROB
from worker.sampling.sequence_sampler import SequenceSampler

_INT32_MAX = 2**31 - 1
_MIN_BIASES = 8
_TOP_SIZES = (0, 2, 5, 10, 20)
"""`PlanKey.num_top` is one of these, or the exact number above: a compiled step serves any number up to its own."""

_WINDOW_GROWTH_TOKENS = 64
"""How many tokens a window that is not full has room for, at least; then the plan is made anew."""


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
        self._of_vocabulary: Arrays = {}

    def build(self, sequences: Sequence[SampledSequence], num_rows: int, previous: Plan | None) -> Plan:
        """The plan of these sequences.

        Args:
            num_rows: At least as many; the rest are spare.
            previous: The plan of the latest step.
        """
        samplers = [each.sampler for each in sequences]
        key = PlanKey(num_rows)
        state: Arrays = {}
        constants: Arrays = {}
        steps_left = _INT32_MAX
        if any(not each.is_greedy for each in samplers):
            key = self._add_draws(key, samplers, state, constants)
        if any(each.sampling.repetition_penalty != 1.0 for each in samplers):
            key, steps_left = _add_windows(key, sequences, state, constants)
        if any(each.has_adjustments for each in samplers):
            key = self._add_adjustments(key, sequences, previous, state, constants)
        tops = [each.num_top_logprobs for each in samplers if each.num_top_logprobs is not None]
        if tops:
            asked = min(max(tops), self._vocab_size - 1)
            num_top = next((size for size in _TOP_SIZES if asked <= size < self._vocab_size), asked)
            key = key._replace(num_top=num_top)
            constants["columns"] = mx.arange(num_top + 1, dtype=mx.uint32)[None, :]
            if any(each.has_adjustments for each in samplers):
                constants["is_adjusted"] = _column(samplers, num_rows, _is_always_adjusted, np.bool_, False)
        return Plan(
            key,
            sequences,
            state,
            constants,
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos_token_ids,
            steps_left=steps_left,
        )

    def _constant(self, name: str) -> mx.array:
        """An array that depends on the vocabulary only; made at first use."""
        if name not in self._of_vocabulary:
            self._of_vocabulary[name] = self._new_constant(name)
        return self._of_vocabulary[name]

    def _new_constant(self, name: str) -> mx.array:
        numbers = np.arange(self._vocab_size)
        if name == "token_hashes":
            return token_hashes(self._vocab_size)
        if name == "token_ids":
            return mx.array(numbers[None, :].astype(np.uint32))
        if name == "ranks":
            return mx.array(numbers[None, ::-1].astype(np.int32))
        if name == "is_never_excluded":
            return mx.array(np.isin(numbers, self._xtc_special_token_ids)[None, :])
        assert name == "mask_shifts"
        return mx.arange(MASK_BITS, dtype=mx.uint32)

    def _add_draws(
        self, key: PlanKey, samplers: list[SequenceSampler], state: Arrays, constants: Arrays
    ) -> PlanKey:
        """Temperatures, random numbers and filters."""
        num_rows = key.num_rows
        states = [each.random_states for each in samplers]
        spare = [0] * (num_rows - len(samplers))
        state["random"] = mx.array(np.array([*(each[0] for each in states), *spare], np.uint64))
        constants["token_hashes"] = self._constant("token_hashes")
        constants["inverse_temperature"] = _column(samplers, num_rows, _inverse_temperature, np.float32, 1.0)
        constants["is_drawn"] = _column(samplers, num_rows, lambda s: not s.is_greedy, np.float32, 0.0)
        key = key._replace(is_drawn=True)
        filtered = [row for row, each in enumerate(samplers) if each.is_filtered and not each.is_greedy]
        if not filtered:
            return key
        size = padded(len(filtered) + 1)  # the last one keeps no token: it stands for rows without filters
        if size < num_rows:
            repeated = filtered + filtered[:1] * (size - len(filtered))
            constants["filtered"] = mx.array(np.array(repeated, np.int32))
            filter_rows = np.full(num_rows, size - 1, np.int32)
            filter_rows[filtered] = np.arange(len(filtered))
            constants["filter_rows"] = mx.array(filter_rows)
            chosen = [samplers[row] for row in filtered]
        else:
            size, chosen = num_rows, samplers
        columns: dict[str, tuple[Callable[[SequenceSampler], float], Any, float]] = {
            "filter_inverse_temperature": (_inverse_temperature, np.float32, 1.0),
            "filter_floor": (_log_min_p, np.float32, -math.inf),
            "filter_max_tokens": (lambda s: min(s.sampling.top_k or _INT32_MAX, _INT32_MAX), np.int32, 0),
            "filter_share": (lambda s: s.sampling.top_p, np.float32, 1.0),
        }  # fmt: skip
        has_limits = any(each.sampling.top_k or each.sampling.min_p > 0 for each in chosen)
        has_xtc = any(each.sampling.xtc_probability > 0 for each in chosen)
        if has_xtc:
            columns["xtc_limit"] = (_xtc_limit, np.uint32, 0)
            columns["xtc_threshold"] = (lambda s: s.sampling.xtc_threshold, np.float32, 0.0)
            constants["is_never_excluded"] = self._constant("is_never_excluded")
            state["xtc_random"] = mx.array(np.array([*(each[1] for each in states), *spare], np.uint64))
        for name, (value_of, dtype, neutral) in columns.items():
            constants[name] = _column(chosen, size, value_of, dtype, neutral)
        constants["ranks"] = self._constant("ranks")
        return key._replace(num_filtered=size, has_limits=has_limits, has_xtc=has_xtc)

    def _add_adjustments(
        self,
        key: PlanKey,
        sequences: Sequence[SampledSequence],
        previous: Plan | None,
        state: Arrays,
        constants: Arrays,
    ) -> PlanKey:
        """Frequency and presence penalties, biases, bans of the end, and what masks need."""
        samplers, num_rows = [each.sampler for each in sequences], key.num_rows
        key = self._add_biases(key, samplers, constants)
        if any(each.is_penalized for each in samplers):
            key = key._replace(is_penalized=True)
            constants["token_ids"] = self._constant("token_ids")
            constants["frequency_penalty"] = _column(
                samplers, num_rows, lambda s: s.sampling.frequency_penalty, np.float32, 0.0
            )
            constants["presence_penalty"] = _column(
                samplers, num_rows, lambda s: s.sampling.presence_penalty, np.float32, 0.0
            )
            state["counts"] = self._counts(sequences, num_rows, previous)
        if key.is_penalized or key.has_min_tokens:
            positions = [each.num_sampled for each in samplers]
            state["positions"] = mx.array(np.array(positions + [0] * (num_rows - len(samplers)), np.int32))
        if any(each.matcher is not None for each in samplers):
            constants["mask_shifts"] = self._constant("mask_shifts")
            constrained = [row for row, each in enumerate(samplers) if each.matcher is not None]
            num_masks = num_mask_rows(len(constrained), num_rows)
            if num_masks < num_rows:
                mask_rows = np.full(num_rows, num_masks - 1, np.int32)
                mask_rows[constrained] = np.arange(len(constrained))
                constants["mask_rows"] = mx.array(mask_rows)
        return key

    def _add_biases(self, key: PlanKey, samplers: list[SequenceSampler], constants: Arrays) -> PlanKey:
        found: list[tuple[int, int, float, int]] = []  # row, token, amount, and the position at which it ends
        for row, sampler in enumerate(samplers):
            s = sampler.sampling
            found += [(row, token_id, amount, _INT32_MAX) for token_id, amount in s.logit_bias.items()]
            # With a matcher the ban is part of the mask: a grammar may allow nothing else.
            if sampler.bans_eos and sampler.matcher is None:
                banned = {*self._eos_token_ids, *s.stop_token_ids}
                found += [(row, token_id, BANNED_LOGPROB, s.min_tokens) for token_id in sorted(banned)]
        found = [each for each in found if 0 <= each[1] < self._vocab_size]
        if not found:
            return key
        has_min_tokens = any(until < _INT32_MAX for *_, until in found)
        size = max(_MIN_BIASES, padded(len(found)))
        found += [(0, 0, 0.0, _INT32_MAX)] * (size - len(found))
        rows, tokens, amounts, until = zip(*found, strict=True)
        constants["bias_rows"] = mx.array(np.array(rows, np.int32))
        constants["bias_tokens"] = mx.array(np.array(tokens, np.int32))
        constants["bias_amounts"] = mx.array(np.array(amounts, np.float32))
        if has_min_tokens:
            constants["bias_until"] = mx.array(np.array(until, np.int32))
            constants["min_tokens"] = _column(
                samplers, key.num_rows, lambda s: s.sampling.min_tokens, np.int32, 0
            )
        return key._replace(num_biases=size, has_min_tokens=has_min_tokens)

    def _counts(self, sequences: Sequence[SampledSequence], num_rows: int, previous: Plan | None) -> mx.array:
        """How often each token is in each answer before the next step's input, (num_rows, vocab) uint16.

        Rows that were in the previous plan are moved on the device; others are counted here, which are few: most join with no answer.
        """
        known = {} if previous is None else {id(each): row for row, each in enumerate(previous.sequences)}
        parts = [mx.zeros((1, self._vocab_size), mx.uint16)]
        num_known = 1
        if previous is not None and "counts" in previous.state:
            parts.append(previous.state["counts"])
            num_known += previous.key.num_rows
        else:
            known = {}
        counted: list[Any] = []
        indices = np.zeros(num_rows, np.int32)
        for row, sequence in enumerate(sequences):
            if not sequence.sampler.is_penalized:
                continue
            if id(sequence) in known:
                indices[row] = 1 + known[id(sequence)]
            elif answer := answer_tokens(sequence):
                indices[row] = num_known + len(counted)
                counts = np.bincount([i for i in answer if i < self._vocab_size], minlength=self._vocab_size)
                counted.append(counts.astype(np.uint16))
        if counted:
            parts.append(mx.array(np.stack(counted)))
        return mx.concatenate(parts)[mx.array(indices)]


def answer_tokens(sequence: SampledSequence) -> list[int]:
    """The tokens of an answer before the next step's input."""
    num_tokens = max(0, sequence.sampler.num_sampled - 1)
    return sequence.token_ids[sequence.num_cached - num_tokens : sequence.num_cached]


def _add_windows(
    key: PlanKey, sequences: Sequence[SampledSequence], state: Arrays, constants: Arrays
) -> tuple[PlanKey, int]:
    """The windows of repetition penalties; also the number of steps until one of them needs more columns."""
    needed, num_rows = 1, key.num_rows
    for sequence in sequences:
        s = sequence.sampler.sampling
        if s.repetition_penalty != 1.0:
            needed = max(needed, min(s.repetition_context_size, sequence.num_cached + _WINDOW_GROWTH_TOKENS))
    size = padded(needed)
    window, steps_left = np.full((num_rows, size), -1, np.int32), _INT32_MAX
    for row, sequence in enumerate(sequences):
        s = sequence.sampler.sampling
        if s.repetition_penalty == 1.0:
            continue
        latest = sequence.token_ids[max(0, sequence.num_cached - size) : sequence.num_cached]
        if latest:
            window[row, -len(latest) :] = latest
        if s.repetition_context_size > size:
            steps_left = min(steps_left, size - sequence.num_cached)
    samplers = [each.sampler for each in sequences]
    state["window"] = mx.array(window)
    constants["window_columns"] = mx.arange(size, dtype=mx.int32)[None, :]
    constants["window_start"] = _column(
        samplers, num_rows, lambda s: max(0, size - s.sampling.repetition_context_size), np.int32, 0
    )
    constants["repetition_penalty"] = _column(
        samplers, num_rows, lambda s: s.sampling.repetition_penalty, np.float32, 1.0
    )
    return key._replace(window_tokens=size), steps_left


def _column(
    samplers: Sequence[SequenceSampler],
    num_rows: int,
    value_of: Callable[[SequenceSampler], float],
    dtype: Any,
    neutral: float,
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
