"""Worker processes with the synthetic engine on a real Redis and Valkey: RQ's tools and commands, ends of jobs, takeover, bad data."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rq.command import (
    send_kill_horse_command,
    send_shutdown_command,
    send_stop_execution_command,
    send_stop_job_command,
)
from rq.job import Job
from rq.queue import Queue

from common.protocol import Failed, Finished
from common.rq import JsonJob, JsonQueue
from tests.redis.pool_of_workers import LEASE_SECONDS, Workers, exact, wait_until
from tests.unit.common.test_rq import make_bomb

RQ = str(Path(sys.executable).with_name("rq"))


@pytest.fixture
def workers(redis_url: str) -> Iterator[Workers]:
    with Workers(redis_url) as pool:
        yield pool


def rq(workers: Workers, *arguments: str) -> str:
    """The output of RQ's own command line."""
    command = [RQ, *arguments, "--url", workers.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_rq_info(workers: Workers) -> None:
    """RQ's own `rq info` shows concurrent executions, busy and idle workers, and finished jobs."""
    workers.start(steps_per_second=100)
    jobs = [workers.submit(max_tokens=300) for _ in range(5)]
    wait_until(lambda: workers.has_token(*jobs))
    raw = rq(workers, "info", "--raw")
    assert "queue m 0, 5 executing, 0 finished, 0 failed" in raw
    assert re.search(r"worker m\.\S+ \(.*\) busy m", raw)
    wait_until(lambda: workers.has_ended(*jobs))
    wait_until(lambda: "queue m 0, 0 executing, 5 finished, 0 failed" in rq(workers, "info", "--raw"))
    by_queue = rq(workers, "info", "--by-queue")
    assert re.search(r"m:\s+m\.\S+ \(idle\)", by_queue)
    assert [workers.text(job) for job in jobs] == [exact(300)] * 5


def test_rq_info_before_the_first_request(workers: Workers) -> None:
    """RQ's own `rq info` shows each model's queue and all workers from the start, and again after Redis has lost its data."""
    for model in ("m", "m", "other"):
        workers.start(model)

    def is_complete() -> bool:
        raw = rq(workers, "info", "--raw")
        queues = re.findall(r"^queue (\S+) 0, ", raw, re.MULTILINE)
        return sorted(queues) == ["m", "other"] and len(re.findall(r"^worker ", raw, re.MULTILINE)) == 3

    assert is_complete()
    workers.client.flushall()
    wait_until(is_complete)


def test_suspend_and_resume(workers: Workers) -> None:
    """While suspended, running jobs continue and queued ones wait; the worker is shown as suspended."""
    workers.start()
    running = workers.submit(max_tokens=60)
    wait_until(lambda: workers.has_token(running))
    rq(workers, "suspend")
    time.sleep(LEASE_SECONDS)  # until a heartbeat has read it
    waiting = workers.submit()
    wait_until(lambda: workers.has_ended(running))
    wait_until(lambda: " suspended " in rq(workers, "info", "--raw"))
    assert JsonQueue("m", connection=workers.client).job_ids == [waiting]
    rq(workers, "resume")
    wait_until(lambda: workers.has_ended(waiting))
    assert workers.text(waiting) == exact(20)


def test_stop_job_stops_one_of_several(workers: Workers) -> None:
    """RQ's stop-job and stop-execution commands end their job with an error for its client; other jobs continue."""
    workers.start()
    jobs = [workers.submit(max_tokens=100) for _ in range(3)]
    wait_until(lambda: workers.has_token(*jobs))
    send_stop_job_command(workers.client, jobs[1])
    [execution] = JsonJob.fetch(jobs[2], connection=workers.client).get_executions()
    send_stop_execution_command(workers.client, jobs[2], execution.id)
    wait_until(lambda: workers.has_ended(*jobs))
    assert workers.text(jobs[0]) == exact(100)
    for stopped in jobs[1:]:
        terminal = workers.terminal(stopped)
        assert isinstance(terminal, Failed)
        assert terminal.code == "stopped"
        wait_until(lambda job=stopped: workers.status(job) == "stopped")
    wait_until(lambda: workers.free_slots() == [32])


def test_kill_horse_and_shutdown(workers: Workers) -> None:
    """There is no child process to kill, so kill-horse stops the running jobs; the shutdown command drains and ends the worker."""
    worker = workers.start()
    job = workers.submit(max_tokens=500)
    wait_until(lambda: workers.has_token(job))
    name = workers.cards()[0][b"worker"].decode()
    send_kill_horse_command(workers.client, name)
    wait_until(lambda: workers.has_ended(job))
    send_shutdown_command(workers.client, name)
    assert worker.process.wait(10) == 0
    assert workers.cards() == []


def test_requeue_of_a_stopped_job(workers: Workers) -> None:
    """`rq requeue` of a job that has ended repeats RQ's bookkeeping and leaves the journal unchanged."""
    workers.start()
    job = workers.submit(max_tokens=100)
    wait_until(lambda: workers.has_token(job))
    send_stop_job_command(workers.client, job)
    wait_until(lambda: workers.has_ended(job))
    wait_until(lambda: workers.status(job) == "stopped")
    before = workers.journal(job)
    rq(workers, "requeue", "--queue", "m", "--serializer", "json", job)
    wait_until(lambda: workers.status(job) == "failed")
    assert workers.journal(job) == before


def test_two_workers_share_a_burst(workers: Workers) -> None:
    """A burst is shared by two workers, though each has room for all of it."""
    workers.start()
    workers.start()
    time.sleep(LEASE_SECONDS)  # until heartbeats have counted both
    jobs = [workers.submit(max_tokens=100) for _ in range(16)]
    wait_until(lambda: workers.has_token(*jobs))
    wait_until(lambda: sum(workers.free_slots()) == 48)
    assert max(workers.free_slots()) <= 29
    wait_until(lambda: workers.has_ended(*jobs))
    assert {workers.text(job) for job in jobs} == {exact(100)}


def test_each_model_has_its_queue(workers: Workers) -> None:
    """A request is served by a worker of its model only."""
    workers.start("org/one")
    workers.start("two")
    one, two = workers.submit("org/one"), workers.submit("two")
    wait_until(lambda: workers.has_ended(one, two))
    by_model = {card[b"id"]: card[b"worker"].decode() for card in workers.cards()}
    for job, model in ((one, b"org/one"), (two, b"two")):
        assert JsonJob.fetch(job, connection=workers.client).worker_name == by_model[model]


def test_cancel(workers: Workers) -> None:
    """When its client leaves, a running job stops and frees its slot; a queued job, and one that is being taken, are deleted."""
    workers.start(max_batch=1)
    running, waiting, marked = (workers.submit(max_tokens=5000) for _ in range(3))
    wait_until(lambda: workers.has_token(running))
    workers.cancel(waiting)
    workers.client.set(
        f"mlxpool:cancel:{marked}", 1, ex=60
    )  # as if a worker were taking it: no longer queued, not yet running
    workers.cancel(running)
    wait_until(lambda: workers.has_ended(running), seconds=2)
    terminal = workers.terminal(running)
    assert isinstance(terminal, Finished)
    assert terminal.finish_reason == "cancelled"
    wait_until(lambda: workers.status(running) == "finished")
    wait_until(lambda: not JsonJob.exists(marked, connection=workers.client))
    wait_until(lambda: workers.free_slots() == [1])
    assert workers.journal(waiting) == workers.journal(marked) == []


def test_killed_worker(workers: Workers) -> None:
    """kill -9: another worker continues with the next token; each n is written once, the text is exact."""
    victim = workers.start(max_batch=8)
    jobs = [workers.submit(max_tokens=150) for _ in range(8)]
    wait_until(lambda: workers.has_token(*jobs, n=10))
    workers.start(max_batch=8)
    victim.send(signal.SIGKILL)
    wait_until(lambda: workers.has_ended(*jobs), seconds=30)
    assert {workers.text(job) for job in jobs} == {exact(150)}
    assert {len(workers.journal(job)) for job in jobs} == {151}
    wait_until(lambda: workers.status(jobs[0]) == "finished")


def test_sleeping_worker(workers: Workers) -> None:
    """SIGSTOP past the lease, then SIGCONT: the worker writes nothing to jobs that were taken over, and drops its sequences."""
    sleeper = workers.start(max_batch=4)
    jobs = [workers.submit(max_tokens=200) for _ in range(4)]
    wait_until(lambda: workers.has_token(*jobs, n=10))
    workers.start(max_batch=4)
    sleeper.send(signal.SIGSTOP)
    num_events = [len(workers.events[job]) for job in jobs]
    wait_until(lambda: workers.has_token(*jobs, n=max(num_events) + 20), seconds=20)
    sleeper.send(signal.SIGCONT)
    wait_until(lambda: workers.has_ended(*jobs), seconds=30)
    assert {len(workers.journal(job)) for job in jobs} == {201}
    numbers = [[event.n for event in workers.events[job] if event.n] for job in jobs]
    assert numbers == [list(range(1, 202))] * 4  # none was published twice
    wait_until(lambda: workers.free_slots() == [4, 4])


def test_drain_and_requeue(workers: Workers) -> None:
    """SIGTERM: jobs that end in time end here, the rest is requeued for another worker, and the process exits with 0."""
    leaving = workers.start(drain_seconds=1)
    short, long = workers.submit(max_tokens=30), workers.submit(max_tokens=200)
    wait_until(lambda: workers.has_token(short, long))
    name = workers.cards()[0][b"worker"].decode()
    workers.start()
    leaving.send(signal.SIGTERM)
    assert leaving.process.wait(10) == 0
    wait_until(lambda: workers.has_ended(short, long))
    assert (workers.text(short), workers.text(long)) == (exact(30), exact(200))
    wait_until(lambda: workers.status(long) == "finished")
    assert JsonJob.fetch(short, connection=workers.client).worker_name == name
    assert JsonJob.fetch(long, connection=workers.client).worker_name != name
    assert JsonJob.fetch(long, connection=workers.client).retries_left == 3  # no crash is counted


def test_second_sigterm_requeues_at_once(workers: Workers) -> None:
    """A second SIGTERM ends a drain of a minute at once; the job is back in front of the queue."""
    leaving = workers.start(drain_seconds=60)
    job = workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(job))
    leaving.send(signal.SIGTERM)
    time.sleep(0.1)
    leaving.send(signal.SIGTERM)
    assert leaving.process.wait(10) == 0
    assert JsonQueue("m", connection=workers.client).job_ids == [job]


