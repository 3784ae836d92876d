"""The attention kernel of compiled steps: its self-test, its block shapes, what it supports and, on CUDA, its results."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.model.mlx.backends.wrong_attention import KIND, WrongAttention
from worker.mlx.backends.append_attention import (
    CudaAppendAttention,
    FunctionalAppendAttention,
    block_shape,
    self_test,
)
from worker.mlx.backends.attention_kernel import LANES, MAX_KEYS

ONLY_CUDA = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs MLX's CUDA back-end")


def test_the_self_test(caplog: pytest.LogCaptureFixture) -> None:
    """It finds a kernel that raises, and one that does not write the new keys."""
    assert self_test(FunctionalAppendAttention(), KIND)
    assert not caplog.records
    assert not self_test(WrongAttention(raises=True), KIND)
    assert "no such architecture" in caplog.text
    assert not self_test(WrongAttention(raises=False), KIND)
    assert "differs by" in caplog.text


def test_few_rows_get_more_blocks() -> None:
    """One query head a block, and more threads over long buffers; many rows share the keys of a head."""
    assert block_shape(8, 4, 256) == (1, 256)
    assert block_shape(8, 4, 2048) == (1, 512)
    assert block_shape(128 * 8, 4, 2048) == (4, 256)
    assert block_shape(2, 7, 256) == (1, 256)
    assert block_shape(100, 16, 2048) == (8, 256)


def test_what_the_kernel_supports() -> None:
    """One query a row, head dimensions with a number of lanes, one type, and buffers up to a length."""
    attention = FunctionalAppendAttention() if not mx.cuda.is_available() else CudaAppendAttention()
    q, k = mx.zeros((2, 4, 1, 64), mx.float16), mx.zeros((2, 2, 256, 64), mx.float16)
    assert attention.supports(q, k, k)
    assert not attention.supports(mx.zeros((2, 4, 3, 64), mx.float16), k, k)
    if not isinstance(attention, CudaAppendAttention):
        return
    assert not attention.supports(q.astype(mx.float32), k, k)
    assert not attention.supports(q, k, mx.zeros((2, 2, 256, 80), mx.float16))
    long = mx.zeros((2, 2, MAX_KEYS + 1, 64), mx.float16)
    assert not attention.supports(q, long, long)


@ONLY_CUDA
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dim", list(LANES))
def test_the_kernel(dtype: mx.Dtype, dim: int) -> None:
    """The results of all variants are those of MLX's operations, and they write the new keys and values."""
    attention = CudaAppendAttention()
    for num_key_heads, repeats in ((2, 1), (1, 12)):
        queries = mx.zeros((2, num_key_heads * repeats, 1, dim), dtype)
        keys = mx.zeros((2, num_key_heads, 264, dim), dtype)
        assert attention.supports(queries, keys, keys)
