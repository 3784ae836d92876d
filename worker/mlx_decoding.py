"""mlx-lm's batch of decoding rows, with less to do for each row in each step.

mlx-lm 0.32 makes a view of the log-probabilities for every row in every step, whoever wants them: operations of MLX that are
built, scheduled and awaited. Here only rows that asked get theirs. `mlx_batch` puts it into its `BatchGenerator`, and imports
it late, since it imports MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch


class DecodingBatch(GenerationBatch):
    """See the module. Rows with logits processors take mlx-lm's own way, all rows of the batch with them.

    Attributes:
        wants_logprobs: By uid: whether a row's log-probabilities are looked at. Set before there are rows.
    """

    wants_logprobs: Callable[[int], bool]
    # mlx-lm's own annotations do not agree with what it assigns.
    logits_processors: Any
    _current_tokens: Any
    _current_logprobs: Any
    _next_tokens: Any
    _next_logprobs: Any

    def _step(self) -> tuple[list[int], list[Any]]:
        """Start the next step; the tokens of the one before, and log-probabilities (None where nobody wants them)."""
        if any(self.logits_processors):
            return super()._step()
        inputs, current = self._next_tokens, self._next_logprobs
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        following = [logprobs[i] if self.wants_logprobs(uid) else None for i, uid in enumerate(self.uids)]
        self._current_tokens, self._current_logprobs = inputs, current
        self._next_tokens, self._next_logprobs = self.fallback_sampler(logprobs), following
        mx.async_eval(self._next_tokens, [each for each in following if each is not None])
        mx.eval(inputs, [each for each in current if each is not None])
        token_ids: Any = inputs.tolist()
        for row, token_id in zip(self.tokens, token_ids, strict=True):
            row.append(token_id)
        return token_ids, current
