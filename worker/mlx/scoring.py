"""Log-probabilities as clients see them: of sampled tokens, and of a prompt's own tokens for completions that echo it.

Called by `worker.mlx.engine`, which scores one piece of a prompt between two decode steps. Unlike a prefill it needs
the logits of each position: pieces are small, since a vocabulary is large.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from common.protocol import GenerationJob, TextPrompt, TokenLogprob
from worker.loop.engine import PromptEcho
from worker.mlx import caches as kv
from worker.text.detokenizer import TokenBytes

_PIECE_BYTES = 32 * 2**20
"""Memory of the logits that are computed at a time."""

_MIN_LOGPROB = -9999.0


class Score(NamedTuple):
    """One token of a prompt.

    Attributes:
        logprob: Natural log, given the tokens before it.
        best: (token id, logprob) of the most likely tokens at its position, best first.
    """

    logprob: float
    best: list[tuple[int, float]]


class PromptScoring:
    """Scores a prompt from its start; see the module.

    Attributes:
        scores: Of the tokens so far, from the second one on: nothing comes before the first.
        caches: Of the tokens so far; of all but the last one once `is_done`.
    """

    def __init__(self, model: Any, token_ids: list[int], num_top: int, vocab_size: int) -> None:
        self.scores: list[Score] = []
        self.caches: kv.Caches = kv.new(model)
        self._model = model
        self._token_ids = token_ids
        self._num_top = num_top
        self._piece_tokens = max(1, _PIECE_BYTES // (4 * vocab_size))

    @property
    def is_done(self) -> bool:
        """Whether each token but the first has its score."""
        return len(self.scores) >= len(self._token_ids) - 1

    def step(self) -> None:
        """Score the next piece."""
        first = len(self.scores)
        piece = self._token_ids[first : min(first + self._piece_tokens, len(self._token_ids) - 1)]
        logits = self._model(mx.array([piece]), cache=self.caches)[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logprobs, kv.states(self.caches))
        for position, row in enumerate(np.array(logprobs, copy=False)):
            token_id = self._token_ids[first + position + 1]
            self.scores.append(Score(float(row[token_id]), top_tokens(row, self._num_top)))


class LogprobReport:
    """Converts log-probabilities to what clients receive."""

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes

    def sampled(self, logprobs: Any, token_id: int, num_top: int) -> tuple[TokenLogprob, list[TokenLogprob]]:
        """A sampled token's own log-probability and the `num_top` best, best first.

        Args:
            logprobs: mx.array or NumPy's (vocab,), natural log, computed with the step.
        """
        # NumPy, not MLX: an operation of MLX would wait in its stream behind the step that is already under way.
        values = np.array(_as_float32(logprobs), copy=False)
        ranked = top_tokens(values, num_top)
        return self._token(token_id, float(values[token_id])), [self._token(*item) for item in ranked]

    def echo(self, job: GenerationJob, token_ids: list[int], scores: list[Score] | None) -> PromptEcho:
        """A job's prompt; `scores` None: without log-probabilities."""
        scores = scores or []
        if isinstance(job.prompt, TextPrompt):
            # What a tokenizer puts before a text, such as a begin-of-text token, is no part of it.
            text, num_added = job.prompt.text, self._num_added(job.prompt.text, token_ids)
            token_ids, scores = token_ids[num_added:], scores[num_added:]
        else:
            detokenizer = self._token_bytes.new_detokenizer(after_template=False)
            text = "".join([*(detokenizer.add(i) for i in token_ids), detokenizer.flush()])
        if job.top_logprobs is None or not token_ids:
            return PromptEcho(job.job_id, text)
        tokens = [self._token(token_ids[0], 0.0)]
        tokens += [self._token(i, score.logprob) for i, score in zip(token_ids[1:], scores, strict=True)]
        tops: list[list[TokenLogprob]] = [[], *([self._token(*b) for b in score.best] for score in scores)]
        return PromptEcho(job.job_id, text, tokens, tops)

    def _num_added(self, text: str, token_ids: list[int]) -> int:
        """How many tokens the tokenizer has put before the text's own."""
        plain = self._tokenizer.encode(text, add_special_tokens=False)
        if not plain:
            return len(token_ids)
        return next((k for k in range(len(token_ids)) if token_ids[k : k + len(plain)] == plain), 0)

    def _token(self, token_id: int, logprob: float) -> TokenLogprob:
        # JSON has neither infinity nor NaN (max takes the first if it cannot compare): a token that was banned, and one of a
        # model whose numbers overflow, reports a number that underflows to probability 0.
        return TokenLogprob(token_id, max(_MIN_LOGPROB, logprob), self._token_bytes[token_id])


def top_tokens(logprobs: Any, num_top: int) -> list[tuple[int, float]]:
    """(token id, logprob), best first.

    Args:
        logprobs: NumPy's (vocab,), natural log.
    """
    num_top = min(num_top, len(logprobs))
    best: Any = np.argpartition(-logprobs, num_top - 1)[:num_top] if num_top else []
    return sorted(((int(i), float(logprobs[i])) for i in best), key=lambda item: -item[1])


def _as_float32(logprobs: Any) -> Any:
    if isinstance(logprobs, np.ndarray) or logprobs.dtype == mx.float32:
        return logprobs
    return logprobs.astype(mx.float32)  # NumPy has no bfloat16
