"""The tokens that a step has chosen, and how the host reads them: at most once, one step later.

`HostSampler` and `DeviceSampler` return a `ChosenTokens`; `worker.mlx.decoding.decode_batch` keeps it with the rows that its sequences have in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from worker.sampling.scores import Score
from worker.sampling.sequence_sampler import SequenceSampler

SampledToken = tuple[int, Score | None]
"""A token id as the host reads it, and its score: None unless the sequence reports log-probabilities."""


class ChosenTokens:
    """The tokens of one step, which may not be computed yet.

    Attributes:
        token_ids: (rows,) uint32.

    Args:
        read: Waits for the tokens and copies them to the host.
    """

    def __init__(self, token_ids: mx.array, read: Callable[[], list[SampledToken]]) -> None:
        self.token_ids = token_ids
        self._read: Callable[[], list[SampledToken]] | None = read
        self._tokens: list[SampledToken] = []

    def read(self) -> list[SampledToken]:
        """The tokens by row; waits for them."""
        if self._read is not None:
            self._tokens, self._read = self._read(), None
        return self._tokens


ChosenRow = tuple[ChosenTokens, int]
"""Where a sequence's token is among those of a step."""


class PreviousTokens:
    """The input tokens of a step that are tokens of answers, not of prompts.

    They are read while the step is computed: by the sampler if it depends on them, otherwise by `DecodeBatch.step`.

    Args:
        samplers: Of the step's sequences, in order.
        rows: Where each sequence's token is; None: its input is the prompt's last token.
    """

    def __init__(self, samplers: Sequence[SequenceSampler], rows: Sequence[ChosenRow | None]) -> None:
        self._samplers = samplers
        self._rows = rows
        self._tokens: list[SampledToken | None] | None = None

    def read(self) -> list[SampledToken | None]:
        """The tokens by index; waits for them. Samplers that depend on their history observe them, once."""
        if self._tokens is None:
            self._tokens = [None if each is None else each[0].read()[each[1]] for each in self._rows]
            for sampler, token in zip(self._samplers, self._tokens, strict=True):
                if sampler.depends_on_history and token is not None:
                    sampler.observe(token[:1])
        return self._tokens


class StepSampler(Protocol):
    """Chooses the tokens of a step from its logits."""

    def warm_up(self, dtype: mx.Dtype) -> None:
        """Prepare for all kinds of sequences, before the first step.

        Args:
            dtype: Of the model's logits.
        """

    def choose(
        self, sequences: Sequence[Any], inputs: mx.array, logits: mx.array, previous: PreviousTokens
    ) -> ChosenTokens:
        """Start choosing the next token of each sequence.

        Args:
            sequences: `worker.mlx.decoding.decode_batch.BatchSequence`s, in the order of the rows.
            inputs: The step's input tokens, (rows,) uint32.
            logits: (rows, vocab), not evaluated.
            previous: Read only if the choice depends on these tokens, after the computation of `logits` was started.
        """

    def reset(self) -> None:
        """Forget all sequences, after a step failed."""
