"""Attention of padded sequences: by the kernel if the mask is the padding mask, by MLX itself otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from common.settings import Settings
from tests.model.mlx.reference import greedy_job, mlx_lm_token_ids
from worker.mlx.backends.attention_kernel import MAX_KEYS, fits
from worker.mlx.backends.cuda_attention import (
    CheckedKernel,
    CudaKernel,
    PaddedAttention,
    cuda_kernel,
    self_test,
)
from worker.mlx.engine import MLXEngine

PROMPTS = [list(range(100, 120)), list(range(200, 209)), list(range(300, 315))]
NUM_TOKENS = 12
ONLY_CUDA = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs MLX's CUDA back-end")


class ReferenceKernel:
    """A `Kernel` in MLX's own operations that counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def supports(self, queries: mx.array, _keys: mx.array, _values: mx.array) -> bool:
        return queries.shape[2] == 1

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, start: mx.array, scale: float
    ) -> mx.array:
        self.num_calls += 1
        repeats = queries.shape[1] // keys.shape[1]
        keys, values = mx.repeat(keys, repeats, axis=1), mx.repeat(values, repeats, axis=1)
        scores = scale * queries @ keys.swapaxes(-1, -2)
        is_there = mx.arange(keys.shape[2])[None, :] >= start[:, None]
        return mx.softmax(mx.where(is_there[:, None, None, :], scores, -mx.inf), axis=-1) @ values


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), max_batch=4, prompt_cache_gb=0))


def generated(engine: MLXEngine, prompts: list[list[int]], penalty: float = 1.0) -> list[list[int]]:
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for job_id, prompt in zip(found, prompts, strict=True):
        factor = penalty if job_id == "0" else 1.0
        engine.insert(greedy_job(job_id, prompt, NUM_TOKENS, repetition_penalty=factor), prompt, [])
    while engine.num_sequences:
        for event in engine.step():
            found[event.job_id].append(event.token_id)  # type: ignore[union-attr]  # no echo is asked for
    return list(found.values())


@pytest.fixture
def kernel(engine: MLXEngine) -> Iterator[ReferenceKernel]:
    """The kernel of the engine's padded sequences during a test."""
    made = ReferenceKernel()
    batch = engine._batch.decoding
    before, batch.attention = batch.attention, PaddedAttention(made)
    yield made
    batch.attention = before


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_padded_sequences_use_the_kernel(engine: MLXEngine, kernel: ReferenceKernel, penalty: float) -> None:
    """All layers use it, also next to a sequence with a logits processor; the tokens are those of a sequence decoded alone."""
    own = mx.fast.scaled_dot_product_attention
    found = generated(engine, PROMPTS, penalty)
    assert mx.fast.scaled_dot_product_attention is own
    assert kernel.num_calls >= 30 * (
        NUM_TOKENS - 1
    )  # a sequence's first decode step computes its prompt's last token
    assert found[1:] == [mlx_lm_token_ids(engine, prompt, NUM_TOKENS) for prompt in PROMPTS[1:]]
    if penalty == 1.0:
        assert found[0] == mlx_lm_token_ids(engine, PROMPTS[0], NUM_TOKENS)


def test_sequences_without_padding_do_not_use_the_kernel(engine: MLXEngine, kernel: ReferenceKernel) -> None:
    """They need no mask, and use MLX's own attention."""
    generated(engine, [PROMPTS[0], PROMPTS[0][::-1]])
    assert kernel.num_calls == 0


def test_other_masks_use_mlx() -> None:
    """With a mask that the model made, with sinks, and without a mask, the result is MLX's."""
    kernel = ReferenceKernel()
    attention = PaddedAttention(kernel)
    own = mx.fast.scaled_dot_product_attention
    q, k = mx.random.normal((2, 4, 1, 64)), mx.random.normal((2, 2, 7, 64))
    start = mx.array([0, 3])
    mask = (mx.arange(7)[None, :] >= start[:, None])[:, None, None, :]
    with attention:
        attention.expect(mask, start)
        for options in ({"mask": mask[..., :]}, {"mask": None}, {"mask": mask, "sinks": mx.zeros(4)}):
            found = mx.fast.scaled_dot_product_attention(q, k, k, scale=0.125, **options)
            assert mx.allclose(found, own(q, k, k, scale=0.125, **options))
        assert kernel.num_calls == 0
        found = mx.fast.scaled_dot_product_attention(q, k, k, scale=0.125, mask=mask)
        assert kernel.num_calls == 1
        assert mx.allclose(found, own(q, k, k, scale=0.125, mask=mask), atol=1e-5)
    with attention:  # the mask announced for one step does not count in the next
        mx.fast.scaled_dot_product_attention(q, k, k, scale=0.125, mask=mask)
    assert kernel.num_calls == 1
    assert mx.fast.scaled_dot_product_attention is own


