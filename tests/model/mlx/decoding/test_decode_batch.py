"""The decode batch: its leaner step generates the same tokens as mlx-lm's own batch."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from common.settings import Settings
from tests.model.mlx.reference import greedy_job, mlx_lm_token_ids
from worker.mlx.engine import MLXEngine
from worker.mlx.memory import memory_share

EVEN = [list(range(100, 120)), list(range(200, 220))]
SHORT = list(range(300, 309))


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), max_batch=4, prompt_cache_gb=0))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_padding_comes_and_goes(engine: MLXEngine, penalty: float) -> None:
    """A shorter prompt joins two of one length, and leaves: masks come and go, all tokens are mlx-lm's.

    The newcomer may have a logits processor, which does not affect the others.
    """
    found: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    unpadded: list[bool] = []

    def step() -> None:
        for token in engine.step():
            found[token.job_id].append(token.token_id)  # type: ignore[union-attr]  # no echo is asked for
        if caches := engine._batch.decoding.caches:
            unpadded.append(all(cache.make_mask(1) is None for cache in caches))

    for job_id, prompt in zip("ab", EVEN, strict=True):
        engine.insert(greedy_job(job_id, prompt, 18), prompt, [])
    while len(found["a"]) < 6:
        step()
    assert unpadded[-1]
    engine.insert(greedy_job("c", SHORT, 6, repetition_penalty=penalty), SHORT, [])
    while len(found["c"]) < 5:
        step()
    assert not unpadded[-1]
    while engine.num_sequences:
        step()
    assert unpadded[-1]
    for job_id, prompt in zip("ab", EVEN, strict=True):
        assert found[job_id] == mlx_lm_token_ids(engine, prompt, 18)
    if penalty == 1.0:
        assert found["c"] == mlx_lm_token_ids(engine, SHORT, 6)


def test_memory_is_wired_only_if_asked(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default nothing sets MLX's wired limit, mlx-lm included, on a machine that recommends one; else it is set once."""
    limits: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 2**34})
    monkeypatch.setattr(memory_share, "_device_info", mx.device_info)
    for wired_limit in (False, True):
        engine = MLXEngine(Settings(model=str(demo_folder), wired_limit=wired_limit, prompt_cache_gb=0))
        engine.insert(greedy_job("a", SHORT, 2), SHORT, [])
        while engine.num_sequences:
            engine.step()
        assert limits == [2**34] * wired_limit
