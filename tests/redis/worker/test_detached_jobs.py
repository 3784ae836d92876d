"""Detached jobs and stored answers on real workers: they outlive their clients, and each end has its time to live."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rq.command import send_stop_job_command

from common import names, retention
from common.protocol import Failed, Finished, Started, Usage
from common.rq import JsonJob, JsonQueue
from tests.redis.pool_of_workers import Workers, exact, wait_until
from worker.jobs.takeover import Takeover

TTL = 40


@pytest.fixture
def workers(redis_url: str) -> Iterator[Workers]:
    with Workers(redis_url) as pool:
        yield pool


def submit(workers: Workers, job_id: str | None = None, **job: Any) -> str:
    """A detached job."""
    return workers.submit(
        job_id=job_id, is_detached=True, final_ttl_seconds=TTL, journals_started=True, **job
    )


def submit_stored(workers: Workers, **job: Any) -> str:
    """A detached job with a stored answer, whose record the API writes together with the job."""
    job_id = secrets.token_hex(12)
    workers.client.hset(names.answer(job_id), mapping={"job_ids": f'["{job_id}"]', "owner": "open"})
    workers.client.expire(names.answer(job_id), 700)
    return submit(workers, job_id, answer_id=job_id, **job)


def test_no_subscriber_is_needed(workers: Workers) -> None:
    """Its channel has no subscriber for longer than the orphan rule allows; the answer is complete, and RQ says so."""
    workers.start(orphan_seconds=1)
    workers.channel = "mlxpool:stream:nobody"
    job_id = submit(workers, max_tokens=120)  # 2.4 s
    wait_until(lambda: any(isinstance(event, Finished) for event in workers.journal(job_id)))
    events = workers.journal(job_id)
    assert (events[0], events[-1]) == (Started(1, 1), Finished(122, "length", Usage(1, 120)))
    assert TTL - 20 < workers.client.ttl(names.journal(job_id)) <= TTL
    wait_until(lambda: workers.status(job_id) == "finished")


def test_a_killed_worker(workers: Workers) -> None:
    """The journal has `Started` once and each token once."""
    workers.channel = "mlxpool:stream:nobody"
    first = workers.start()
    job_id = submit(workers, max_tokens=60)
    wait_until(lambda: len(workers.journal(job_id)) > 10)
    first.process.kill()
    workers.start()
    wait_until(lambda: any(isinstance(event, Finished) for event in workers.journal(job_id)))
    events = workers.journal(job_id)
    assert [event.n for event in events] == list(range(1, 63))
    assert sum(isinstance(event, Started) for event in events) == 1
    assert "".join(getattr(event, "text", "") for event in events) == exact(60)


def test_stopped_by_an_operator(workers: Workers) -> None:
    """RQ's stop-job ends a detached job: its journal says so, and RQ counts it as stopped."""
    workers.start()
    job_id = submit(workers, max_tokens=5000)
    wait_until(lambda: len(workers.journal(job_id)) > 3)
    send_stop_job_command(workers.client, job_id)
    wait_until(lambda: workers.status(job_id) == "stopped")
    end = workers.journal(job_id)[-1]
    assert isinstance(end, Failed)
    assert end.code == "stopped"


def test_a_stored_answer_from_start_to_end(workers: Workers) -> None:
    """Its record lives as long as the job may run, and after the end as long as the job asks, with its real bytes counted."""
    workers.start()
    job_id = submit_stored(workers, max_tokens=50)
    wait_until(lambda: len(workers.journal(job_id)) > 2)
    assert workers.client.ttl(names.answer(job_id)) > retention.MAX_RUN_SECONDS
    wait_until(lambda: workers.status(job_id) == "finished")
    keys = (names.answer(job_id), names.journal(job_id))
    assert all(TTL - 20 < workers.client.ttl(key) <= TTL for key in keys)
    num_bytes = sum(workers.client.memory_usage(key) or 0 for key in keys)
    reserved = {k: int(v) for k, v in workers.client.hgetall(names.ANSWER_BYTES).items()}  # type: ignore[union-attr]
    assert reserved == {job_id.encode(): num_bytes, b"total": num_bytes}


def test_cancelled_on_its_way_to_a_worker(workers: Workers) -> None:
    """A job that has left the queue and is not registered yet: its journal says that it was cancelled."""
    job_id = submit_stored(workers, max_tokens=50)
    workers.client.set(names.cancelled(job_id), 1, ex=60)
    workers.start()
    wait_until(lambda: workers.journal(job_id))
    assert workers.journal(job_id) == [Finished(1, "cancelled", Usage(0, 0))]
    wait_until(lambda: workers.client.ttl(names.answer(job_id)) <= TTL)
    assert not workers.client.exists(JsonJob.key_for(job_id))


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_given_up_by_takeover(workers: Workers, is_cancelled: bool) -> None:
    """No tries are left, or it was cancelled: the journal has its end, and journal and record the job's time to live."""
    job_id = submit_stored(workers, retries=0)
    queue = JsonQueue("m", connection=workers.client)
    workers.client.lrem(queue.key, 1, job_id)
    workers.client.hset(JsonJob.key_for(job_id), "status", "started")
    workers.client.zadd(queue.started_job_registry.key, {f"{job_id}:dead": time.time() + 3600})
    if is_cancelled:
        workers.client.set(names.cancelled(job_id), 1, ex=60)
    Takeover(queue, live_ttl_seconds=60, final_ttl_seconds=300, max_seconds=60.0).run()
    [end] = workers.journal(job_id)
    if is_cancelled:
        assert end == Finished(1, "cancelled", Usage(0, 0))
    else:
        assert isinstance(end, Failed)
        assert end.code == "worker_lost"
    for key in (names.answer(job_id), names.journal(job_id)):
        assert TTL - 20 < workers.client.ttl(key) <= TTL
