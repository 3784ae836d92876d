"""A takeover in the middle of real text: the next worker writes what the first one would have written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.harness.pool import Pool
from bench.load.streams import Load, Stream
from tests.redis.pool_of_workers import wait_until

Prompt = tuple[str, dict[str, Any]]

GREEDY: Prompt = ("Write a story about a lighthouse.", {"temperature": 0})
SEEDED: Prompt = ("Write a story about a lighthouse.", {"temperature": 1.0, "top_p": 0.9, "seed": 7})
SHORT: Prompt = ("What is the capital of France?", {"temperature": 0})
PENALIZED: Prompt = ("Tell me about the sea.", {"temperature": 0, "repetition_penalty": 1.3})


class RealPool:
    """A pool of real workers, and the same requests sent to it again and again."""

    def __init__(self, pool: Pool, model_folder: Path) -> None:
        self.pool = pool
        self._command = ["worker", "--model", str(model_folder), "--name", "demo", "--log-level", "WARNING"]

    def start_worker(self, role: str) -> None:
        self.pool.start_worker(self._command, "demo", role)

    def kill_when(self, role: str, streams: list[Stream], num_chunks: int) -> None:
        """SIGKILL a worker once each stream has so many chunks."""
        wait_until(lambda: all(stream.num_chunks >= num_chunks for stream in streams))
        self.pool.process(role).kill()

    @contextmanager
    def streams(self, prompts: list[Prompt], num_tokens: int) -> Iterator[list[Stream]]:
        """Streams that run during the block; at its end they are waited for and none may have failed."""
        load = Load(self.pool.url, "demo")
        requests = [load.request(text, num_tokens, **options) for text, options in prompts]
        streams = [Stream(request, keep_text=True) for request in requests]
        thread = threading.Thread(target=load.run, args=(streams,))
        thread.start()
        try:
            yield streams
        finally:
            thread.join(120)
        assert [stream.error for stream in streams] == [None] * len(prompts)


@pytest.fixture
def real(demo_folder: Path) -> Iterator[RealPool]:
    """One worker of the demo model, named `first`, behind the API."""
    with Pool() as pool:
        running = RealPool(pool, demo_folder)
        running.start_worker("first")
        pool.start_api()
        yield running


def test_text_after_a_kill(real: RealPool) -> None:
    """A greedy and a seeded text: after a kill -9 of the worker that has both, each equals the text of an undisturbed run."""
    prompts = [GREEDY, SEEDED]
    with real.streams(prompts, 40) as undisturbed:
        pass
    with real.streams(prompts, 40) as disturbed:
        real.kill_when("first", disturbed, 3)
        real.start_worker("second")
    assert all(max(stream.gaps_seconds) > 1.0 for stream in disturbed), "nothing was taken over"
    assert [stream.text for stream in disturbed] == [stream.text for stream in undisturbed]


@pytest.mark.heavy
def test_long_texts_after_two_kills(real: RealPool) -> None:
    """Greedy, seeded and penalized, long and short: each text is the undisturbed run's after two takeovers of the long ones."""
    prompts = [GREEDY, SHORT, SEEDED, PENALIZED]
    with real.streams(prompts, 120) as undisturbed:
        pass
    real.start_worker("second")
    with real.streams(prompts, 120) as disturbed:
        long = [stream for stream, prompt in zip(disturbed, prompts, strict=True) if prompt is not SHORT]
        wait_until(lambda: all(stream.num_chunks >= 3 for stream in disturbed))
        real.kill_when("first", long, 3)
        real.kill_when("second", long, 10)  # whichever worker a stream was on, it died
        real.start_worker("third")
    assert all(max(stream.gaps_seconds) > 1.0 for stream in long), "nothing was taken over"
    assert [stream.text for stream in disturbed] == [stream.text for stream in undisturbed]
