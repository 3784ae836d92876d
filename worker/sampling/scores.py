"""The score of a token: its log-probability and the most likely tokens at its position.

Computed on the CPU here, and on a GPU by `worker.mlx.sampling.top_tokens`; `worker.mlx.scoring` converts it to what clients receive.
Independent of MLX.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_MIN_LOGPROB = -9999.0

_GROUP = 128
"""How many adjacent tokens are compared at first; a multiple of what a CPU compares at once."""


class Score(NamedTuple):
    """One token of a prompt or an answer.

    Attributes:
        logprob: Natural log, given the tokens before it.
        top_ids: Of the most likely tokens at its position, best first.
        top_logprobs: Of the same tokens.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


def finite(logprobs: Any) -> Any:
    """Log-probabilities as JSON can have them, which has neither infinity nor NaN: those of a token that was banned, and of a model
    whose numbers overflow, become a number that underflows to probability 0.
    """
    return np.fmax(logprobs, np.float32(_MIN_LOGPROB))


def score(logprobs: Any, token_id: int, num_top: int) -> Score:
    """The score of a token.

    Args:
        logprobs: NumPy's (vocab,) float32, natural log.
        num_top: How many of the most likely tokens.
    """
    own = float(finite(logprobs[token_id]))
    if num_top == 0:
        return Score(own, [], [])
    candidates = _candidates(logprobs, num_top)
    values = logprobs if candidates is None else logprobs[candidates]
    num_top = min(num_top, len(values))
    best = np.argpartition(-values, num_top - 1)[:num_top]
    best = best[np.argsort(-values[best], kind="stable")]
    token_ids = best if candidates is None else candidates[best]
    return Score(own, token_ids.tolist(), finite(values[best]).tolist())


def _candidates(logprobs: Any, num_top: int) -> Any:
    """Token ids among which the best are: those of the groups with the largest maxima. None: of all tokens.

    Partitioning a vocabulary takes many times as long as finding the largest value of each group.
    """
    num_groups = len(logprobs) // _GROUP
    if num_groups <= 2 * num_top:
        return None
    grouped = num_groups * _GROUP
    maxima = logprobs[:grouped].reshape(num_groups, _GROUP).max(axis=1)
    groups = np.sort(np.argpartition(-maxima, num_top - 1)[:num_top])
    tokens = (groups[:, None] * _GROUP + np.arange(_GROUP)).ravel()
    return np.concatenate([tokens, np.arange(grouped, len(logprobs))])
