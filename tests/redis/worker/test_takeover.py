"""Takeover against real servers: exactly once, in few round trips, and what becomes of each kind of job."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
from redis.connection import AbstractConnection

from common import connections, names
from common.protocol import Delta, Failed, Finished, Usage, encode
from common.rq import JsonJob, JsonQueue
from tests.redis.pool_of_workers import Workers
from worker.jobs import takeover as takeover_module
from worker.jobs.takeover import DeadExecution, Plan, Takeover


@pytest.fixture
def workers(redis_url: str) -> Iterator[Workers]:
    with Workers(redis_url) as pool:
        yield pool


def queue_of(workers: Workers) -> JsonQueue:
    return JsonQueue("m", connection=workers.client)


def make_takeover(queue: JsonQueue, *, max_seconds: float = 60.0) -> Takeover:
    return Takeover(queue, live_ttl_seconds=60, final_ttl_seconds=60, max_seconds=max_seconds)


def abandon(workers: Workers, num_jobs: int, **options: Any) -> list[str]:
    """Make jobs that RQ counts as running, on dead workers."""
    queue = queue_of(workers)
    jobs = [workers.submit(**options) for _ in range(num_jobs)]
    for job in jobs:
        workers.client.lrem(queue.key, 1, job)
        workers.client.hset(JsonJob.key_for(job), "status", "started")
        workers.client.zadd(queue.started_job_registry.key, {f"{job}:dead": time.time() + 3600})
        workers.client.zadd(f"rq:executions:{job}", {"dead": time.time() + 3600})
    return jobs


def test_two_takeovers_at_once(workers: Workers) -> None:
    """Two workers that take over the same jobs at the same moment: each job is in the queue once, with one crash counted."""
    jobs = abandon(workers, 50)
    barrier = Barrier(2)

    def take_over() -> None:
        with connections.connect(workers.url) as client:
            takeover = make_takeover(JsonQueue("m", connection=client))
            barrier.wait()
            while takeover.run() == 0.0:
                pass

    threads = [Thread(target=take_over) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue = queue_of(workers)
    assert sorted(queue.job_ids) == sorted(jobs)
    assert {JsonJob.fetch(job, connection=workers.client).retries_left for job in jobs} == {2}
    assert {workers.client.hget(JsonJob.key_for(job), "mlxpool_strikes") for job in jobs} == {b"1"}
    assert workers.client.zcard(queue.started_job_registry.key) == 0


def test_many_jobs_cost_as_many_round_trips_as_one(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of jobs is taken over in two round trips, besides the reads of every look."""
    takeover = make_takeover(queue_of(workers))
    takeover.run()  # RQ asks once for the server's version
    abandon(workers, 1)
    takeover.run()
    num_sent = 0
    send = AbstractConnection.send_packed_command

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal num_sent
        num_sent += 1
        send(self, *arguments, **options)

    abandon(workers, takeover_module.JOBS_PER_BATCH)
    monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
    takeover.run()
    # The registry, the leases, the jobs, the decisions, and the intermediate queue.
    assert num_sent == 5


def test_a_job_that_changes_meanwhile_is_looked_at_again(workers: Workers) -> None:
    """The journal grows between reading a job and writing the decision: nothing is written, and the next look decides anew."""

    class Slow(Takeover):
        is_first = True

        def _plan(self, dead: DeadExecution) -> Plan:
            if self.is_first:
                self.is_first = False
                event = encode(Finished(1, "stop", Usage(1, 0)))
                workers.client.xadd(names.journal(job), {"x": "a", "d": event}, id="1-0")
            return super()._plan(dead)

    [job] = abandon(workers, 1, retries=0)
    takeover = Slow(queue_of(workers), live_ttl_seconds=60, final_ttl_seconds=60, max_seconds=60.0)
    assert takeover.run() == 0.0
    assert queue_of(workers).job_ids == []
    assert takeover.run() == math.inf
    assert queue_of(workers).job_ids == [
        job
    ]  # for RQ's bookkeeping, though it has no retries: its answer is complete
    assert len(workers.journal(job)) == 1


