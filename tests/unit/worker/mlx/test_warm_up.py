"""Warm-up with dummy sequences: they join and leave as clients' sequences do, and the worker starts even if it fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.unit.worker.loop.scripted import ScriptedEngine
from worker.loop.engine import InsertResult, ModelInfo, StepEvent
from worker.mlx.warm_up import warm_up


class RecordingEngine(ScriptedEngine):
    """Records the jobs that were inserted, and the number of sequences in each step."""

    def __init__(self, max_batch: int = 8) -> None:
        super().__init__()
        self.info = ModelInfo(context_length=1000, vocab_size=10, max_batch=max_batch)
        self.jobs: list[Any] = []
        self.batch_sizes: list[int] = []

    def insert(self, job: Any, prompt: list[int], replay: list[int]) -> InsertResult:
        self.jobs.append(job)
        assert self.num_sequences < self.info.max_batch
        assert all(0 <= token_id < self.info.vocab_size for token_id in prompt)
        return super().insert(job, prompt, replay)

    def step(self) -> list[StepEvent]:
        self.batch_sizes.append(self.num_sequences)
        return super().step()


def test_sequences_join_late_and_leave_one_by_one() -> None:
    """Prompts differ in length and sequences in how they are sampled; the engine is empty afterwards."""
    engine = RecordingEngine()
    warm_up(engine, on_gpu=True)
    assert engine.num_sequences == 0
    assert len({len(job.prompt.token_ids) for job in engine.jobs}) == len(engine.jobs) == 6
    steps = engine.batch_sizes
    assert steps[0] < max(steps) == 6
    assert sorted(set(steps[steps.index(6) :]), reverse=True) == [6, 5, 4, 3, 2, 1]
    assert {job.sampling.temperature for job in engine.jobs} == {0.0, 1.0}
    assert any(job.top_logprobs is not None for job in engine.jobs)


def test_two_sequences_on_a_cpu() -> None:
    """Two padded sequences, then one alone: there is no more to compile, and a CPU is slow."""
    engine = RecordingEngine()
    warm_up(engine, on_gpu=False)
    assert engine.num_sequences == 0
    assert len({len(job.prompt.token_ids) for job in engine.jobs}) == len(engine.jobs) == 2
    assert engine.batch_sizes[0] == 2
    assert engine.batch_sizes[-1] == 1
    assert len(engine.batch_sizes) < 8


def test_a_batch_of_one() -> None:
    """A model that decodes one sequence at a time gets one at a time."""
    engine = RecordingEngine(max_batch=1)
    warm_up(engine, on_gpu=True)
    assert engine.num_sequences == 0
    assert set(engine.batch_sizes) == {1}
    assert len(engine.jobs) == 6  # one after another


@pytest.mark.parametrize("where", ["insert", "step"])
def test_a_failure_is_logged(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """The worker starts anyway, with no sequence left in the engine."""
    engine = RecordingEngine()
    if where == "step":
        engine.step_error = RuntimeError("no such kernel")
    else:
        engine.refused["warm-up-4"] = RuntimeError("no such kernel")
    with caplog.at_level(logging.INFO):
        warm_up(engine, on_gpu=True)
    assert engine.num_sequences == 0
    assert "no such kernel" in caplog.text
    assert "warmed up in" not in caplog.text


def test_sequences_that_never_finish(caplog: pytest.LogCaptureFixture) -> None:
    """The warm-up gives up on an engine that generates no tokens."""
    engine = RecordingEngine()
    engine.is_prefilling = True
    with caplog.at_level(logging.ERROR):
        warm_up(engine, on_gpu=True)
    assert engine.num_sequences == 0
    assert "have not finished" in caplog.text
