"""The arrays with which tokens are chosen as long as the batch consists of the same sequences.

`PlanBuilder` makes a `Plan` when sequences join or leave; `DeviceSampler` uses it in each step. Most arrays are constant; those of `state`
belong to the next step, and a step returns those of the one after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from worker.mlx.sampling.choose import MASK_BITS, PlanKey
from worker.mlx.sampling.filters import Arrays
from worker.sampling.masks import ALL_ALLOWED, fill_mask
from worker.sampling.sequence_sampler import SequenceSampler


class SampledSequence(Protocol):
    """What a plan reads of a `worker.mlx.decoding.decode_batch.BatchSequence`.

    Attributes:
        token_ids: The prompt and the answer; without the next step's input if the host does not know it yet.
        num_cached: How many of them come before the next step's input.
    """

    sampler: SequenceSampler
    token_ids: list[int]
    num_cached: int


class Plan:
    """See the module.

    Attributes:
        key: The operations of a step that needs no mask.
        masked_key: Those of a step that needs masks.
        sequences: Sequence i is in row i; further rows are spare.
        has_matchers: Whether masks may be needed: only known once the matchers have observed the step's input tokens.
        reporting: Row and number of most likely tokens, of each sequence that reports log-probabilities.
        steps_left: How many more steps can use the plan.
    """

    def __init__(
        self,
        key: PlanKey,
        sequences: Sequence[SampledSequence],
        state: Arrays,
        constants: Arrays,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        steps_left: int,
    ) -> None:
        self.key = key
        self.sequences = list(sequences)
        self.state = state
        self.constants = constants
        self.steps_left = steps_left
        self._samplers = [each.sampler for each in sequences]
        self._eos_token_ids = eos_token_ids
        self._num_words = -(-vocab_size // MASK_BITS)
        self._words: np.ndarray[Any, np.dtype[np.uint32]] | None = None
        constrained = [row for row, each in enumerate(self._samplers) if each.matcher is not None]
        self.has_matchers = bool(constrained)
        num_masks = shared_size(len(constrained), key.num_rows)
        self.masked_key = key._replace(num_masks=num_masks)
        self._constrained = [
            (index if num_masks < key.num_rows else row, self._samplers[row])
            for index, row in enumerate(constrained)
        ]
        """Indices in the masks, and samplers."""
        self.reporting = [
            (row, min(each.num_top_logprobs, key.num_top))
            for row, each in enumerate(self._samplers)
            if each.num_top_logprobs is not None and key.num_top is not None
        ]

    def fits(self, sequences: Sequence[SampledSequence], num_rows: int) -> bool:
        """Whether the next step of these sequences can use this plan."""
        return self.steps_left > 0 and self.key.num_rows == num_rows and self.sequences == sequences

    def masks(self) -> Arrays:
        """The masks of the next step, after the matchers have observed its input tokens; empty if every token is allowed in all rows.

        An error of a matcher is kept in its sampler.
        """
        if not any(_is_restricted(sampler) for _, sampler in self._constrained):
            return {}
        if self._words is None:
            self._words = np.full((self.masked_key.num_masks, self._num_words), ALL_ALLOWED, np.uint32)
        for index, sampler in self._constrained:
            if _is_restricted(sampler):
                fill_mask(sampler, self._words[index], self._eos_token_ids)
            else:
                self._words[index] = ALL_ALLOWED
        return {"masks": mx.array(self._words)}

    def advance(self, state: Arrays) -> None:
        """Keep the state that a step has returned, for the next one."""
        self.state = state
        self.steps_left -= 1
        for each in self._samplers:
            each.num_sampled += 1


def shared_size(num_used: int, num_rows: int) -> int:
    """Rows of an array that `num_used` of `num_rows` rows need: one for each and, last, a neutral one for all others; or one for each row."""
    return min(num_rows, padded(num_used + 1))


def _is_restricted(sampler: SequenceSampler) -> bool:
    assert sampler.matcher is not None
    return sampler.error is None and (sampler.bans_eos or not sampler.matcher.is_open)


def padded(size: int) -> int:
    """The next power of two, so that few sizes occur."""
    return 1 << max(0, size - 1).bit_length()
