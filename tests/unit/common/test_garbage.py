"""Python's garbage collector in a process that serves: what it scans, and how often."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

import worker.__main__ as entry
from bench.harness.synthetic_worker import SyntheticEngine
from common import connections, garbage
from common.protocol import Delta, TokenLogprob
from worker.loop.engine import StepToken


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Restore the settings of the test process."""
    threshold, switch_seconds = gc.get_threshold(), sys.getswitchinterval()
    yield
    sys.setswitchinterval(switch_seconds)
    gc.set_threshold(*threshold)
    gc.unfreeze()


def num_collections() -> int:
    return gc.get_stats()[0]["collections"]


def test_a_steps_objects_run_no_collection() -> None:
    """Thousands of objects that live until the end of a step run no collection; far more than a step has do."""
    garbage.collect_rarely()
    gc.collect()
    before = num_collections()
    objects = [[i] for i in range(5000)]
    assert num_collections() == before
    objects += [[i] for i in range(20_000)]
    assert num_collections() > before


def test_a_token_is_no_work_for_the_collector() -> None:
    """What is created for each token cannot be part of a cycle, so the collector does not track it."""
    logprob = TokenLogprob(1, -0.5, b"a")
    for each in (
        logprob,
        StepToken("a", 1, "a", None, logprob, [logprob]),
        Delta(1, 1, "a", logprob, [logprob]),
    ):
        assert not gc.is_tracked(each)


def test_a_worker_freezes_what_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the synthetic worker, so that benchmarks show what users get."""

    class Worker:
        def __init__(self, *arguments: object) -> None:
            self.make_engine = arguments[-1]

        def work(self) -> bool:
            assert callable(self.make_engine)
            assert isinstance(self.make_engine(), SyntheticEngine)
            return True

    monkeypatch.setattr(entry, "BatchWorker", Worker)
    monkeypatch.setattr(connections, "check", lambda _: None)
    monkeypatch.setattr(entry.logging, "configure", lambda _: None)
    assert gc.get_freeze_count() == 0
    flags = entry.WorkerFlags("test", "test")
    assert entry.run(flags, lambda _: SyntheticEngine(8, 0.0), ["--name", "m"]) == 0
    assert gc.get_freeze_count() > 1000
    assert gc.get_threshold()[0] > 700
