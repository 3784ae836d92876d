"""mlx-lm's batch of decoding rows, with less to do in each step.

A decode step of a small model on a GPU takes as long as the CPU needs to feed it: each operation costs some ten microseconds,
however little it computes. Here a step has fewer of them than in mlx-lm 0.32 (on a CPU too: `mlx_cpu`), and rows come and go
without new arrays of all others (`mlx_slots`); what is computed is the same. `mlx_batch` puts this batch into its `BatchGenerator`, and imports it
late, since it imports MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch
from mlx_lm.models.cache import BatchKVCache

from worker.mlx.backends.cpu_ops import FusedCpuOps
from worker.mlx.backends.cuda_attention import PaddedAttention
from worker.mlx.kv_slots import SlotKVCache, moves_to
from worker.mlx.prompt_batch import JoiningBatch

_MAX_MOVES = 8
"""Copies of neighbouring rows into slots of others; instead of more there are new buffers."""


class DecodingBatch(GenerationBatch):
    """See the module. Rows with logits processors take mlx-lm's own way but for masks, all rows of the batch with them.

    1. Only rows that ask get a view of their log-probabilities; mlx-lm makes one for every row.
    2. All layers count the same tokens: they share one count, instead of adding to one each.
    3. Rows without padding need no mask, others have on CUDA an attention of their own.
    4. Layers that keep every token have slots for their rows, of which one can come or go alone.
    5. Where all layers do, newcomers have no step of their own: the last tokens of their prompts are read in the step that all
       take.
    6. On a CPU the model's own operations are fewer.

    Attributes:
        wants_logprobs: By uid: whether a row's log-probabilities are looked at. Set before there are rows.
        max_rows: There will be. Set before there are rows.
        attention: Of padded rows; None: MLX's own.
        fewer: For MLX's CPU back-end; None elsewhere.
    """

    wants_logprobs: Callable[[int], bool]
    max_rows: int
    attention: PaddedAttention | None = None
    fewer: FusedCpuOps | None = None
    # mlx-lm's own annotations do not agree with what it assigns.
    logits_processors: Any
    _current_tokens: Any
    _current_logprobs: Any
    _next_tokens: Any
    _next_logprobs: Any
    _matchers: list[Any]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # By uid of a row that has joined and not taken a step: what is to watch its tokens then.
        self._newcomers: dict[int, Any] = {}

    @property
    def _slots(self) -> list[SlotKVCache]:
        return [cache for cache in self.prompt_cache if isinstance(cache, SlotKVCache)]

    def extend(self, batch: Any) -> None:
        """More rows."""
        if isinstance(batch, JoiningBatch):
            self._newcomers |= dict(zip(batch.uids, batch.matchers, strict=True))
        if not self.uids:
            batch.prompt_cache = [
                SlotKVCache(cache, self.max_rows, self.attention) if type(cache) is BatchKVCache else cache
                for cache in batch.prompt_cache
            ]
        super().extend(batch)  # type: ignore[no-untyped-call]
        self._count()

    def filter(self, keep: list[int]) -> None:
        """Fewer rows: those at the places `keep`, perhaps in another order."""
        slots, order = self._slots, _order(keep)
        moves = moves_to(order)
        if not keep or len(moves) > _MAX_MOVES or any(cache.is_wasteful(keep) for cache in slots):
            order = keep
        elif moves:
            mx.async_eval([copied for cache in slots for copied in cache.lift(moves)])
        super().filter(order)
        self._count()

    def _count(self) -> None:
        slots = self._slots
        for cache in slots:
            cache.count(None if cache is slots[0] else slots[0])
        if self._next_tokens is not None:
            # Else they were computed as a part of the next step, and known only when that has ended.
            mx.async_eval(self._next_tokens)

    def next(self) -> list[GenerationBatch.Response]:
        """A token of each row, but for those that have just joined."""
        newcomers, self._newcomers = self._newcomers, {}
        responses = super().next()
        if not newcomers:
            return responses
        self._matchers = [newcomers.get(uid, own) for uid, own in zip(self.uids, self._matchers, strict=True)]
        return [response for response in responses if response.uid not in newcomers]

    def _step(self) -> tuple[list[int], list[Any]]:
        """Start the next step; the tokens of the one before, and log-probabilities (None where nobody wants them)."""
        slots = self._slots
        if any(self.logits_processors):
            with self._operations(slots):
                return super()._step()
        inputs, current = self._next_tokens, self._next_logprobs
        with self._operations(slots):
            logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        for cache in slots[1:]:
            if cache._idx == slots[0]._idx:  # noqa: SLF001 (as many tokens)
                cache.offset = slots[0].offset  # its own sum is never asked for, and so never computed
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

    @contextmanager
    def _operations(self, slots: list[SlotKVCache]) -> Iterator[None]:
        """What the model is computed with."""
        if self.fewer is not None and slots:
            self.fewer.expect(slots[0].offset)
        with self.fewer or nullcontext(), self.attention or nullcontext():
            yield


def _order(keep: list[int]) -> list[int]:
    """The same rows, with as few as possible in other places than before: the last ones go where others have left."""
    stay = {row for row in keep if row < len(keep)}
    last = (row for row in keep if row >= len(keep))
    return [row if row in stay else next(last) for row in range(len(keep))]