class BrokenKernel(ReferenceKernel):
    """A kernel that raises, as if it could not be compiled, or returns a wrong result."""

    def __init__(self, *, raises: bool) -> None:
        super().__init__()
        self._raises = raises

    def __call__(self, queries: mx.array, *rest: Any) -> mx.array:
        if self._raises:
            raise RuntimeError("no such architecture")
        found = super().__call__(queries, *rest)
        return mx.where(mx.arange(found.shape[0])[:, None, None, None] == 1, mx.nan, found)


def test_a_kernel_that_fails_its_self_test(caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that raises, or whose result differs, is detected and logged."""
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        assert self_test(ReferenceKernel(), dtype, 64, 3)
    assert not caplog.records
    assert not self_test(BrokenKernel(raises=True), mx.float32, 64, 3)
    assert "no such architecture" in caplog.text
    caplog.clear()
    assert not self_test(BrokenKernel(raises=False), mx.float32, 64, 3)
    assert "differs by nan" in caplog.text


def test_the_self_test_runs_once_per_kind_of_arrays(
    engine: MLXEngine, kernel: ReferenceKernel, caplog: pytest.LogCaptureFixture
) -> None:
    """If it fails, sequences use MLX's own attention and get the same tokens; it is logged once."""
    batch = engine._batch.decoding
    batch.attention = PaddedAttention(CheckedKernel(kernel))
    generated(engine, PROMPTS)
    assert kernel.num_calls >= 30 * (NUM_TOKENS - 1)
    assert not caplog.records
    batch.attention = PaddedAttention(CheckedKernel(BrokenKernel(raises=True)))
    assert generated(engine, PROMPTS) == [mlx_lm_token_ids(engine, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert caplog.text.count("cannot be used") == 1


@pytest.mark.parametrize(
    ("queries", "keys", "values", "dtype"),
    [
        ((2, 4, 2, 64), (2, 2, 9, 64), (2, 2, 9, 64), mx.float32),  # two queries
        ((2, 4, 1, 112), (2, 2, 9, 112), (2, 2, 9, 112), mx.float32),  # a size that it has no threads for
        ((2, 4, 1, 128), (2, 2, 9, 128), (2, 2, 9, 64), mx.float32),  # values of another size, as with MLA
        ((1, 4, 1, 64), (2, 2, 9, 64), (2, 2, 9, 64), mx.float32),  # queries for some of the rows
        ((2, 4, 1, 64), (2, 2, MAX_KEYS, 64), (2, 2, MAX_KEYS, 64), mx.float32),
        ((2, 4, 1, 64), (2, 2, 9, 64), (2, 2, 9, 64), mx.float16),  # queries in float32 with these keys
    ],
)
def test_unsupported_arrays_use_mlx(
    queries: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...], dtype: mx.Dtype
) -> None:
    """MLX's own attention computes them."""
    assert not fits(mx.zeros(queries), mx.zeros(keys).astype(dtype), mx.zeros(values).astype(dtype))
    assert fits(mx.zeros((2, 4, 1, 64)), mx.zeros((2, 2, 9, 64)), mx.zeros((2, 2, 9, 64)))


@ONLY_CUDA
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize(
    ("dim", "num_heads", "num_key_heads"),
    [(64, 32, 8), (128, 28, 4), (80, 8, 8), (96, 12, 4), (256, 8, 1), (64, 9, 3), (128, 32, 2)],
)
def test_the_kernel_on_cuda(dtype: mx.Dtype, dim: int, num_heads: int, num_key_heads: int) -> None:
    """It computes the same as MLX with a mask in float32, on arrays with a model's strides."""
    kernel = CudaKernel()
    assert self_test(kernel, dtype, dim, num_heads // num_key_heads)
    tolerance = {mx.bfloat16: 2e-2, mx.float16: 3e-3, mx.float32: 1e-4}[dtype]
    for num_rows, length in ((1, 1), (3, 17), (8, 300), (5, 1000)):
        queries = mx.random.normal((num_rows, 1, num_heads, dim)).astype(dtype).swapaxes(1, 2)
        buffers = mx.random.normal((2, num_rows, num_key_heads, length + 40, dim)).astype(dtype)
        keys, values = buffers[0][:, :, 3 : 3 + length], buffers[1][:, :, 3 : 3 + length]
        start = mx.array([min(length - 1, i * 7 % length) for i in range(num_rows)], dtype=mx.int32)
        mask = (mx.arange(length)[None, :] >= start[:, None])[:, None, None, :]
        wide = [each.astype(mx.float32) for each in (queries, keys, values)]
        wanted = mx.fast.scaled_dot_product_attention(*wide, scale=dim**-0.5, mask=mask)
        assert kernel.supports(queries, keys, values)
        found = kernel(queries, keys, values, start, dim**-0.5)
        assert found.dtype == dtype
        assert mx.abs(found.astype(mx.float32) - wanted).max().item() < tolerance


@ONLY_CUDA
def test_a_worker_on_cuda_uses_the_kernel(demo_folder: Path) -> None:
    """It is active by default."""
    engine: Any = MLXEngine(Settings(model=str(demo_folder), max_batch=4, prompt_cache_gb=0))
    attention = engine._batch.decoding.attention
    assert attention._kernel is cuda_kernel()
    assert all(attention._kernel._passed.values())