def test_taken_and_never_registered(workers: Workers) -> None:
    """A worker died between taking a job and registering it: the job is put back in front of the queue, and runs."""
    job = workers.submit()
    queue = JsonQueue("m", connection=workers.client)
    workers.client.lmove(queue.key, queue.intermediate_queue_key)
    workers.start()
    wait_until(lambda: workers.has_ended(job))
    assert workers.text(job) == exact(20)


def test_no_retries_left(workers: Workers) -> None:
    """A job without retries fails in RQ when its worker dies, and its client gets an error."""
    victim = workers.start()
    job = workers.submit(max_tokens=5000, retries=0)
    wait_until(lambda: workers.has_token(job))
    victim.send(signal.SIGKILL)
    workers.start()
    wait_until(lambda: workers.has_ended(job))
    terminal = workers.terminal(job)
    assert isinstance(terminal, Failed)
    assert terminal.code == "worker_lost"
    assert workers.journal(job)[-1] == terminal
    wait_until(lambda: workers.status(job) == "failed")


def test_foreign_jobs_fail_alone(workers: Workers) -> None:
    """A pickled job, a job with other arguments and an id without a job fail or are dropped; the next request is served."""
    stock = Queue("m", connection=workers.client)
    pickled = stock.enqueue(os.getcwd)
    shaped = JsonQueue("m", connection=workers.client).enqueue("os.getcwd")
    workers.client.rpush(stock.key, "ghost")
    workers.start()
    job = workers.submit()
    wait_until(lambda: workers.has_ended(job))
    for foreign in (pickled, shaped):
        wait_until(lambda each=foreign: workers.client.hget(each.key, "status") == b"failed")
    wait_until(lambda: workers.free_slots() == [32])


