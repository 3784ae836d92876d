"""The log-probabilities of a prompt's own tokens, for completions that echo their prompt.

Owned by `mlx_engine`, which takes one piece of a prompt between two decode steps. Unlike when a prompt is just read, each
position's logits are wanted: pieces are small, since a vocabulary is wide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_PIECE_BYTES = 32 * 2**20
"""Of logits at a time."""


class Score(NamedTuple):
    """One token of a prompt.

    Attributes:
        logprob: Natural log, given the tokens before it.
        best: (token id, logprob) of the most likely tokens in its place, best first.
    """

    logprob: float
    best: list[tuple[int, float]]


class PromptScoring:
    """Reads a prompt from its start; see the module.

    Attributes:
        scores: Of the tokens read so far; the first one has none, since nothing comes before it.
        caches: What was read, all but the last token once `is_done`.
    """

    def __init__(self, model: Any, token_ids: list[int], num_top: int, vocab_size: int) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.scores: list[Score] = []
        self.caches: list[Any] = make_prompt_cache(model)
        self._model = model
        self._token_ids = token_ids
        self._num_top = num_top
        self._piece_tokens = max(1, _PIECE_BYTES // (4 * vocab_size))

    @property
    def is_done(self) -> bool:
        """Whether each token but the first has its score."""
        return len(self.scores) >= len(self._token_ids) - 1

    def step(self) -> None:
        """Read the next piece."""
        import mlx.core as mx

        first = len(self.scores)
        piece = self._token_ids[first : min(first + self._piece_tokens, len(self._token_ids) - 1)]
        logits = self._model(mx.array([piece]), cache=self.caches)[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logprobs, [cache.state for cache in self.caches])
        for position, row in enumerate(np.array(logprobs, copy=False)):
            token_id = self._token_ids[first + position + 1]
            self.scores.append(Score(float(row[token_id]), most_likely(row, self._num_top)))


def most_likely(logprobs: Any, num_top: int) -> list[tuple[int, float]]:
    """(token id, logprob), best first.

    Args:
        logprobs: NumPy's (vocab,), natural log.
    """
    num_top = min(num_top, len(logprobs))
    best: Any = np.argpartition(-logprobs, num_top - 1)[:num_top] if num_top else []
    return sorted(((int(i), float(logprobs[i])) for i in best), key=lambda item: -item[1])
