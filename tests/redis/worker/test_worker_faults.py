"""Faults around a worker: lost connections, a Redis that is away, sleep at a bad moment, duplicate entries, hanging prompts."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common import connections, names
from common.pool.redis_server import arguments
from common.protocol import Delta, Failed, Finished, Usage, encode
from common.rq import JsonJob, JsonQueue
from tests.conftest import unused_port
from tests.redis.pool_of_workers import LEASE_SECONDS, Workers, exact, wait_until
from worker.jobs.watchdog import EXIT_STALLED


@pytest.fixture
def workers(redis_url: str) -> Iterator[Workers]:
    with Workers(redis_url) as pool:
        yield pool


def keys_of(workers: Workers, *job_ids: str) -> dict[str, int]:
    """Every key that contains one of the ids, with its time to live (-1: none)."""
    keys: Any = workers.client.keys("*")
    return {
        key.decode(): int(workers.client.ttl(key))  # type: ignore[call-overload]
        for key in keys
        if any(job_id.encode() in key for job_id in job_ids)
    }


def pid_in(worker_name: str | None) -> int:
    return int(str(worker_name).split(".")[-2])


def test_takeover_leaves_one_execution(workers: Workers) -> None:
    """After a takeover RQ names the worker that has the job now, and every trace of the dead one expires."""
    victim = workers.start()
    job = workers.submit(max_tokens=150)
    wait_until(lambda: workers.has_token(job))
    victim.send(signal.SIGKILL)
    survivor = workers.start()
    heard = len(workers.events[job])
    wait_until(lambda: workers.has_token(job, n=heard + 20))
    [execution] = JsonJob.fetch(job, connection=workers.client).get_executions()
    assert pid_in(execution.worker_name) == survivor.process.pid
    wait_until(lambda: workers.has_ended(job))
    wait_until(lambda: workers.status(job) == "finished")
    assert not workers.client.exists(f"rq:executions:{job}")
    assert all(0 < ttl <= 3700 for ttl in keys_of(workers, job).values())


def test_only_rqs_bookkeeping_is_missing(workers: Workers) -> None:
    """A worker died between the last token and RQ's bookkeeping: another worker does that, and nothing else."""
    job = workers.submit(max_tokens=1)
    queue = JsonQueue("m", connection=workers.client)
    workers.client.lrem(queue.key, 1, job)
    terminal = Finished(2, "length", Usage(1, 1))
    for n, event in ((1, Delta(1, 1, " 1")), (2, terminal)):
        workers.client.xadd(names.journal(job), {"x": "another", "d": encode(event)}, id=f"{n}-0")
    workers.client.hset(JsonJob.key_for(job), "status", "started")
    workers.client.zadd(queue.started_job_registry.key, {f"{job}:gone": time.time() + 3600})
    workers.start()
    wait_until(lambda: workers.status(job) == "finished")
    kept = JsonJob.fetch(job, connection=workers.client)
    assert kept.return_value()["finish_reason"] == "length"
    assert kept.retries_left == 3
    assert workers.journal(job) == [Delta(1, 1, " 1"), terminal]
    workers.listen()
    assert workers.events[job] == []


def test_job_that_a_sleeping_worker_takes(workers: Workers) -> None:
    """Redis gives a job to a worker that is stopped: another one answers, and the first changes nothing when it wakes up."""
    sleeper = workers.start()
    queue = JsonQueue("m", connection=workers.client)
    job = ""

    def sleeper_takes() -> bool:
        nonlocal job
        sleeper.send(signal.SIGSTOP)
        job = workers.submit()
        time.sleep(0.05)
        if queue.job_ids:  # it was not blocked on the queue just then
            sleeper.send(signal.SIGCONT)
            wait_until(lambda: workers.has_ended(job))
            return False
        return True

    wait_until(sleeper_takes)
    awake = workers.start()
    wait_until(lambda: workers.has_ended(job))
    wait_until(lambda: workers.status(job) == "finished")
    sleeper.send(signal.SIGCONT)
    other = workers.submit()
    wait_until(lambda: workers.has_ended(other))
    wait_until(lambda: workers.free_slots() == [32, 32])
    assert workers.text(job) == exact(20)
    assert workers.status(job) == "finished"
    assert pid_in(JsonJob.fetch(job, connection=workers.client).worker_name) == awake.process.pid
    assert int(workers.client.ttl(JsonJob.key_for(job))) <= 60  # type: ignore[arg-type]


def test_all_connections_are_lost(workers: Workers) -> None:
    """All of a worker's connections are cut in mid-stream: no token is lost, and cancellations still arrive."""
    workers.start()
    job, left = workers.submit(max_tokens=150), workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(job, left))
    for _ in range(3):
        workers.client.client_kill_filter(_type="normal", skipme=True)
        for each in workers.client.client_list(_type="pubsub"):
            if each["sub"] == "2":  # RQ's commands and our cancellations; this test subscribes to one channel
                workers.client.client_kill_filter(_id=each["id"])
        time.sleep(0.3)
    wait_until(lambda: len(workers.journal(job)) == 151)
    assert "".join(event.text for event in workers.journal(job)[:-1] if isinstance(event, Delta)) == exact(
        150
    )
    wait_until(lambda: workers.client.pubsub_numsub(names.control_channel("m"))[0][1] == 1)
    workers.cancel(left)
    wait_until(lambda: isinstance(workers.journal(left)[-1], Finished), seconds=3)
    wait_until(lambda: workers.free_slots() == [32])


