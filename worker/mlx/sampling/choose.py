"""The choice of a step's tokens as one pure function of arrays, which `mx.compile` can compile.

All rows are treated alike: what a row does not use is neutral in its constants. A `PlanKey` alone determines which operations there are;
`worker.mlx.sampling.plan_builder` makes the arrays. Nothing is read on the host: random states, penalties' counts, windows and
positions advance on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from worker.mlx.sampling.filters import Arrays, bounds
from worker.mlx.sampling.random_times import log_times, next_states, random_bits
from worker.mlx.sampling.top_tokens import scores
from worker.sampling.arrays import BANNED_LOGPROB

MASK_BITS = 32


class PlanKey(NamedTuple):
    """Which operations a choice consists of, and their sizes. Two plans with the same key differ in the contents of their arrays only.

    Attributes:
        num_rows: Rows of the logits, spare ones included.
        window_tokens: Columns of the windows of repetition penalties; 0: there are none.
        num_biases: Single tokens whose logits are changed, padded; 0: there are none.
        has_min_tokens: Whether some of these changes end at a position.
        is_penalized: Whether some rows have frequency or presence penalties.
        is_drawn: Whether some rows are not greedy.
        num_filtered: Rows with filters, padded; 0: there are none.
        has_limits: Whether some of these use min_p or top_k.
        has_xtc: Whether some of these use XTC.
        num_top: How many of the most likely tokens are reported, at least; None: no log-probabilities are reported.
        num_masks: Rows of the masks that are an input, padded; 0: there are none.
    """

    num_rows: int
    window_tokens: int = 0
    num_biases: int = 0
    has_min_tokens: bool = False
    is_penalized: bool = False
    is_drawn: bool = False
    num_filtered: int = 0
    has_limits: bool = False
    has_xtc: bool = False
    num_top: int | None = None
    num_masks: int = 0

    def structure(self) -> PlanKey:
        """The key without sizes: choices with the same structure are compiled to the same kernels."""
        return self._replace(
            num_rows=_ALL_ROWS,
            window_tokens=min(1, self.window_tokens),
            num_biases=min(1, self.num_biases),
            num_filtered=_share(self.num_filtered, self.num_rows),
            num_masks=_share(self.num_masks, self.num_rows),
        )


_ALL_ROWS = 2


def _share(num_some: int, num_rows: int) -> int:
    """0: none of the rows; 1: some, so that rows are gathered; 2: all."""
    return 0 if not num_some else _ALL_ROWS if num_some >= num_rows else 1


Chosen = tuple[mx.array, list[mx.array], Arrays]
"""Token ids, (rows,) uint32; the scores of `worker.mlx.sampling.top_tokens` in a list, or an empty list; the state of the next step."""

Choose = Callable[[mx.array, mx.array, Arrays, Arrays], Chosen]
"""Arguments: the logits (rows, vocab); the step's input tokens (rows,) uint32, which the previous step chose; the state; the constants, with
`masks` (num_masks, num_words) uint32 if the key has masks."""


def make_choose(key: PlanKey) -> Choose:
    """The function of all plans with this key."""
    return partial(_choose, key)


def _choose(
    key: PlanKey,
    logits: mx.array,
    inputs: mx.array,
    state: Arrays,
    constants: Arrays,
) -> Chosen:
    """See `Choose`.

    1. Repetition penalties, on the model's logits, as mlx-lm does.
    2. Frequency and presence penalties, masks, biases and bans, in float32.
    3. The most likely token of a greedy row; otherwise the winner of an exponential race, see `BatchSampler`.
    4. Scores.
    """
    dtype, next_state = logits.dtype, dict(state)
    if key.window_tokens:
        logits, next_state["window"] = _repetition_penalized(logits, inputs, state["window"], constants)
    values = logits
    if key.is_penalized or key.num_masks:
        values, counts = _adjusted(key, values, inputs, state, constants)
        next_state |= counts
    if key.num_biases:
        values = _biased(key, values.astype(mx.float32), state, constants)
    if "positions" in state:
        next_state["positions"] = state["positions"] + 1
    if key.is_drawn:
        token_ids = mx.argmax(_race(key, values, state, constants), axis=-1)
        next_state |= {name: next_states(state[name]) for name in ("random", "xtc_random") if name in state}
    else:
        token_ids = mx.argmax(values, axis=-1)
    if key.num_top is None:
        return token_ids, [], next_state
    is_adjusted = constants.get("is_adjusted")
    if is_adjusted is not None and key.has_min_tokens:
        is_adjusted = is_adjusted | (state["positions"][:, None] < constants["min_tokens"])
    found = scores(values, token_ids, key.num_top, constants["columns"], dtype=dtype, is_adjusted=is_adjusted)
    return token_ids, [found], next_state


def _repetition_penalized(
    logits: mx.array, inputs: mx.array, window: mx.array, constants: Arrays
) -> tuple[mx.array, mx.array]:
    """As mlx-lm's processor, for all rows at once.

    Args:
        window: The last tokens before the input, (rows, window_tokens) int32; -1: there is none.
        constants: `repetition_penalty` (rows, 1), `window_start` (rows, 1) int32: a row's first column, and `window_columns`.

    Returns:
        The penalized logits, and the window with the input.
    """
    latest = inputs[:, None].astype(mx.int32)
    window = mx.concatenate([window[:, 1:], latest], axis=1)
    is_used = (window >= 0) & (constants["window_columns"] >= constants["window_start"])
    indices = mx.where(is_used, window, latest)
    selected, penalty = mx.take_along_axis(logits, indices, axis=1), constants["repetition_penalty"]
    penalty = penalty.astype(logits.dtype)
    penalized = mx.where(selected < 0, selected * penalty, selected / penalty)
    return mx.put_along_axis(logits, indices, penalized, axis=1), window


def _adjusted(
    key: PlanKey, values: mx.array, inputs: mx.array, state: Arrays, constants: Arrays
) -> tuple[mx.array, Arrays]:
    """Frequency and presence penalties and masks, which `mx.compile` fuses into one operation; also the penalties' new counts.

    The input token is counted here: the host does not know it yet when it launches the step. A prompt's last token is not counted.
    """
    rows, vocab_size = values.shape
    shape = (rows, vocab_size // MASK_BITS, MASK_BITS) if vocab_size % MASK_BITS == 0 else values.shape
    one_per_row = (rows,) + (1,) * (len(shape) - 1)
    values, counts = values.reshape(shape).astype(mx.float32), {}
    if key.is_penalized:
        is_input = constants["token_ids"].reshape(1, *shape[1:]) == inputs.reshape(one_per_row)
        is_counted = is_input & (state["positions"].reshape(one_per_row) > 0)
        new_counts = state["counts"].reshape(shape) + is_counted.astype(mx.uint16)
        occurrences = new_counts.astype(mx.float32)
        frequency, presence = (
            constants[name].reshape(one_per_row) for name in ("frequency_penalty", "presence_penalty")
        )
        penalties = occurrences * frequency + (new_counts > 0).astype(mx.float32) * presence
        values = values - penalties
        counts["counts"] = new_counts.reshape(rows, vocab_size)
    if key.num_masks:
        masks = constants["masks"]
        if key.num_masks < rows:
            masks = masks[constants["mask_rows"]]
        bits = masks[:, :, None] >> constants["mask_shifts"]
        if len(shape) == 2:  # noqa: PLR2004 (dimensions)
            bits = bits.reshape(rows, -1)[:, :vocab_size]
        values = mx.where((bits & 1) > 0, values, values + BANNED_LOGPROB)
    return values.reshape(rows, vocab_size), counts


def _biased(key: PlanKey, values: mx.array, state: Arrays, constants: Arrays) -> mx.array:
    """Add to single tokens: biases, and bans until a row has enough tokens."""
    rows, amounts = constants["bias_rows"], constants["bias_amounts"]
    if key.has_min_tokens:
        amounts = mx.where(state["positions"][rows] < constants["bias_until"], amounts, 0.0)
    return values.at[rows, constants["bias_tokens"]].add(amounts)


def _race(key: PlanKey, values: mx.array, state: Arrays, constants: Arrays) -> mx.array:
    """Values whose maximum is each row's choice, (rows, vocab) float32: the logarithms of an exponential race, or a greedy row's logits."""
    times = log_times(random_bits(state["random"]), constants["token_hashes"])
    race = values.astype(mx.float32) * constants["inverse_temperature"] - times * constants["is_drawn"]
    if not key.num_filtered:
        return race
    xtc_bits = random_bits(state["xtc_random"]) if key.has_xtc else None
    lower, *upper = bounds(values, constants, xtc_bits, has_limits=key.has_limits)
    kept = (values >= lower) | (lower == math.inf)
    if upper:
        kept = kept & ((values <= upper[0]) | constants["is_never_excluded"])
    return mx.where(kept, race, -math.inf)
