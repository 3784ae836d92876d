"""The model's forward pass in a decode step, compiled at fixed shapes.

Called by `worker.mlx.decoding.decode_batch` for models whose layers all keep their keys and values in slots. On a GPU a decode step of a small model takes
as long as the CPU needs to launch it. A compiled graph is traced once and then replayed without Python, and adjacent elementwise
operations become one launch. All slots are computed, also those without a sequence, and all columns are passed in, so that shapes
change only when buffers grow or shrink: then the forward pass is traced again, which takes some ten milliseconds. Independent of how tokens
are chosen.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from worker.mlx.backends.append_attention import AppendAttention, CudaAppendAttention, Step
from worker.mlx.caches.kv_slots import SlotKVCache

log = logging.getLogger(__name__)

_MAX_TRACES = 64
"""How many traces are kept."""

_NO_SEQUENCE = 2**30
"""The first column of a slot without a sequence: after any that is written."""


class CannotCompileError(Exception):
    """The model's step cannot be compiled: it uses its caches in another way than to attend to them."""


class UnsupportedShapeError(Exception):
    """There is no attention for buffers of this shape, such as very long ones."""


class CompiledForward:
    """See the module. Used on one thread.

    Args:
        attention: Writes a step's keys and values and attends to them.

    Attributes:
        is_supported: False once the forward pass could not be compiled.
    """

    def __init__(self, model: Any, attention: AppendAttention) -> None:
        self._model = model
        self._attention = attention
        # By numbers of slots and columns; None: this shape is not supported.
        self._traces: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._positions: _Positions | None = None
        self.is_supported = True

    def forget_positions(self) -> None:
        """To be called when sequences have joined, left or moved."""
        self._positions = None

    def can_run(self, caches: list[SlotKVCache]) -> bool:
        """Whether `logits` may be called with these caches, one per layer and all with keys."""
        first = caches[0]
        shape = first.num_slots, first.num_columns
        if not self.is_supported or self._traces.get(shape, True) is None:
            return False
        # Layers that were parallel stay so until sequences join, leave or move.
        return self._knows_positions_in(first) or all(map(first.is_parallel_to, caches))

    def logits(self, tokens: mx.array, caches: list[SlotKVCache]) -> mx.array | None:
        """The logits of one step of all slots, (slots, vocab), not evaluated; its keys and values are in the caches.

        Args:
            tokens: Input tokens, (slots,).
            caches: Those for which `can_run`, with a free column.

        Returns:
            None if it turns out that the forward pass cannot be compiled; nothing was changed then.
        """
        shape = caches[0].num_slots, caches[0].num_columns
        try:
            return self._compute(self._forward(shape), tokens, caches)
        except UnsupportedShapeError as error:
            log.debug("decode steps of %d slots and %d columns are not compiled: %s", *shape, error)
            self._traces[shape] = None
            return None
        except CannotCompileError as error:
            log.info("decode steps are not compiled: %s", error)
            self.is_supported = False
            self._traces.clear()
            return None

    def _compute(self, forward: Any, tokens: mx.array, caches: list[SlotKVCache]) -> mx.array:
        first = caches[0]
        positions = self._positions_in(first)
        buffers = [(cache.keys, cache.values) for cache in caches]
        logits: mx.array
        logits, end, written = forward(tokens, positions.start, positions.end, buffers)
        for cache, (keys, values) in zip(caches, written, strict=bool(written)):
            cache.keys, cache.values = keys, values
        for cache in caches:
            cache.advance(1)
        self._positions = _Positions(positions.start, end, first.end)
        return logits

    def _positions_in(self, cache: SlotKVCache) -> _Positions:
        if not self._knows_positions_in(cache):
            free = [_NO_SEQUENCE] * (cache.num_slots - len(cache.starts))
            start = mx.array([*cache.starts, *free], mx.int32)
            self._positions = _Positions(start, mx.array([cache.end], mx.int32), cache.end)
        assert self._positions is not None
        return self._positions

    def _knows_positions_in(self, cache: SlotKVCache) -> bool:
        known = self._positions
        return known is not None and (known.end_column, known.start.shape[0]) == (cache.end, cache.num_slots)

    def _forward(self, shape: tuple[int, int]) -> Any:
        """The compiled forward pass for so many slots and columns; traced at its first call."""
        if shape not in self._traces:
            # One function for each, so that the traces of those that are dropped are freed: MLX never evicts any.
            self._traces[shape] = mx.compile(self._traceable)
            if len(self._traces) > _MAX_TRACES:
                self._traces.popitem(last=False)
        self._traces.move_to_end(shape)
        return self._traces[shape]

    def _traceable(
        self, tokens: mx.array, start: mx.array, end: mx.array, buffers: list[tuple[mx.array, mx.array]]
    ) -> tuple[mx.array, mx.array, list[tuple[mx.array, mx.array]]]:
        """Logits, the next step's `end`, and the buffers with the step's keys and values, unless they are written in place."""
        offset = mx.maximum(end - start, 0)
        caches = [TracedCache(keys, values, start, end, offset) for keys, values in buffers]
        logits = self._traced_logits(tokens, caches)
        return logits, end + 1, [] if self._attention.is_in_place else [cache.buffers for cache in caches]

    def _traced_logits(self, tokens: mx.array, caches: list[TracedCache]) -> mx.array:
        try:
            with self._attending(caches):
                logits: mx.array = self._model(tokens[:, None], cache=caches)[:, -1, :]
        except (CannotCompileError, UnsupportedShapeError):
            raise
        except Exception as error:
            log.debug("the model's step cannot be traced", exc_info=True)
            raise CannotCompileError(f"the model raised {type(error).__name__}: {error}") from error
        if any(cache.is_pending or not cache.is_written for cache in caches):
            raise CannotCompileError("the model computes its attention in its own way")
        return logits

    @contextmanager
    def _attending(self, caches: list[TracedCache]) -> Iterator[None]:
        """Replace MLX's attention while a step is traced."""

        def attend(
            q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
        ) -> mx.array:
            cache = next((each for each in caches if each.is_pending and each.buffers[0] is k), None)
            if cache is None or cache.buffers[1] is not v:
                raise CannotCompileError("the model changes keys or values before its attention")
            if mask is not None or any(option is not None for option in options.values()):
                raise CannotCompileError("its attention has a mask of its own, or further options")
            if not self._attention.supports(q, k, v):
                raise UnsupportedShapeError(
                    f"no kernel for queries {q.shape} and keys {k.shape} of {k.dtype}"
                )
            return cache.append(self._attention, q, scale)

        replaced, mx.fast.scaled_dot_product_attention = mx.fast.scaled_dot_product_attention, attend
        try:
            yield
        finally:
            mx.fast.scaled_dot_product_attention = replaced


