"""The worker's batch of decoding rows: with fewer operations in a step, the same tokens as mlx-lm's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.settings import Settings
from tests.model.reference import greedy_job, of_mlx_lm
from worker.mlx.engine import MLXEngine

EVEN = [list(range(100, 120)), list(range(200, 220))]
SHORT = list(range(300, 309))


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), max_batch=4, prompt_cache_gb=0))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_padding_comes_and_goes(engine: MLXEngine, penalty: float) -> None:
    """A shorter prompt joins two of one length, and leaves: masks come and go, all tokens are mlx-lm's.

    Also where the newcomer has a logits processor, with which the whole batch takes mlx-lm's own step.
    """
    found: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    unpadded: list[bool] = []

    def step() -> None:
        for token in engine.step():
            found[token.job_id].append(token.token_id)  # type: ignore[union-attr]  # no echo is asked for
        batch = engine._generator._generator._generation_batch  # type: ignore[union-attr]  # this model can batch
        if len(batch):
            unpadded.append(all(cache.make_mask(1) is None for cache in batch.prompt_cache))

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
        assert found[job_id] == of_mlx_lm(engine, prompt, 18)
    if penalty == 1.0:
        assert found["c"] == of_mlx_lm(engine, SHORT, 6)


def test_a_batch_is_closed_before_the_next(engine: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step that failed: mlx-lm's next batch takes the wired limit that it finds for the one to give back."""
    failed, closed = engine._generator, []

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(failed, "next", fail)
    monkeypatch.setattr(failed, "close", lambda: closed.append(engine._generator is failed))
    engine.insert(greedy_job("a", SHORT, 6), SHORT, [])
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    assert closed == [True]
    assert engine.num_sequences == 0
    engine.insert(greedy_job("b", SHORT, 6), SHORT, [])
    found: list[int] = []
    while engine.num_sequences:
        found += [token.token_id for token in engine.step()]  # type: ignore[union-attr]  # no echo is asked for
    assert found == of_mlx_lm(engine, SHORT, 6)
