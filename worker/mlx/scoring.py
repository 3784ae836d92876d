"""Log-probabilities as clients see them: of sampled tokens, and of a prompt's own tokens for completions that echo it.

Called by `worker.mlx.engine`, which scores one piece of a prompt between two decode steps. Unlike a prefill it needs
the logits of each position: pieces are small, since a vocabulary is large.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from common.protocol import GenerationJob, TextPrompt, TokenLogprob
from worker.loop.engine import PromptEcho
from worker.mlx.caches import kinds as kv
from worker.mlx.sampling import top_tokens
from worker.sampling.scores import Score, score
from worker.text.detokenizer import TokenBytes

_PIECE_BYTES = 32 * 2**20
"""Memory of the logits that are computed at a time."""


class PromptScoring:
    """Scores a prompt from its start; see the module.

    Args:
        on_device: Whether MLX finds the most likely tokens, for a GPU; otherwise NumPy does.

    Attributes:
        scores: Of the tokens so far, from the second one on: nothing comes before the first.
        caches: Of the tokens so far; of all but the last one once `is_done`.
    """

    def __init__(
        self, model: Any, token_ids: list[int], num_top: int, vocab_size: int, *, on_device: bool
    ) -> None:
        self.scores: list[Score] = []
        self.caches: kv.Caches = kv.new(model)
        self._model = model
        self._token_ids = token_ids
        self._num_top = min(num_top, vocab_size - 1)
        self._on_device = on_device
        self._piece_tokens = max(1, _PIECE_BYTES // (4 * vocab_size))

    @property
    def is_done(self) -> bool:
        """Whether each token but the first has its score."""
        return len(self.scores) >= len(self._token_ids) - 1

    def step(self) -> None:
        """Score the next piece."""
        first = len(self.scores)
        piece = self._token_ids[first : min(first + self._piece_tokens, len(self._token_ids) - 1)]
        token_ids = self._token_ids[first + 1 : first + 1 + len(piece)]
        logits = self._model(mx.array([piece]), cache=self.caches)[0].astype(mx.float32)
        score_piece = self._scores_on_device if self._on_device else self._scores_on_host
        self.scores += score_piece(logits, token_ids)

    def _scores_on_host(self, logits: mx.array, token_ids: list[int]) -> list[Score]:
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logprobs, kv.states(self.caches))
        rows = zip(np.array(logprobs, copy=False), token_ids, strict=True)
        return [score(row, token_id, self._num_top) for row, token_id in rows]

    def _scores_on_device(self, logits: mx.array, token_ids: list[int]) -> list[Score]:
        columns = mx.arange(self._num_top + 1, dtype=mx.uint32)[None, :]
        packed = top_tokens.scores(
            logits, mx.array(token_ids, mx.uint32), self._num_top, columns, dtype=mx.float32
        )
        mx.eval(packed, kv.states(self.caches))
        return top_tokens.unpack(np.array(packed), [self._num_top] * len(token_ids))


class LogprobReport:
    """Converts log-probabilities to what clients receive."""

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes
        self._bytes = _KnownBytes(token_bytes)

    def sampled(self, token_id: int, score: Score) -> tuple[TokenLogprob, list[TokenLogprob]]:
        """A sampled token's own log-probability and the most likely tokens, best first."""
        return TokenLogprob(token_id, score.logprob, self._bytes[token_id]), self._top(score)

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
        tokens = [TokenLogprob(token_ids[0], 0.0, self._bytes[token_ids[0]])]
        tokens += [
            TokenLogprob(i, score.logprob, self._bytes[i])
            for i, score in zip(token_ids[1:], scores, strict=True)
        ]
        tops: list[list[TokenLogprob]] = [[], *(self._top(score) for score in scores)]
        return PromptEcho(job.job_id, text, tokens, tops)

    def _num_added(self, text: str, token_ids: list[int]) -> int:
        """How many tokens the tokenizer has put before the text's own."""
        plain = self._tokenizer.encode(text, add_special_tokens=False)
        if not plain:
            return len(token_ids)
        return next((k for k in range(len(token_ids)) if token_ids[k : k + len(plain)] == plain), 0)

    def _top(self, score: Score) -> list[TokenLogprob]:
        # `map`, not a loop in Python: there are up to 20 tokens for each sequence in each step.
        return list(
            map(TokenLogprob, score.top_ids, score.top_logprobs, map(self._bytes.__getitem__, score.top_ids))
        )


class _KnownBytes(dict[int, bytes]):
    """The bytes of the tokens that were reported; the others are looked up."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        super().__init__()
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._token_bytes[token_id]
        return data
