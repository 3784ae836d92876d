"""The attention of prompts on CUDA, computed on a CPU: the same as MLX's own, in parts or at once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from worker.mlx.backends.prompt_attention import PromptAttention, attention

ROWS, HEADS, KEY_HEADS, SIZE = 3, 6, 2, 8


def inputs(num_queries: int, num_keys: int) -> list[mx.array]:
    """Queries, keys and values."""
    shapes = [(ROWS, HEADS, num_queries, SIZE), *[(ROWS, KEY_HEADS, num_keys, SIZE)] * 2]
    return [mx.random.normal(shape, key=mx.random.key(number)) for number, shape in enumerate(shapes)]


def mask_of(num_queries: int, num_keys: int, starts: list[int]) -> mx.array:
    """Causal, without the keys before each row's start: (rows, 1, queries, keys)."""
    queries, keys = mx.arange(num_keys - num_queries, num_keys)[:, None], mx.arange(num_keys)[None]
    return ((queries >= keys)[None] & (keys[None] >= mx.array(starts)[:, None, None]))[:, None]


@pytest.mark.parametrize("max_scores", [1, 100, 7 * HEADS * 13, 2 * 7 * HEADS * 13, 10**9])
@pytest.mark.parametrize("kind", ["rows", "shared", "heads"])
def test_attention_in_parts(max_scores: int, kind: str) -> None:
    """Parts of a row, of several rows, and everything at once; a mask for each row, for all, and for each head."""
    q, k, v = inputs(7, 13)
    mask = mask_of(7, 13, [0, 5, 2])
    if kind == "shared":
        mask = mask[0, 0]
    elif kind == "heads":
        mask = mx.broadcast_to(mask, (ROWS, HEADS, 7, 13))
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    found = attention(q, k, v, mask=mask, scale=0.3, max_scores=max_scores)
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, atol=1e-5)


class Recorded:
    """Stands for MLX's own attention and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_calls = 0
        self._mlx_attention: Any = mx.fast.scaled_dot_product_attention
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.num_calls += 1
        return self._mlx_attention(*arguments, **options)


@pytest.mark.parametrize(
    ("dtype", "mask", "max_small", "is_mlx"),
    [
        (mx.bfloat16, "causal", 0, True),  # cuDNN computes large pieces
        (mx.bfloat16, "causal", 10**9, False),
        (mx.float32, "causal", 0, False),  # cuDNN does not compute these
        (mx.bfloat16, "array", 0, False),
        (mx.bfloat16, "additive", 0, True),
        (mx.bfloat16, None, 0, True),
    ],
)
def test_which_attention(
    dtype: mx.Dtype, mask: str | None, max_small: int, *, is_mlx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large pieces without a mask array are MLX's, as are masks of other kinds; the result is the same. Afterwards all is as before."""
    recorded = Recorded(monkeypatch)
    q, k, v = (each.astype(dtype) for each in inputs(7, 13))
    given: Any = mask
    if mask in ("array", "additive"):
        given = mask_of(7, 13, [0, 5, 2])
        given = mx.where(given, 0.0, -1e9).astype(dtype) if mask == "additive" else given
    expected = recorded._mlx_attention(q, k, v, scale=0.3, mask=given)
    with PromptAttention(10**9, max_small):
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=given)
    assert recorded.num_calls == (1 if is_mlx else 0)
    assert mx.allclose(found, expected, atol=1e-5 if dtype == mx.float32 else 0.03)
    assert mx.fast.scaled_dot_product_attention is recorded


def test_lengths() -> None:
    """Large pieces end at a multiple of 256 and are padded to one; small ones are neither."""
    made = PromptAttention(10**9, max_small_scores=32 * 1000 * 1000)
    assert made.rounded_down(2048, 0) == 2048
    assert made.rounded_down(2811, 0) == 2048
    assert made.rounded_down(2811, 256) == 1792
    assert made.rounded_down(300, 0) == 256
    assert made.rounded_down(2048, 100) == 1948
    assert made.rounded_down(60, 0) == 60
    assert made.rounded_up(1, 1000, 1000) == 1000
    assert made.rounded_up(1, 1001, 1001) == 1024
    assert made.rounded_up(1, 1024, 4096) == 1024
    assert made.rounded_up(8, 300, 1000) == 512


def test_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an operator has turned it off in MLX, large pieces are computed in parts, too."""
    monkeypatch.setenv("MLX_CUDA_USE_CUDNN_SDPA", "0")
    recorded = Recorded(monkeypatch)
    q, k, v = (each.astype(mx.bfloat16) for each in inputs(7, 13))
    with PromptAttention(10**9, max_small_scores=0):
        found = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
    assert recorded.num_calls == 0
    expected = recorded._mlx_attention(q, k, v, scale=0.3, mask="causal")
    assert mx.allclose(found, expected, atol=0.03)
