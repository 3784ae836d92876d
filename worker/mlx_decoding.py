"""mlx-lm's batch of decoding rows, with less to do in each step.

A decode step of a small model on a GPU takes as long as the CPU needs to feed it: each operation costs some ten microseconds,
however little it computes. Here a step has fewer of them than in mlx-lm 0.32; what it computes is the same. `mlx_batch` puts
this batch into its `BatchGenerator`, and imports it late, since it imports MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch
from mlx_lm.models.cache import BatchKVCache

from worker.mlx_attention import PaddedAttention


class UnpaddedKVCache(BatchKVCache):
    """Of rows that begin at the same place: every row's next token may look at everything that is there.

    Without a mask MLX's CUDA back-end has one kernel for the attention of such a step, with one it has many.
    """

    def make_mask(self, N: int, return_array: bool = False, **options: Any) -> Any:  # noqa: N803 (as mlx-lm calls it)
        if N == 1 and not return_array and options.get("window_size") is None:
            return None
        return super().make_mask(N, return_array, **options)


class PaddedKVCache(BatchKVCache):
    """Of rows that begin at different places, with an attention that is told where."""

    attention: PaddedAttention

    def make_mask(self, N: int, return_array: bool = False, **options: Any) -> Any:  # noqa: N803 (as mlx-lm calls it)
        mask: Any = super().make_mask(N, return_array, **options)
        if N == 1 and options.get("window_size") is None:
            self.attention.expect(mask, self.left_padding)
        return mask


_PLAIN = (BatchKVCache, UnpaddedKVCache, PaddedKVCache)


class DecodingBatch(GenerationBatch):
    """See the module. Rows with logits processors take mlx-lm's own way but for masks, all rows of the batch with them.

    1. Only rows that ask get a view of their log-probabilities; mlx-lm makes one for every row.
    2. All layers count the same tokens: they share one count, instead of adding to one each.
    3. Rows without padding need no mask, others have on CUDA an attention of their own.

    Attributes:
        wants_logprobs: By uid: whether a row's log-probabilities are looked at. Set before there are rows.
        attention: Of padded rows; None: MLX's own.
    """

    wants_logprobs: Callable[[int], bool]
    attention: PaddedAttention | None = None
    _plain: list[Any] | None = (
        None  # caches of the layers that attend to everything; None: rows have come or gone
    )
    # mlx-lm's own annotations do not agree with what it assigns.
    logits_processors: Any
    _current_tokens: Any
    _current_logprobs: Any
    _next_tokens: Any
    _next_logprobs: Any

    def extend(self, batch: Any) -> None:
        """More rows."""
        super().extend(batch)  # type: ignore[no-untyped-call]
        self._plain = None

    def filter(self, keep: list[int]) -> None:
        """Fewer rows: those at the places `keep`."""
        super().filter(keep)
        self._plain = None

    def _step(self) -> tuple[list[int], list[Any]]:
        """Start the next step; the tokens of the one before, and log-probabilities (None where nobody wants them)."""
        plain = self._plain if self._plain is not None else self._sort_out()
        attention: AbstractContextManager[None] = self.attention or nullcontext()
        if any(self.logits_processors):
            with attention:
                return super()._step()
        inputs, current = self._next_tokens, self._next_logprobs
        with attention:
            logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        for cache in plain[1:]:
            if cache._idx == plain[0]._idx:  # noqa: SLF001 (as many tokens)
                cache.offset = plain[0].offset  # its own sum is never asked for, and so never computed
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

    def _sort_out(self) -> list[Any]:
        """After rows have come or gone: which caches are plain ones, and is there padding in them?"""
        plain = [cache for cache in self.prompt_cache if type(cache) in _PLAIN]
        kind: type[BatchKVCache] = UnpaddedKVCache
        if plain and any(plain[0].left_padding.tolist()):
            kind = BatchKVCache if self.attention is None else PaddedKVCache
        for cache in plain:
            cache.__class__ = kind
            cache.attention = self.attention
        self._plain = plain
        return plain