def test_long_takeovers_let_heartbeats_through(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow network one look ends after the batch for which it has time, and says that more is left."""
    monkeypatch.setattr(takeover_module, "JOBS_PER_BATCH", 1)
    jobs = abandon(workers, 3)
    queue = queue_of(workers)
    takeover = make_takeover(queue, max_seconds=0.0)
    for num_back in (1, 2):
        assert takeover.run() == 0.0
        assert queue.count == num_back
    assert takeover.run() == math.inf
    assert sorted(queue.job_ids) == sorted(jobs)


def test_a_client_that_has_left(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    """A job whose client left before its worker died is deleted, and the log does not claim that it continues."""
    [job] = abandon(workers, 1)
    workers.client.set(names.cancelled(job), 1)
    with caplog.at_level(logging.WARNING):
        make_takeover(queue_of(workers)).run()
    assert caplog.messages == [f"job {job}: its worker died or hung; its client has left, so it is deleted"]
    assert queue_of(workers).job_ids == []
    assert not JsonJob.exists(job, connection=workers.client)


def test_no_takeovers_left(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    """A job without retries fails in RQ, and its journal and channel get one terminal event, after its tokens."""
    [job] = abandon(workers, 1, retries=0)
    workers.client.xadd(names.journal(job), {"x": "a", "d": encode(Delta(1, 1, " 1"))}, id="1-0")
    with caplog.at_level(logging.WARNING):
        make_takeover(queue_of(workers)).run()
    assert caplog.messages == [f"job {job}: its worker died or hung; no takeovers are left, so it fails"]
    assert workers.status(job) == "failed"
    last = workers.journal(job)[-1]
    assert isinstance(last, Failed)
    assert (last.n, last.code) == (2, "worker_lost")
    workers.listen()
    assert workers.events[job] == [last]


def test_one_bad_job_of_a_batch(workers: Workers) -> None:
    """A job whose queue entry cannot be written, or that is invalid, does not keep the others of its batch from being taken over."""
    good, bad = abandon(workers, 2)
    workers.client.delete(names.journal(bad))
    workers.client.set(names.journal(bad), "no stream")
    make_takeover(queue_of(workers)).run()
    assert queue_of(workers).job_ids == [good]
    assert workers.client.zcard(queue_of(workers).started_job_registry.key) == 0


NESTED = b'["x",1,"m",500,"k",null,null,null,' + b"[" * 100_000 + b"]" * 100_000 + b"]"
"""An event with a further field that no recursive decoder can skip."""


def append_nested_event(workers: Workers, job: str) -> None:
    workers.client.xadd(names.journal(job), {"x": "", "d": NESTED})


@pytest.mark.parametrize(
    "field",
    [
        {"dependency_ids": "5"},
        {"dependency_ids": "[[1]]"},
        {"dependency_ids": '["\\ud800"]'},
        {"failure_ttl": "9" * 21, "retries_left": "0"},
        {"timeout": "9" * 400},
    ],
)
def test_a_bad_field_does_not_stop_a_takeover(workers: Workers, field: dict[str, str]) -> None:
    """A job with a field that RQ or Redis would fail on leaves the registry; the others of its batch are requeued."""
    bad, *good = abandon(workers, 3)
    workers.client.hset(JsonJob.key_for(bad), mapping=dict(field))
    assert make_takeover(queue_of(workers)).run() == math.inf
    assert sorted(queue_of(workers).job_ids) == sorted(good)
    assert workers.client.zcard(queue_of(workers).started_job_registry.key) == 0


def test_a_nested_event_does_not_stop_a_takeover(workers: Workers) -> None:
    """Nor does a journal that is nested more deeply than the decoder can follow."""
    bad, *good = abandon(workers, 3)
    append_nested_event(workers, bad)
    assert make_takeover(queue_of(workers)).run() == math.inf
    assert sorted(queue_of(workers).job_ids) == sorted(good)


def test_an_unforeseen_error_is_the_jobs_own(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a library raises while one job is planned, the others are requeued."""
    bad, *good = abandon(workers, 3)
    put_back = JsonQueue.put_back

    def fail_for_one(queue: JsonQueue, job: Any, *arguments: Any) -> None:
        if job.id == bad:
            raise TypeError("unforeseen")
        put_back(queue, job, *arguments)

    monkeypatch.setattr(JsonQueue, "put_back", fail_for_one)
    make_takeover(queue_of(workers)).run()
    assert sorted(queue_of(workers).job_ids) == sorted(good)
    assert "unforeseen" in caplog.text


def test_executions_key_of_another_type(workers: Workers) -> None:
    """A job whose list of executions has another type is requeued like any other."""
    [job] = abandon(workers, 1)
    workers.client.delete(f"rq:executions:{job}")
    workers.client.set(f"rq:executions:{job}", "no sorted set")
    make_takeover(queue_of(workers)).run()
    assert queue_of(workers).job_ids == [job]


def test_queue_of_another_type(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    """While the queue's key has another type nothing is lost: the entry stays in the registry, and a later look requeues the job."""
    [job] = abandon(workers, 1)
    queue = queue_of(workers)
    workers.client.set(queue.key, "no list")
    takeover = make_takeover(queue)
    takeover.run()
    assert "its takeover failed" in caplog.text
    assert workers.client.zcard(queue.started_job_registry.key) == 1
    workers.client.delete(queue.key)
    takeover.run()
    assert queue.job_ids == [job]


def test_a_rejected_command_is_logged_for_its_job(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A command that Redis rejects is an error of its job, with its name; the takeover of the others is complete."""
    bad, *good = abandon(workers, 3)
    put_back = JsonQueue.put_back

    def reject_for_one(queue: JsonQueue, job: Any, pipe: Any, ttl_seconds: int) -> None:
        put_back(queue, job, pipe, 2**63 - 1 if job.id == bad else ttl_seconds)

    monkeypatch.setattr(JsonQueue, "put_back", reject_for_one)
    assert make_takeover(queue_of(workers)).run() == math.inf
    assert set(good) <= set(queue_of(workers).job_ids)
    [record] = [record for record in caplog.records if "its takeover failed" in record.message]
    assert bad in record.message