def test_deleted_job(workers: Workers) -> None:
    """A job is deleted while it runs: the worker survives, and its slot becomes free."""
    workers.start()
    job, other = workers.submit(max_tokens=50), workers.submit(max_tokens=100)
    wait_until(lambda: workers.has_token(job, other))
    workers.client.delete(Job.key_for(job))
    wait_until(lambda: workers.has_ended(job, other))
    assert workers.text(other) == exact(100)
    wait_until(lambda: workers.free_slots() == [32])


def test_garbage_on_the_channels(workers: Workers) -> None:
    """A message that is not a command does not keep a worker from receiving the next one."""
    workers.start()
    name = workers.cards()[0][b"worker"].decode()
    for channel in (f"rq:pubsub:{name}", "mlxpool:control:m"):
        workers.client.publish(channel, b"\xff not json")
        workers.client.publish(channel, b'{"command": 5}')
    time.sleep(2.5)  # the worker pauses after each
    job = workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(job))
    workers.cancel(job)
    wait_until(lambda: workers.has_ended(job), seconds=3)


def test_orphaned_jobs_are_cancelled(workers: Workers) -> None:
    """Jobs of an API process that no longer subscribes are cancelled after the grace period."""
    workers.start(orphan_seconds=1)
    job = workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(job))
    workers.channel = "mlxpool:api:gone"
    orphan = workers.submit(max_tokens=5000)
    wait_until(lambda: any(isinstance(event, Finished) for event in workers.journal(orphan)))
    wait_until(lambda: workers.free_slots() == [31])


