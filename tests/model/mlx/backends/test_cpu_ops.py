"""Fused CPU ops compute what MLX computes, rotations and norms bit for bit, in fewer operations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache

from common.settings import Settings
from tests.model.mlx.reference import greedy_job
from worker.mlx.backends.cpu_ops import FusedCpuOps
from worker.mlx.engine import MLXEngine

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU has kernels for these")

TYPES = [mx.float32, mx.bfloat16]
OWN = mx.fast.rope, mx.fast.rms_norm, mx.fast.scaled_dot_product_attention


@pytest.fixture(scope="module")
def fused() -> FusedCpuOps:
    """One instance for all tests, as in a worker."""
    return FusedCpuOps()


def random(*shape: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def num_operations(*arrays: mx.array, into: Path) -> int:
    """The number of operations in the graph of these arrays."""
    mx.export_to_dot(str(into / "graph.dot"), *arrays)
    return len(re.findall(r'label ?="[A-Z]', (into / "graph.dot").read_text()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [64, 32])
@pytest.mark.parametrize("has_freqs", [False, True])
@pytest.mark.parametrize("is_expected", [False, True])
def test_rotary_embeddings(
    fused: FusedCpuOps,
    dtype: mx.Dtype,
    *,
    traditional: bool,
    dims: int,
    has_freqs: bool,
    is_expected: bool,
) -> None:
    """For all variants, one row and several, and part of a head; cached angles are used only with the options they were computed for."""
    freqs = mx.arange(1, dims // 2 + 1).astype(mx.float32) ** 2
    for num_rows in (1, 3):
        offset = mx.arange(num_rows) * 701 + 5
        if is_expected:
            fused.expect(offset)
        with fused:
            for scale in (1.0, 0.25, 1.0):
                for num_heads in (9, 3):
                    x = random(num_rows, num_heads, 1, 64, dtype=dtype, seed=num_heads)
                    options: dict[str, Any] = {"traditional": traditional, "scale": scale, "offset": offset}
                    options |= {"base": None, "freqs": freqs} if has_freqs else {"base": 1e5}
                    found, wanted = mx.fast.rope(x, dims, **options), OWN[0](x, dims, **options)
                    assert found.dtype == wanted.dtype
                    assert mx.array_equal(found, wanted)


@pytest.mark.parametrize(("dims", "base"), [(72, 1e4), (80, 6e5), (96, 1.5e5), (120, 5e6)])
def test_large_positions(fused: FusedCpuOps, dims: int, base: float) -> None:
    """With other head dimensions, where rounding shows; different bases have separate cached angles."""
    offset = mx.array([8191, 5])
    x = random(2, 3, 1, dims, dtype=mx.float32)
    fused.expect(offset)
    with fused:
        for each in (base, 1e4, base):
            options: dict[str, Any] = {"traditional": False, "base": each, "scale": 1.0, "offset": offset}
            assert mx.array_equal(mx.fast.rope(x, dims, **options), OWN[0](x, dims, **options))


def test_norms_of_unsupported_shapes(fused: FusedCpuOps) -> None:
    """Weights of a wrong length are refused, also after correct ones; a norm over one element is computed by MLX."""
    x = random(3, 1, 64, dtype=mx.float32)
    with fused:
        mx.fast.rms_norm(x, mx.ones((64,)), 1e-5)
        with pytest.raises(ValueError, match="weight"):
            mx.fast.rms_norm(x, mx.ones((32,)), 1e-5)
        assert mx.array_equal(mx.fast.rms_norm(x[..., :1], None, 1e-5), OWN[1](x[..., :1], None, 1e-5))


def test_angles_are_cached_for_one_offset(fused: FusedCpuOps) -> None:
    """Another offset, even an equal array or one modified in place, has its own angles; so does the next context."""
    x = random(2, 3, 1, 64, dtype=mx.float32)
    options: dict[str, Any] = {"traditional": False, "base": 1e4, "scale": 1.0}
    expected, other = mx.array([4, 9]), mx.array([4, 9])
    fused.expect(expected)
    with fused:
        mx.fast.rope(x, 64, offset=expected, **options)
        mx.fast.rope(x, 64, offset=other, **options)
        other += 1
        assert mx.array_equal(
            mx.fast.rope(x, 64, offset=other, **options), OWN[0](x, 64, offset=mx.array([5, 10]), **options)
        )
    expected += 1
    with fused:
        assert mx.array_equal(
            mx.fast.rope(x, 64, offset=expected, **options),
            OWN[0](x, 64, offset=mx.array([5, 10]), **options),
        )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_norms(fused: FusedCpuOps, dtype: mx.Dtype, eps: float) -> None:
    """With and without weights, of three and four dimensions."""
    for shape in ((1, 1, 576), (3, 1, 9, 64)):
        x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
        with fused:
            assert mx.array_equal(mx.fast.rms_norm(x, weight, eps), OWN[1](x, weight, eps))
            assert mx.array_equal(mx.fast.rms_norm(x, None, eps), OWN[1](x, None, eps))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_key_heads", [9, 3, 1])
@pytest.mark.parametrize("has_mask", [False, True])
def test_attention(fused: FusedCpuOps, dtype: mx.Dtype, num_key_heads: int, *, has_mask: bool) -> None:
    """With one query per row, keys shared by one or more query heads, with and without padding."""
    for num_rows in (1, 3):
        queries = random(num_rows, 9, 1, 64, dtype=dtype)
        keys, values = (random(num_rows, num_key_heads, 70, 64, dtype=dtype, seed=seed) for seed in (1, 2))
        padding = mx.arange(1, num_rows + 1)[:, None] * 11
        mask = (mx.arange(70)[None, :] >= padding)[:, None, None] if has_mask else None
        with fused:
            found = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.125, mask=mask)
        wanted = OWN[2](queries, keys, values, scale=0.125, mask=mask)
        assert found.dtype == wanted.dtype
        assert mx.allclose(found, wanted, rtol=1e-6 if dtype == mx.float32 else 1e-2, atol=1e-6)


def test_unsupported_calls_are_forwarded_to_mlx(fused: FusedCpuOps) -> None:
    """Several tokens per row, one position for all rows, additive masks, sinks, another stream."""
    x = random(2, 9, 5, 64, dtype=mx.float32)
    options: dict[str, Any] = {"traditional": False, "base": 1e4, "scale": 1.0}
    keys = random(2, 3, 70, 64, dtype=mx.float32, seed=1)
    masks: list[Any] = [
        random(2, 9, 5, 70, dtype=mx.float32, seed=2),
        "causal",
        random(2, 9, 5, 70, dtype=mx.float32) > 0,
    ]
    with fused:
        assert mx.array_equal(
            mx.fast.rope(x, 64, offset=mx.array([1, 2]), **options),
            OWN[0](x, 64, offset=mx.array([1, 2]), **options),
        )
        assert mx.array_equal(
            mx.fast.rope(x[:, :, :1], 64, offset=7, **options), OWN[0](x[:, :, :1], 64, offset=7, **options)
        )
        assert mx.array_equal(
            mx.fast.rope(x[0], 64, offset=7, **options), OWN[0](x[0], 64, offset=7, **options)
        )
        for mask in masks:
            found = mx.fast.scaled_dot_product_attention(x, keys, keys, scale=0.1, mask=mask)
            assert mx.array_equal(found, OWN[2](x, keys, keys, scale=0.1, mask=mask))
        for mask in (masks[0][:, :, :1], masks[2][:, :, :1]):
            found = mx.fast.scaled_dot_product_attention(x[:, :, :1], keys, keys, scale=0.1, mask=mask)
            assert mx.array_equal(found, OWN[2](x[:, :, :1], keys, keys, scale=0.1, mask=mask))
        sinks = mx.ones((9,))
        found = mx.fast.scaled_dot_product_attention(x[:, :, :1], keys, keys, scale=0.1, sinks=sinks)
        assert mx.array_equal(found, OWN[2](x[:, :, :1], keys, keys, scale=0.1, sinks=sinks))
        weight = mx.ones((64,))
        assert mx.array_equal(
            mx.fast.rms_norm(x, weight, 1e-5, stream=mx.cpu), OWN[1](x, weight, 1e-5, stream=mx.cpu)
        )


def test_mlx_functions_are_restored(fused: FusedCpuOps) -> None:
    """After the context, and after an error in it."""

    def fail() -> None:
        with fused:
            assert mx.fast.rope is not OWN[0]
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert (mx.fast.rope, mx.fast.rms_norm, mx.fast.scaled_dot_product_attention) == OWN


def test_a_step_takes_fewer_operations(demo_folder: Path, tmp_path: Path) -> None:
    """A decode step of a real model in the worker's batch takes less than three fifths of mlx-lm's operations."""
    engine = MLXEngine(Settings(model=str(demo_folder), max_batch=2, prompt_cache_gb=0))
    for job_id, length in (("a", 20), ("b", 9)):
        engine.insert(
            greedy_job(job_id, list(range(100, 100 + length)), 20), list(range(100, 100 + length)), []
        )
    batch = engine._batch.decoding
    for _ in range(5):
        engine.step()
    assert len(batch.sequences) == 2
    model: Any = batch._model
    counted: list[int] = []

    def count(*arguments: Any, **options: Any) -> Any:
        logits = model(*arguments, **options)
        counted.append(num_operations(logits, into=tmp_path))
        return logits

    batch._model = count
    engine.step()
    engine.step()
    batch._model = model
    inputs = mx.array([[5], [6]])
    caches = [BatchKVCache([0, 11]) for _ in model.layers]
    model(mx.array([list(range(100, 120)), list(range(100, 120))]), cache=caches)
    mx.eval([cache.state for cache in caches])
    num_of_mlx_lm = num_operations(model(inputs, cache=caches), into=tmp_path)
    assert max(counted) < 0.6 * num_of_mlx_lm
