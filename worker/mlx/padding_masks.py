"""Models whose attention does not accept the mask of padded sequences.

Called by `worker.mlx.model` after it has loaded a model. mlx-lm 0.32's Gemma 2 computes its attention by itself, with an axis for the query
heads of each key head that its masks lack: sequences of different lengths raise an error there or, with as many sequences as key heads,
see the padding of others.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma2


class _PaddedAttention(gemma2.Attention):
    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if isinstance(mask, mx.array) and mask.ndim == 4:  # noqa: PLR2004 (sequences, heads, queries, keys)
            mask = mask[:, :, None]
        output: mx.array = super().__call__(x, mask, cache)
        return output


def accept_padding_masks(model: Any) -> None:
    """Let the model's attention accept masks (sequences, 1, queries, keys)."""
    for module in model.modules():
        if type(module) is gemma2.Attention and module.repeats > 1:
            module.__class__ = _PaddedAttention