class Server:
    """A server of the test's own, which can be killed and started again with its data."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.port = unused_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = arguments(binary, folder, self.port)
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with connections.connect(self.url) as client:
            connections.check(client)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def own_server(binary: str, folder: Path) -> Iterator[Server]:
    server = Server(binary, folder)
    try:
        yield server
    finally:
        server.kill()


def test_redis_is_away_for_longer_than_a_lease(server_binary: str, tmp_path: Path) -> None:
    """Redis is away for longer than a lease, then back with its data: the same worker continues, and logs both once."""
    with own_server(server_binary, tmp_path) as server, Workers(server.url) as workers:
        worker = workers.start()
        jobs = [workers.submit(max_tokens=150) for _ in range(3)]
        wait_until(lambda: workers.has_token(*jobs, n=10))
        server.kill()
        time.sleep(1.5 * LEASE_SECONDS)
        server.start()
        wait_until(lambda: all(len(workers.journal(job)) == 151 for job in jobs), seconds=30)
        for job in jobs:
            *tokens, last = workers.journal(job)
            assert "".join(event.text for event in tokens if isinstance(event, Delta)) == exact(150)
            assert isinstance(last, Finished)
            wait_until(lambda each=job: workers.status(each) == "finished")
        wait_until(lambda: workers.free_slots() == [32])
        assert worker.end() == 0
        assert worker.process.stderr is not None
        logged = worker.process.stderr.read()
        assert logged.count("Redis does not answer") == logged.count("Redis answers again") == 1
        assert logged.count("WARNING worker.jobs.batch_worker") == 1, logged
        assert "WARNING worker.jobs.intake" not in logged, logged
        assert "Traceback" not in logged


@pytest.mark.parametrize("num_jobs", [1, 24])
def test_sigterm_while_redis_is_away(server_binary: str, tmp_path: Path, num_jobs: int) -> None:
    """A worker that receives SIGTERM ends within seconds with status 0, though its terminal events cannot be published."""
    with own_server(server_binary, tmp_path) as server, Workers(server.url) as workers:
        worker = workers.start()
        jobs = [workers.submit(max_tokens=5000) for _ in range(num_jobs)]
        wait_until(lambda: workers.has_token(*jobs))
        server.kill()
        worker.send(signal.SIGTERM)
        log = worker.process.communicate(timeout=15)[1]
        assert worker.process.returncode == 0
        assert "Traceback" not in log


def test_duplicate_id_in_the_queue(workers: Workers) -> None:
    """A job id is in the queue twice: the answer is written once, no crash is counted, and all slots become free."""
    job = workers.submit(max_tokens=100)
    workers.client.rpush(JsonQueue("m", connection=workers.client).key, job)
    workers.start()
    wait_until(lambda: workers.has_ended(job))
    time.sleep(1.5 * LEASE_SECONDS)
    wait_until(lambda: workers.status(job) == "finished")
    wait_until(lambda: workers.free_slots() == [32])
    assert len(workers.journal(job)) == 101
    assert JsonJob.fetch(job, connection=workers.client).retries_left == 3


def test_dead_execution_of_a_job_that_runs_elsewhere(workers: Workers) -> None:
    """A dead execution next to a live one of the same job is dropped; the job, on its last retry, does not fail."""
    workers.start()
    job = workers.submit(max_tokens=100, retries=0)
    wait_until(lambda: workers.has_token(job))
    workers.client.zadd("rq:wip:m", {f"{job}:dead": time.time() + 3600})
    wait_until(lambda: workers.client.zscore("rq:wip:m", f"{job}:dead") is None)
    wait_until(lambda: workers.has_ended(job))
    assert not isinstance(workers.terminal(job), Failed)
    assert workers.text(job) == exact(100)


def test_prompt_that_hangs_the_tokenizer(workers: Workers) -> None:
    """A worker whose intake hangs ends itself. The other stream of this worker continues elsewhere; the job fails after its last takeover."""
    first, second = (workers.start("m", 50, "--obey", stall_seconds=2) for _ in range(2))
    neighbour = workers.submit(max_tokens=500)
    wait_until(lambda: workers.has_token(neighbour))
    bad = workers.submit(text="hang 0", retries=1)
    wait_until(lambda: first.process.poll() == second.process.poll() == EXIT_STALLED, seconds=20)
    workers.start("m", 50, "--obey")
    wait_until(lambda: workers.has_ended(bad, neighbour), seconds=30)
    failed = workers.terminal(bad)
    assert isinstance(failed, Failed)
    assert failed.code == "worker_lost"
    assert workers.text(neighbour) == exact(500)
