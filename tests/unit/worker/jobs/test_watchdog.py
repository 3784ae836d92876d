"""The watchdog's decision: which thread's work has taken too long."""

from __future__ import annotations

import pytest

from worker.jobs.watchdog import find_stalled
from worker.loop.progress import Progress, Work


def test_work_of_any_thread_can_stall() -> None:
    """The first thread whose work exceeds the limit is found, with its job; at the limit it is not yet stalled."""
    now_mono = 10.0
    generation = Progress("generation", lambda: now_mono)
    intake = Progress("intake", lambda: now_mono)
    with generation.on("step"):
        now_mono = 15.0
        with intake.on("prompt", "a"):
            assert find_stalled((generation, intake), 5.0, 15.0) is None
            assert find_stalled((generation, intake), 5.0, 15.1) == (generation, Work("step", 10.0))
        with intake.on("prompt", "b"):
            assert find_stalled((intake,), 5.0, 20.1) == (intake, Work("prompt", 15.0, "b"))


def test_work_that_raised_is_over() -> None:
    """A thread that waits, or whose work raised, cannot stall."""
    progress = Progress("intake", lambda: 0.0)
    assert find_stalled((progress,), 1.0, 100.0) is None
    with pytest.raises(ValueError, match="template"), progress.on("prompt", "a"):
        raise ValueError("template")
    assert find_stalled((progress,), 1.0, 100.0) is None
