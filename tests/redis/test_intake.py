"""Intake against real servers: how a burst is shared out, and prompts that are too long for some workers of a model."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from common import names
from common.protocol import Delta, Failed, Finished
from common.rq import JsonJob
from tests.redis.pool_of_workers import Workers, exact, wait_until
from worker.jobs.intake import TAKE_SHARE

LONG = " ".join("x" * 100)
"""A prompt of 100 tokens of the synthetic worker."""


@pytest.fixture
def workers(redis_url: str) -> Iterator[Workers]:
    with Workers(redis_url) as pool:
        yield pool


@pytest.mark.parametrize(
    ("num_workers", "num_waiting", "num_slots", "num_taken"),
    [
        (2, 1, 31, 0),  # it has one of two already: of four requests, none gets three
        (2, 3, 31, 1),
        (2, 15, 31, 7),
        (1, 3, 31, 3),
        (1, 15, 4, 4),
        (0, 0, 31, 0),
        (3, 1, 31, 0),
    ],
)
def test_share_of_a_burst(
    workers: Workers, num_workers: int, num_waiting: int, num_slots: int, num_taken: int
) -> None:
    """A worker that has just taken one job takes more only up to its share of all, that one included, in order."""
    if num_workers:
        workers.client.sadd("workers", *range(num_workers))
    jobs = [b"%d" % i for i in range(num_waiting)]
    if jobs:
        workers.client.rpush("queue", *jobs)
    taken: Any = workers.client.eval(TAKE_SHARE, 3, "queue", "intermediate", "workers", num_slots, 1)
    assert taken == jobs[:num_taken]
    assert workers.client.lrange("intermediate", 0, -1) == jobs[:num_taken]
    assert workers.client.lrange("queue", 0, -1) == jobs[num_taken:]


def test_share_without_a_job_of_its_own(workers: Workers) -> None:
    """A worker that leaves the first job to others takes one of the others even if only one waits."""
    workers.client.sadd("workers", "a", "b")
    workers.client.rpush("queue", "job")
    taken: Any = workers.client.eval(TAKE_SHARE, 3, "queue", "intermediate", "workers", 31, 0)
    assert taken == [b"job"]


def test_long_prompts_go_to_the_worker_with_room(workers: Workers) -> None:
    """Of two workers with unequal contexts, the one with the shorter context passes on prompts that are too long for it; no one is refused or tried again."""
    workers.start("m", 100, "--context-length", "50")
    workers.start("m", 100, "--context-length", "1000")
    long = [workers.submit(text=LONG) for _ in range(6)]
    short = [workers.submit() for _ in range(6)]
    wait_until(lambda: workers.has_ended(*long, *short))
    assert {workers.text(job) for job in (*long, *short)} == {exact(20)}
    wait_until(lambda: workers.status(long[-1]) == "finished")
    assert {JsonJob.fetch(job, connection=workers.client).retries_left for job in long} == {3}
    wait_until(lambda: workers.free_slots() == [32, 32])


def test_long_prompts_wait_for_the_only_worker_with_room(workers: Workers) -> None:
    """While the worker with room is full, a long prompt waits in the queue, and another worker, though it has one slot only,
    serves those behind it.
    """
    workers.start("m", 100, "--context-length", "10000", max_batch=1)
    blocking = workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(blocking))
    workers.start("m", 100, "--context-length", "50", max_batch=1)
    long = workers.submit(text=LONG)
    min_context = (JsonJob.key_for(long), "mlxpool_min_context")
    wait_until(lambda: workers.client.hget(*min_context) == b"51")
    short = [workers.submit() for _ in range(3)]
    wait_until(lambda: workers.has_ended(*short))
    assert not workers.events[long]
    workers.cancel(blocking)
    wait_until(lambda: workers.has_ended(long))
    assert workers.text(long) == exact(20)


def test_without_a_worker_with_room_a_long_prompt_is_refused(workers: Workers) -> None:
    """No live worker has room: the client gets the error of a prompt that is too long, also if a card in Redis is garbage."""
    workers.start("m", 100, "--context-length", "50")
    workers.client.zadd(names.WORKER_CARDS, {"garbage": time.time()})
    workers.client.set(names.worker_card("garbage"), "no hash")
    long = workers.submit(text=LONG)
    wait_until(lambda: workers.has_ended(long))
    failed = workers.terminal(long)
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code) == (400, "context_length_exceeded")


def test_takeover_by_a_worker_without_room(workers: Workers) -> None:
    """An answer that has begun is not the client's fault: with a worker that has room it continues, without one it is a 503."""
    victim = workers.start("m", 100, "--context-length", "1000")
    jobs = [workers.submit(text=LONG, max_tokens=n) for n in (150, 5000)]
    wait_until(lambda: workers.has_token(*jobs))
    workers.start("m", 100, "--context-length", "50")
    second = workers.start("m", 100, "--context-length", "1000")
    victim.send(signal.SIGKILL)
    wait_until(lambda: workers.has_ended(jobs[0]), seconds=30)
    assert isinstance(workers.terminal(jobs[0]), Finished)
    assert workers.text(jobs[0]) == exact(150)
    second.send(signal.SIGKILL)
    wait_until(lambda: workers.has_ended(jobs[1]), seconds=30)
    failed = workers.terminal(jobs[1])
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code) == (503, "worker_lost")
    *tokens, last = workers.journal(jobs[1])
    assert last == failed
    assert all(isinstance(event, Delta) for event in tokens)
