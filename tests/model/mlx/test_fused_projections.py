"""Fused projections: the same outputs as the layers that they replace, and which layers are left alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.model.mlx.random_models import make_model, prompt
from worker.mlx.fused_projections import fuse_projections

TOKENS = mx.array([prompt(1, 9), prompt(2, 9)])


def num_bytes(model: Any) -> int:
    weights: Any = tree_flatten(model.parameters())
    return sum(weight.nbytes for _, weight in weights)


def quantized(bits: int, **others: int) -> Any:
    """A model with layers of so many bits, or by the end of their name."""
    model = make_model("llama")

    def how(path: str, layer: Any) -> bool | dict[str, Any]:
        own = next((each for name, each in others.items() if path.endswith(name)), bits)
        return hasattr(layer, "to_quantized") and {"group_size": 32, "bits": own, "mode": "affine"}

    nn.quantize(model, class_predicate=how)
    return model


@pytest.mark.parametrize("make", [lambda: make_model("llama"), lambda: quantized(4)], ids=["plain", "4 bits"])
def test_the_logits_are_the_same(make: Any) -> None:
    """Two groups in each of three layers; the weights take as much memory as before."""
    model = make()
    expected, before = model(TOKENS), num_bytes(model)
    mx.eval(expected)
    assert fuse_projections(model) == 6
    assert mx.allclose(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert num_bytes(model) == before


def test_memory_while_fusing() -> None:
    """The weights of one block are in memory twice, not those of all."""
    model = make_model("llama")
    block_bytes = num_bytes(model.layers[0])
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fuse_projections(model)
    assert mx.get_active_memory() + mx.get_cache_memory() <= before + block_bytes // 2
    assert mx.get_peak_memory() <= before + 2 * block_bytes


def test_layers_with_biases() -> None:
    """The biases are fused too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 5, bias=True), nn.Linear(8, 7, bias=True)

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            return self.gate_proj(x), self.up_proj(x)

    block = Block()
    x = mx.random.normal((3, 8))
    expected = block(x)
    mx.eval(expected)
    assert fuse_projections(block) == 1
    assert all(mx.allclose(a, b, atol=1e-6) for a, b in zip(block(x), expected, strict=True))
    assert block.up_proj.weight.shape == (7, 8)
    with pytest.raises(AttributeError, match="nothing"):
        _ = block.up_proj.nothing


def test_layers_that_differ() -> None:
    """Layers of different precision, and such with an adapter, are left alone."""
    assert fuse_projections(quantized(4, v_proj=8, up_proj=8)) == 0
    model = make_model("llama")
    linear_to_lora_layers(model, 3, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    assert fuse_projections(model) == 3


def test_layers_that_are_not_called_together() -> None:
    """A model that calls only some of a group, or each with its own input, gets each layer's own output."""
    model = make_model("llama")
    attention = model.layers[0].self_attn
    x, y = mx.random.normal((1, 2, 32)), mx.random.normal((1, 2, 32))
    expected = [attention.q_proj(x), attention.q_proj(y), attention.k_proj(x), attention.v_proj(y)]
    mx.eval(expected)
    fuse_projections(model)
    found = [attention.q_proj(x), attention.q_proj(y), attention.k_proj(x), attention.v_proj(y)]
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_a_layer_that_is_called_again() -> None:
    """With the same input, before the others of its group: it gets its own output."""
    model = make_model("llama")
    mlp = model.layers[0].mlp
    x = mx.random.normal((1, 2, 32))
    expected = [mlp.gate_proj(x), mlp.gate_proj(x), mlp.up_proj(x)]
    mx.eval(expected)
    fuse_projections(model)
    found = [mlp.gate_proj(x), mlp.gate_proj(x), mlp.up_proj(x)]
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))
