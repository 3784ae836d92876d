"""Intake against real servers: how a burst is shared out, and prompts that are too long for some workers of a model."""

from __future__ import annotations

import json
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any
from unittest.mock import MagicMock

import pytest

from common import names
from common.errors import RequestError
from common.protocol import Delta, Failed, Finished
from common.rq import JsonJob, JsonQueue
from tests.redis.pool_of_workers import Workers, exact, wait_until
from worker.jobs.intake import TAKE_SHARE, Intake, TakenJob
from worker.jobs.prompt_encoder import PromptEncoder

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


def set_channel(workers: Workers, job: str, channel: str) -> None:
    """Write another channel into the job's data."""
    key = JsonJob.key_for(job)
    data: Any = workers.client.hget(key, "data")
    function, instance, arguments, request = json.loads(zlib.decompress(data))
    changed = [function, instance, arguments, request | {"channel": channel}]
    workers.client.hset(key, "data", zlib.compress(json.dumps(changed).encode()))


def test_bad_jobs_at_the_head_of_the_queue(workers: Workers) -> None:
    """Jobs that no worker can decode or answer fail alone: those behind them are served, and the worker keeps running."""
    nested, dependent, surrogate = (workers.submit(retries=0) for _ in range(3))
    event = b'["x",1,"m",500,"k",null,null,null,' + b"[" * 100_000 + b"]" * 100_000 + b"]"
    workers.client.xadd(names.journal(nested), {"x": "", "d": event})
    workers.client.hset(JsonJob.key_for(dependent), "dependency_ids", '["\\ud800"]')
    set_channel(workers, surrogate, "\ud800")
    good = [workers.submit(max_tokens=3) for _ in range(3)]
    worker = workers.start()
    wait_until(lambda: workers.has_ended(*good))
    wait_until(lambda: workers.status(surrogate) == "failed")
    assert worker.process.poll() is None
    wait_until(lambda: workers.free_slots() == [32])


def make_intake(
    workers: Workers, num_slots: int, encode: Callable[[Any], list[int]] = list, **options: Any
) -> Intake:
    """An intake of a worker with a context of 100 tokens, one of two workers of the queue."""
    executions = MagicMock()
    executions.queue, executions.connection = JsonQueue("m", connection=workers.client), workers.client
    slots: SimpleQueue[None] = SimpleQueue()
    for _ in range(num_slots):
        slots.put(None)
    prompts = PromptEncoder(executions, encode, 100)
    defaults = {"admit": MagicMock(), "draining": bool, "holding_off": bool, "num_workers": lambda: 2}
    return Intake(executions, slots=slots, prompts=prompts, **(defaults | options))


def add_worker_with_room(workers: Workers) -> None:
    workers.client.zadd(names.WORKER_CARDS, {"big": time.time()})
    workers.client.hset(names.worker_card("big"), mapping={"id": "m", "context_length": 1000})
    workers.client.sadd("rq:workers:m", "big", "small")


def test_short_jobs_behind_many_long_ones(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with few slots reaches the short jobs behind more long ones than it has slots; those stay in order."""
    long = [workers.submit() for _ in range(10)]
    short = [workers.submit() for _ in range(2)]
    for job in long:
        workers.client.hset(JsonJob.key_for(job), "mlxpool_min_context", 101)
    add_worker_with_room(workers)
    intake = make_intake(workers, 2)
    kept: list[str] = []

    def register(taken: list[TakenJob]) -> int:
        kept.extend(each.raw_id.decode() for each in taken)
        return 0

    monkeypatch.setattr(intake, "_register", register)
    monkeypatch.setattr("worker.jobs.intake._HOLD_OFF_SECONDS", 0)
    for _ in range(12):
        intake._fill(2)
    assert kept == short
    assert JsonQueue("m", connection=workers.client).job_ids == long


def test_a_failed_requeue_does_not_stop_the_others(workers: Workers) -> None:
    """If requeueing a job that is too long raises anything, its lease runs out, and the job behind it is passed to the loop."""
    add_worker_with_room(workers)
    admitted: list[Any] = []

    def encode(request: Any) -> list[int]:
        if request.job_id == "long":
            raise RequestError("too long", status=400, code="context_length_exceeded")
        return [1]

    intake = make_intake(workers, 2, encode=encode, admit=admitted.append)
    intake._executions.requeue.side_effect = TypeError("unforeseen")  # type: ignore[attr-defined]
    registered = [
        MagicMock(journal=[], is_poison_candidate=False, raw_id=name.encode()) for name in ("long", "short")
    ]
    for each, name in zip(registered, ("long", "short"), strict=True):
        each.request.job_id, each.job.data, each.execution.id = name, b"x", f"{name} execution"
    assert intake._hand_over(registered, set()) == 1
    assert [admit.job.job_id for admit in admitted] == ["short"]
    intake._executions.forget.assert_called_once_with("long execution")  # type: ignore[attr-defined]


def test_a_requeue_without_a_lease_is_not_logged_as_one(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    """If another worker took the job over meanwhile, nothing was requeued, and the log does not say so; the job is forgotten here."""
    caplog.set_level("INFO")
    add_worker_with_room(workers)
    executions = MagicMock()
    executions.queue, executions.connection = JsonQueue("m", connection=workers.client), workers.client
    executions.requeue.return_value = False

    def encode(_request: Any) -> list[int]:
        raise RequestError("too long", status=400, code="context_length_exceeded")

    assert PromptEncoder(executions, encode, 100).encode(MagicMock(journal=[])) is None
    assert "requeued" not in caplog.text
    executions.forget.assert_called_once()
