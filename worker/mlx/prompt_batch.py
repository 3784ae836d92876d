"""mlx-lm's batch of prompts that are being read, with less to do when they have been. See `mlx_batch`, which puts it in place.

In mlx-lm 0.32 prompts that are whole leave by a deep copy of the batch and take a decode step of their own before they
join the others; and each time something was read, all memory that MLX keeps for later is given back and asked for again.
Here those of a model whose layers all keep every token join first and take the step that all take, and memory is given
back when it is much.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch
from mlx_lm.models.cache import BatchKVCache

_MAX_KEPT_BYTES = 256 * 2**20
"""Of memory that MLX keeps for later."""


class _NeverEnds:
    """Instead of mlx-lm's matcher of a row's stop sequences."""

    def advance(self, _token_id: int) -> bool:
        return False


class JoiningBatch(GenerationBatch):
    """Rows whose prompts are read but for the last token, which the decode step reads that they take with all others.

    What that step takes for a row's token is the prompt's last one: it neither counts nor ends the row.

    Attributes:
        matchers: mlx-lm's, which watch the tokens after it.
    """

    matchers: list[Any]
    _matchers: list[Any]
    _next_logprobs: list[Any]

    def _step(self) -> tuple[list[int], list[Any]]:
        """None of their own; mlx-lm calls it when the batch is made."""
        num_rows = len(self.uids)
        self._next_logprobs = [None] * num_rows
        self._num_tokens = [-1] * num_rows
        self.matchers, self._matchers = self._matchers, [_NeverEnds()] * num_rows
        return [], []


class ReadingBatch(PromptProcessingBatch):
    """See the module."""

    def split(self, indices: list[int]) -> Self:
        """The rows at these places leave, in a batch of their own."""
        if len(indices) < len(self.uids):
            parted: Self = super().split(indices)
            return parted
        whole = copy.copy(self)
        vars(self).update(vars(self.empty(self.model, self.fallback_sampler, self.prefill_step_size)))
        return whole

    def prompt(self, tokens: list[list[int]]) -> None:
        """Read on in each prompt, from where it is."""
        if not tokens:
            return
        for known, more in zip(self.tokens, tokens, strict=True):
            known.extend(more)
        lengths = [len(each) for each in tokens]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        if any(padding):
            for cache in self.prompt_cache:
                cache.prepare(lengths=lengths, right_padding=padding)
        inputs = mx.array([each + [0] * rest for each, rest in zip(tokens, padding, strict=True)])
        for begin in range(0, longest, self.prefill_step_size):
            self.model(inputs[:, begin : begin + self.prefill_step_size], cache=self.prompt_cache)
            if begin + self.prefill_step_size < longest:
                self._compute()
        if any(padding):
            for cache in self.prompt_cache:
                cache.finalize()
        self._compute()

    def _compute(self) -> None:
        mx.eval([cache.state for cache in self.prompt_cache])
        if mx.get_cache_memory() > _MAX_KEPT_BYTES:
            mx.clear_cache()

    def generate(self, tokens: list[list[int]]) -> GenerationBatch:
        """Rows that are read but for their last tokens, all of them, to join those that decode."""
        if not all(type(cache) is BatchKVCache for cache in self.prompt_cache):
            # Other kinds of caches may not take rows of which nothing was read.
            own: GenerationBatch = super().generate(tokens)
            return own
        if any(len(each) > 1 for each in tokens):
            self.prompt([each[:-1] for each in tokens])
        return JoiningBatch(
            self.model,
            self.uids,
            mx.array([each[-1] for each in tokens], mx.uint32),  # as what is drawn
            self.prompt_cache,
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )
