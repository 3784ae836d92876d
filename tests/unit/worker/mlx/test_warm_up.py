"""Rows for nobody: they come and go as users' rows do, and what goes wrong with them stops nobody."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.unit.worker.loop.scripted import ScriptedEngine
from worker.loop.engine import InsertResult, ModelInfo, StepEvent
from worker.mlx.warm_up import warm_up


class Watched(ScriptedEngine):
    """Remembers what was inserted, and how many rows each step had."""

    def __init__(self, max_batch: int = 8) -> None:
        super().__init__()
        self.info = ModelInfo(context_length=1000, vocab_size=10, max_batch=max_batch)
        self.jobs: list[Any] = []
        self.num_rows_by_step: list[int] = []

    def insert(self, job: Any, prompt: list[int], replay: list[int]) -> InsertResult:
        self.jobs.append(job)
        assert self.num_sequences < self.info.max_batch
        assert all(0 <= token_id < self.info.vocab_size for token_id in prompt)
        return super().insert(job, prompt, replay)

    def step(self) -> list[StepEvent]:
        self.num_rows_by_step.append(self.num_sequences)
        return super().step()


def test_rows_come_late_and_leave_one_by_one() -> None:
    """Prompts differ in length, ways to choose tokens in kind; nothing is left behind."""
    engine = Watched()
    warm_up(engine, on_gpu=True)
    assert engine.num_sequences == 0
    assert len({len(job.prompt.token_ids) for job in engine.jobs}) == len(engine.jobs) == 6
    steps = engine.num_rows_by_step
    assert steps[0] < max(steps) == 6
    assert sorted(set(steps[steps.index(6) :]), reverse=True) == [6, 5, 4, 3, 2, 1]
    assert {job.sampling.temperature for job in engine.jobs} == {0.0, 1.0}
    assert any(job.top_logprobs is not None for job in engine.jobs)


def test_two_rows_on_a_cpu() -> None:
    """Padded, together and then one alone: there is no more to compile, and a CPU is slow."""
    engine = Watched()
    warm_up(engine, on_gpu=False)
    assert engine.num_sequences == 0
    assert len({len(job.prompt.token_ids) for job in engine.jobs}) == len(engine.jobs) == 2
    assert engine.num_rows_by_step[0] == 2
    assert engine.num_rows_by_step[-1] == 1
    assert len(engine.num_rows_by_step) < 8


def test_a_batch_of_one() -> None:
    """A model that takes one row at a time gets one."""
    engine = Watched(max_batch=1)
    warm_up(engine, on_gpu=True)
    assert engine.num_sequences == 0
    assert set(engine.num_rows_by_step) == {1}
    assert len(engine.jobs) == 6  # one after another


@pytest.mark.parametrize("where", ["insert", "step"])
def test_a_failure_is_logged(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """The worker starts all the same, with no row left."""
    engine = Watched()
    if where == "step":
        engine.step_error = RuntimeError("no such kernel")
    else:
        engine.refused["warm-up-4"] = RuntimeError("no such kernel")
    with caplog.at_level(logging.INFO):
        warm_up(engine, on_gpu=True)
    assert engine.num_sequences == 0
    assert "no such kernel" in caplog.text
    assert "warmed up in" not in caplog.text


def test_rows_that_never_end(caplog: pytest.LogCaptureFixture) -> None:
    """An engine that gives no tokens is not waited for."""
    engine = Watched()
    engine.is_reading = True
    with caplog.at_level(logging.ERROR):
        warm_up(engine, on_gpu=True)
    assert engine.num_sequences == 0
    assert "have not ended" in caplog.text
