"""A takeover in the middle of real text: whoever goes on writes what the first worker would have written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.harness.pool import Pool
from bench.load.streams import Load, Stream
from tests.redis.pool_of_workers import wait_until

NUM_TOKENS = 120
ASKED = (
    ("Write a story about a lighthouse.", {"temperature": 0}),
    ("What is the capital of France?", {"temperature": 0}),
    ("Write a story about a lighthouse.", {"temperature": 1.0, "top_p": 0.9, "seed": 7}),
    ("Tell me about the sea.", {"temperature": 0, "repetition_penalty": 1.3}),
)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool() as running:
        yield running


def test_text_is_the_same(pool: Pool, demo_folder: Path) -> None:
    """Greedy, seeded, penalised, with a stop string: after a kill -9 each text equals that of an undisturbed run."""
    worker = ["worker", "--model", str(demo_folder), "--name", "demo", "--log-level", "WARNING"]
    pool.start_worker(worker, "demo", "first")
    pool.start_api()
    load = Load(pool.url, "demo")

    def ask() -> list[Stream]:
        requests = [load.request(prompt, NUM_TOKENS, **options) for prompt, options in ASKED]
        return [Stream(request, keep_text=True) for request in requests]

    undisturbed = load.run(ask())
    assert [stream.error for stream in undisturbed] == [None] * len(ASKED)
    disturbed = ask()
    long = [stream for stream, (prompt, _) in zip(disturbed, ASKED, strict=True) if "capital" not in prompt]
    thread = threading.Thread(target=load.run, args=(disturbed,))
    pool.start_worker(worker, "demo", "second")
    thread.start()
    wait_until(lambda: all(stream.num_chunks >= 3 for stream in disturbed))
    pool.process("first").kill()
    wait_until(lambda: all(stream.num_chunks >= 10 for stream in long))
    pool.process("second").kill()  # now all that are not whole were on a worker that died
    pool.start_worker(worker, "demo", "third")
    thread.join(120)
    assert [stream.error for stream in disturbed] == [None] * len(ASKED)
    assert [stream.text for stream in disturbed] == [stream.text for stream in undisturbed]
    assert all(max(stream.gaps_seconds) > 1.0 for stream in long), "nothing was taken over"
