"""Fused projections: a model's query, key and value projections as one matrix product, and its gate and up projections as another.

Called by `worker.mlx.model` after it has loaded a model. A decode step launches fewer operations; the weights are the same, row for row. The
layers stay where the model's code looks for them: each returns its part of the product that the first one has computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that receive the same input, in the order in which models call them."""


def fuse_projections(model: Any) -> int:
    """Fuse the projections of all blocks in which they are plain or equally quantized linear layers.

    At most one block's weights are in memory twice at a time.

    Returns:
        How many groups were fused.
    """
    num_fused = 0
    blocks = [(module, names) for module in model.modules() for names in GROUPS if names[0] in module]
    for module, names in blocks:
        layers = [module.get(name) for name in names]
        if not _can_fuse(layers):
            continue
        fused = _Fused(layers)
        mx.eval(fused.layer.parameters())
        for index, name in enumerate(names):
            setattr(module, name, FusedPart(fused, index))
        module["_".join(["fused", *names])] = fused.layer  # among the model's parameters
        num_fused += 1
        del layers, fused
        mx.clear_cache()  # else MLX keeps the memory of the layers that were replaced
    return num_fused


def _can_fuse(layers: list[Any]) -> bool:
    first = layers[0]
    if type(first) not in (Linear, QuantizedLinear) or len({id(layer) for layer in layers}) < len(layers):
        return False
    return all(type(layer) is type(first) and _description(layer) == _description(first) for layer in layers)


def _description(layer: Any) -> Any:
    """What layers that are fused have in common: everything but the number of outputs."""
    arrays = {
        name: (each.shape[1:], each.dtype) for name, each in layer.items() if isinstance(each, mx.array)
    }
    return arrays, [getattr(layer, name, None) for name in ("group_size", "bits", "mode")]


class _Fused:
    """The product of a group of layers. It is computed for the first of them, and kept until each has taken its part.

    A model that does not call all of them with the same input gets each layer's own product.

    Attributes:
        layer: A layer with the outputs of all, one after the other.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layer = _with_arrays(layers[0], lambda name: mx.concatenate([layer[name] for layer in layers]))
        ends = [0]
        for layer in layers:
            ends.append(ends[-1] + layer.weight.shape[0])
        self._ends = ends
        self._input: Any = None
        self._parts: dict[int, mx.array] = {}
        self._is_split = False

    def part(self, index: int, x: mx.array) -> mx.array:
        """The outputs of one of the layers."""
        if self._is_split:
            product: mx.array = self.own_layer(index)(x)
            return product
        if x is not self._input or index not in self._parts:
            if self._parts:
                self._input, self._parts, self._is_split = None, {}, True
                return self.part(index, x)
            self._input = x
            self._parts = dict(enumerate(mx.split(self.layer(x), self._ends[1:-1], axis=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return part

    def own_layer(self, index: int) -> Any:
        """One of the layers, whose arrays are views of the fused ones."""
        begin, end = self._ends[index], self._ends[index + 1]
        return _with_arrays(self.layer, lambda name: self.layer[name][begin:end])


def _with_arrays(layer: Any, array: Callable[[str], mx.array]) -> Any:
    """A copy of a layer with other arrays, by name."""
    copied = copy.copy(layer)
    for name, each in layer.items():
        if isinstance(each, mx.array):
            copied[name] = array(name)
    return copied


class FusedPart:
    """One of the layers of a group: called as the layer that it replaces, and with its attributes."""

    def __init__(self, fused: _Fused, index: int) -> None:
        self._fused = fused
        self._index = index

    def __call__(self, x: mx.array) -> mx.array:
        return self._fused.part(self._index, x)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these before there is a `_fused`
            raise AttributeError(name)
        return getattr(self._fused.own_layer(self._index), name)