class _Positions(NamedTuple):
    """Where the slots' sequences begin and end, on the device.

    Attributes:
        start: (slots,) int32, the first column of each.
        end: (1,) int32, the column that the next step writes.
        end_column: The same on the host.
    """

    start: mx.array
    end: mx.array
    end_column: int


class TracedCache:
    """Stands in for a layer's `SlotKVCache` while a step is traced.

    Attributes:
        buffers: Keys and values, (slots, heads, columns, size) each.
        offset: (slots,) int32, the position of each slot's token.
        is_pending: Whether new keys and values were received and not attended to yet.
        is_written: Whether any were received.
    """

    def __init__(
        self, keys: mx.array, values: mx.array, start: mx.array, end: mx.array, offset: mx.array
    ) -> None:
        self.buffers = keys, values
        self.offset = offset
        self.is_pending = self.is_written = False
        self._start, self._end = start, end
        self._new: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take the new keys and values; `append` writes them."""
        if self.is_written:
            raise CannotCompileError("a layer has more than one update of its cache")
        self._new = keys, values
        self.is_pending = self.is_written = True
        return self.buffers

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> None:  # noqa: N803 (as mlx-lm calls it)
        """None: `AppendAttention` masks columns by itself."""
        if N != 1 or return_array or window_size is not None:
            raise CannotCompileError("a layer needs a mask")

    def append(self, attention: AppendAttention, queries: mx.array, scale: float) -> mx.array:
        """The attention's output; the new keys and values are written."""
        assert self._new is not None
        new_keys, new_values = (
            each.astype(buffer.dtype) for each, buffer in zip(self._new, self.buffers, strict=True)
        )
        output, keys, values = attention(
            Step(queries, new_keys, new_values, *self.buffers, self._start, self._end, scale)
        )
        self.buffers = keys, values
        self.is_pending = False
        return output


def compiled_forward(model: Any) -> CompiledForward | None:
    """A model's compiled forward pass; None if there is no attention for it on this device."""
    return CompiledForward(model, CudaAppendAttention()) if mx.cuda.is_available() else None