def test_every_key_expires(workers: Workers) -> None:
    """Every key that finished and cancelled jobs leave behind has a time to live of an hour at most."""
    workers.start()
    done = workers.submit()
    wait_until(lambda: workers.has_ended(done))
    cancelled = workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(cancelled))
    workers.cancel(cancelled)
    wait_until(lambda: workers.has_ended(cancelled))
    wait_until(lambda: workers.free_slots() == [32])
    keys: Any = workers.client.keys("*")
    of_jobs = [key for key in keys if done.encode() in key or cancelled.encode() in key]
    assert of_jobs
    ttls = {key.decode(): workers.client.ttl(key) for key in of_jobs}
    assert all(0 < int(ttl) <= 3700 for ttl in ttls.values()), ttls  # type: ignore[call-overload]


def test_rq_keeps_no_text(workers: Workers) -> None:
    """RQ keeps token counts of a finished request, and no text."""
    workers.start()
    job = workers.submit()
    wait_until(lambda: workers.has_ended(job))
    wait_until(lambda: workers.status(job) == "finished")
    kept = JsonJob.fetch(job, connection=workers.client)
    assert kept.return_value() == {
        "finish_reason": "length",
        "prompt_tokens": 1,
        "cached_tokens": 0,
        "completion_tokens": 20,
    }
    fields: Any = workers.client.hgetall(kept.key)
    assert exact(3).encode() not in b"".join(fields.values()) + zlib.decompress(fields[b"data"])


BOMB = make_bomb()
BAD_DATA: dict[str, list[tuple[Any, ...]]] = {
    "an id that is not text": [("RPUSH", "rq:queue:m", b"\xff\xfe")],
    "a job without data": [("HSET", "rq:job:JOB", "status", "queued"), ("RPUSH", "rq:queue:m", "JOB")],
    "a job that is not a hash": [("SET", "rq:job:JOB", "1"), ("RPUSH", "rq:queue:m", "JOB")],
    "a registry entry of three parts": [("ZADD", "rq:wip:m", 9e9, "a:b:c")],
    "a registry entry that is not text": [("ZADD", "rq:wip:m", 9e9, b"\xff:\xfe")],
    "an abandoned job without data": [
        ("HSET", "rq:job:JOB", "status", "started"),
        ("ZADD", "rq:wip:m", 9e9, "JOB:y"),
    ],
    "an abandoned job with a broken journal": [
        ("HSET", "rq:job:JOB", "status", "started"),
        ("XADD", "mlxpool:journal:JOB", "1-0", "no", "event"),
        ("ZADD", "rq:wip:m", 9e9, "JOB:y"),
    ],
    "an abandoned job whose journal is not a stream": [
        ("HSET", "rq:job:JOB", "status", "started"),
        ("SET", "mlxpool:journal:JOB", "1"),
        ("ZADD", "rq:wip:m", 9e9, "JOB:y"),
    ],
    "a job of a gigabyte": [
        ("HSET", "rq:job:JOB", "status", "queued", "data", BOMB),
        ("RPUSH", "rq:queue:m", "JOB"),
    ],
    "an abandoned job of a gigabyte": [
        ("HSET", "rq:job:JOB", "status", "started", "data", BOMB),
        ("ZADD", "rq:wip:m", 9e9, "JOB:y"),
    ],
    "an id in the intermediate queue that is not text": [("RPUSH", "rq:queue:m:intermediate", b"\xff\xfe")],
}


def test_bad_data_in_redis(workers: Workers) -> None:
    """Bad data affects no other job: the worker survives, serves the next request and takes over a job of a dead worker."""
    victim = workers.start()
    lost = workers.submit(max_tokens=100)
    wait_until(lambda: workers.has_token(lost))
    victim.send(signal.SIGKILL)
    for i, commands in enumerate(BAD_DATA.values()):
        for name, *arguments in commands:
            named = [a.replace("JOB", f"bad{i}") if isinstance(a, str) else a for a in arguments]
            workers.client.execute_command(name, *named)
    survivor = workers.start()
    job = workers.submit()
    wait_until(lambda: workers.has_ended(job, lost))
    assert (workers.text(job), workers.text(lost)) == (exact(20), exact(100))
    time.sleep(2.5 * LEASE_SECONDS)  # until the intermediate queue was checked too
    assert survivor.process.poll() is None
    wait_until(lambda: workers.free_slots() == [32])


def test_journal_of_a_wrong_type(workers: Workers) -> None:
    """A job whose journal cannot be written is dropped alone; the other jobs of its batch are not affected."""
    workers.start()
    broken, other = workers.submit(max_tokens=100), workers.submit(max_tokens=100)
    wait_until(lambda: workers.has_token(broken, other))
    workers.client.delete(f"mlxpool:journal:{broken}")
    workers.client.set(f"mlxpool:journal:{broken}", "x")
    wait_until(lambda: workers.has_ended(other))
    assert workers.text(other) == exact(100)
