"""Converts a GGUF file's weights to safetensors, with MLX's own reader.

Called by `worker.models.demo_model`, which knows the names and the tokenizer; nothing else loads GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """A GGUF file's metadata as Python values; arrays become lists, scalars numbers."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    _, metadata = loaded
    return {
        key: value if isinstance(value, str | list) else value.tolist() for key, value in metadata.items()
    }


def save_gguf_weights(path: Path, target: Path, names: Mapping[str, str], dtype: str) -> None:
    """Write a GGUF file's weights, dequantized, as safetensors.

    Args:
        names: GGUF's part of a name to MLX's: ``attn_q`` to ``self_attn.q_proj``.
        dtype: Such as ``float32``.
    """
    gguf: Any = mx.load(str(path))
    weights = {}
    for name, weight in gguf.items():
        stem, kind = name.rsplit(".", 1)
        if kind in ("scales", "biases"):
            continue
        scales = gguf.get(stem + ".scales")
        if scales is not None:
            # mx.load (mlx 0.32) packs GGUF's blocks into uint32, each with its own scale and bias.
            group_size = 32
            bits = weight.shape[-1] * 32 // (scales.shape[-1] * group_size)
            weight = mx.dequantize(weight, scales, gguf[stem + ".biases"], group_size=group_size, bits=bits)  # noqa: PLW2901
        weights[f"{_mlx_name(stem, names)}.{kind}"] = weight.astype(getattr(mx, dtype))
    mx.save_safetensors(str(target), weights, metadata={"format": "mlx"})


def _mlx_name(stem: str, names: Mapping[str, str]) -> str:
    """``blk.3.attn_q`` as ``model.layers.3.self_attn.q_proj``."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    return f"model.layers.{block[1]}.{names[block[2]]}" if block else f"model.{names[stem]}"
