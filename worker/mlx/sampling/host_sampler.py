"""Chooses a step's tokens on the CPU that computes the model, with NumPy (`worker.sampling.sampler`) and mlx-lm's logits processors.

Called by `worker.mlx.decoding.decode_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import TokenBuffer
from mlx_lm.sample_utils import make_logits_processors

from common.protocol import SamplingParams
from worker.mlx.sampling.chosen import ChosenTokens, PreviousTokens, SampledToken
from worker.mlx.sampling.plan import SampledSequence
from worker.sampling.sampler import BatchSampler
from worker.sampling.scores import Score, score
from worker.sampling.sequence_sampler import SequenceSampler

LogitsProcessor = Callable[[Any, Any], Any]
"""As mlx-lm's: (token ids so far, logits (1, vocab)) to logits."""


class ProcessedSequence(SampledSequence, Protocol):
    """What this sampler reads of a `worker.mlx.decoding.decode_batch.BatchSequence`, and its processors' tokens, which it keeps there."""

    processors: list[LogitsProcessor]
    context: TokenBuffer | None


class HostSampler:
    """See the module; a `worker.mlx.sampling.chosen.StepSampler`."""

    def __init__(self, sampler: BatchSampler) -> None:
        self._sampler = sampler

    def reset(self) -> None:
        """See `StepSampler`: it keeps nothing about sequences."""

    def warm_up(self, dtype: mx.Dtype) -> None:
        """See `StepSampler`: NumPy compiles nothing."""

    def choose(
        self,
        sequences: Sequence[ProcessedSequence],
        inputs: mx.array,
        logits: mx.array,
        previous: PreviousTokens,
    ) -> ChosenTokens:
        """See `StepSampler`."""
        samplers = [sequence.sampler for sequence in sequences]
        if any(sequence.processors for sequence in sequences):
            logits = _processed(sequences, inputs, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        values = logprobs if logprobs.dtype == mx.float32 else logprobs.astype(mx.float32)
        if any(sampler.depends_on_history for sampler in samplers):
            mx.async_eval(values)
            previous.read()
        chosen, adjusted = self._sampler.sample(samplers, values)
        token_ids = mx.argmax(logprobs, axis=-1) if chosen is None else mx.array(chosen.astype(np.uint32))
        reported: dict[int, Any] = {
            row: adjusted[row] if row in adjusted else logprobs[row].astype(mx.float32)
            for row, sampler in enumerate(samplers)
            if sampler.num_top_logprobs is not None
        }
        mx.async_eval(token_ids, [each for each in reported.values() if isinstance(each, mx.array)])
        return ChosenTokens(token_ids, lambda: _tokens(token_ids, samplers, reported))


def _tokens(
    token_ids: mx.array, samplers: Sequence[SequenceSampler], reported: dict[int, Any]
) -> list[SampledToken]:
    """The tokens of a step on the host.

    Args:
        reported: By row: log-probabilities (vocab,) float32, of NumPy or MLX, computed with the step.
    """
    mx.eval(token_ids, [each for each in reported.values() if isinstance(each, mx.array)])
    tokens: list[SampledToken] = []
    host_ids: Any = token_ids.tolist()
    for row, token_id in enumerate(host_ids):
        found: Score | None = None
        num_top = samplers[row].num_top_logprobs
        if num_top is not None:
            # NumPy, not MLX: an operation of MLX would wait in its stream behind the step that is already under way.
            found = score(np.array(reported[row], copy=False), token_id, num_top)
        tokens.append((token_id, found))
    return tokens


def _processed(sequences: Sequence[ProcessedSequence], inputs: mx.array, logits: mx.array) -> mx.array:
    """Logits (sequences, vocab) after the sequences' processors were applied."""
    rows = []
    for index, sequence in enumerate(sequences):
        row = logits[index : index + 1]
        if sequence.processors:
            if sequence.context is None:
                sequence.context = TokenBuffer(sequence.token_ids[: sequence.num_cached])
            token_ids = sequence.context.update_and_fetch(inputs[index : index + 1])
            for processor in sequence.processors:
                row = processor(token_ids, row)
        rows.append(row)
    return mx.concatenate(rows)


def logits_processors(sampling: SamplingParams, sampler: SequenceSampler) -> list[LogitsProcessor]:
    """Processors for the parameters that need the model's logits; `BatchSampler` handles all others."""
    if sampling.repetition_penalty == 1.0:
        return []
    made = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty,
        repetition_context_size=sampling.repetition_context_size,
    )
    return [guarded(sampler, processor) for processor in made]


def guarded(sampler: SequenceSampler, processor: LogitsProcessor) -> LogitsProcessor:
    """A logits processor whose error ends only its own sequence."""

    def process(token_ids: Any, logits: Any) -> Any:
        if sampler.error is None:
            try:
                return processor(token_ids, logits)
            except Exception as error:  # noqa: BLE001 (the engine reports it)
                sampler.error = error
        return logits

    return process
