"""Worker processes on a real Redis and Valkey, seen as operators, clients and misfortune see them."""

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
    with Workers(redis_url) as running:
        yield running


def rq(workers: Workers, *arguments: str) -> str:
    """What RQ's own command line prints."""
    command = [RQ, *arguments, "--url", workers.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_rq_info_tells_the_truth(workers: Workers) -> None:
    """Stock `rq info` shows several executions at once, who works and who is idle, and what has finished."""
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
    """Stock `rq info` shows each model's queue and all workers from the start, and again when Redis has lost everything."""
    for model in ("m", "m", "other"):
        workers.start(model)

    def is_whole() -> bool:
        raw = rq(workers, "info", "--raw")
        queues = re.findall(r"^queue (\S+) 0, ", raw, re.MULTILINE)
        return sorted(queues) == ["m", "other"] and len(re.findall(r"^worker ", raw, re.MULTILINE)) == 3

    assert is_whole()
    workers.client.flushall()
    wait_until(is_whole)


def test_suspend_and_resume(workers: Workers) -> None:
    """While suspended, running jobs go on and waiting ones wait; the worker shows as suspended."""
    workers.start()
    running = workers.submit(max_tokens=60)
    wait_until(lambda: workers.has_token(running))
    rq(workers, "suspend")
    time.sleep(LEASE_SECONDS)  # a heartbeat learns it
    waiting = workers.submit()
    wait_until(lambda: workers.has_ended(running))
    wait_until(lambda: " suspended " in rq(workers, "info", "--raw"))
    assert JsonQueue("m", connection=workers.client).job_ids == [waiting]
    rq(workers, "resume")
    wait_until(lambda: workers.has_ended(waiting))
    assert workers.text(waiting) == exact(20)


def test_stop_job_stops_one_of_several(workers: Workers) -> None:
    """RQ's stop-job and stop-execution commands end their job, whose client is told; the others go on."""
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
    """There is no child process to kill, so kill-horse stops what runs; the shutdown command drains and ends."""
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
    """`rq requeue` of a job whose answer has ended changes nothing of it: its books are written again, no token twice."""
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
    """A burst does not all go to the worker that looks first, though it has room for all of it."""
    workers.start()
    workers.start()
    time.sleep(LEASE_SECONDS)  # a heartbeat tells each of the other
    jobs = [workers.submit(max_tokens=100) for _ in range(16)]
    wait_until(lambda: workers.has_token(*jobs))
    wait_until(lambda: sum(workers.free_slots()) == 48)
    assert max(workers.free_slots()) <= 29
    wait_until(lambda: workers.has_ended(*jobs))
    assert {workers.text(job) for job in jobs} == {exact(100)}


def test_each_model_has_its_queue(workers: Workers) -> None:
    """A request goes to a worker of its model only."""
    workers.start("org/one")
    workers.start("two")
    one, two = workers.submit("org/one"), workers.submit("two")
    wait_until(lambda: workers.has_ended(one, two))
    by_model = {card[b"id"]: card[b"worker"].decode() for card in workers.cards()}
    for job, model in ((one, b"org/one"), (two, b"two")):
        assert JsonJob.fetch(job, connection=workers.client).worker_name == by_model[model]


def test_cancel(workers: Workers) -> None:
    """A client that leaves: a running job stops and frees its slot, a waiting one is gone, one being taken too."""
    workers.start(max_batch=1)
    running, waiting, marked = (workers.submit(max_tokens=5000) for _ in range(3))
    wait_until(lambda: workers.has_token(running))
    workers.cancel(waiting)
    workers.client.set(
        f"mlxpool:cancel:{marked}", 1, ex=60
    )  # it is just being taken: out of the queue, not running
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
    """kill -9: another worker goes on with the next token; each n is written once, the text is exact."""
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
    """SIGSTOP past the lease, then SIGCONT: it writes nothing into what others took over, and gives up its rows."""
    sleeper = workers.start(max_batch=4)
    jobs = [workers.submit(max_tokens=200) for _ in range(4)]
    wait_until(lambda: workers.has_token(*jobs, n=10))
    workers.start(max_batch=4)
    sleeper.send(signal.SIGSTOP)
    heard = [len(workers.events[job]) for job in jobs]
    wait_until(lambda: workers.has_token(*jobs, n=max(heard) + 20), seconds=20)
    sleeper.send(signal.SIGCONT)
    wait_until(lambda: workers.has_ended(*jobs), seconds=30)
    assert {len(workers.journal(job)) for job in jobs} == {201}
    numbers = [[event.n for event in workers.events[job] if event.n] for job in jobs]
    assert numbers == [list(range(1, 202))] * 4  # not one was published twice
    wait_until(lambda: workers.free_slots() == [4, 4])


def test_drain_and_hand_over(workers: Workers) -> None:
    """SIGTERM: what ends in time ends here, the rest is handed to another worker at once, and the process ends with 0."""
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
    assert JsonJob.fetch(long, connection=workers.client).retries_left == 3  # nobody died


def test_second_sigterm_hurries(workers: Workers) -> None:
    """A worker with a minute to drain hands over at once when it is asked again; the job waits in front of the queue."""
    leaving = workers.start(drain_seconds=60)
    job = workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(job))
    leaving.send(signal.SIGTERM)
    time.sleep(0.1)
    leaving.send(signal.SIGTERM)
    assert leaving.process.wait(10) == 0
    assert JsonQueue("m", connection=workers.client).job_ids == [job]


def test_taken_and_never_begun(workers: Workers) -> None:
    """A worker that died between taking and registering: the job is put back in front and runs."""
    job = workers.submit()
    queue = JsonQueue("m", connection=workers.client)
    workers.client.lmove(queue.key, queue.intermediate_queue_key)
    workers.start()
    wait_until(lambda: workers.has_ended(job))
    assert workers.text(job) == exact(20)


def test_no_tries_left(workers: Workers) -> None:
    """A job whose worker died and that may not move on fails in RQ's books, and its client is told."""
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


def test_strangers_hurt_nobody(workers: Workers) -> None:
    """A pickled job, a job of another shape and an id without a job fail or vanish; the next request is served."""
    stock = Queue("m", connection=workers.client)
    pickled = stock.enqueue(os.getcwd)
    shaped = JsonQueue("m", connection=workers.client).enqueue("os.getcwd")
    workers.client.rpush(stock.key, "ghost")
    workers.start()
    job = workers.submit()
    wait_until(lambda: workers.has_ended(job))
    for stranger in (pickled, shaped):
        wait_until(lambda each=stranger: workers.client.hget(each.key, "status") == b"failed")
    wait_until(lambda: workers.free_slots() == [32])


def test_a_deleted_job(workers: Workers) -> None:
    """Somebody deletes a job while it runs: the worker survives, and its slot is free in the end."""
    workers.start()
    job, other = workers.submit(max_tokens=50), workers.submit(max_tokens=100)
    wait_until(lambda: workers.has_token(job, other))
    workers.client.delete(Job.key_for(job))
    wait_until(lambda: workers.has_ended(job, other))
    assert workers.text(other) == exact(100)
    wait_until(lambda: workers.free_slots() == [32])


def test_garbage_on_the_channels(workers: Workers) -> None:
    """What is no command does not make a worker deaf to the next one."""
    workers.start()
    name = workers.cards()[0][b"worker"].decode()
    for channel in (f"rq:pubsub:{name}", "mlxpool:control:m"):
        workers.client.publish(channel, b"\xff not json")
        workers.client.publish(channel, b'{"command": 5}')
    time.sleep(2.5)  # a pause for each
    job = workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(job))
    workers.cancel(job)
    wait_until(lambda: workers.has_ended(job), seconds=3)


def test_an_api_process_that_died(workers: Workers) -> None:
    """Jobs that nobody listens to are cancelled after the grace period."""
    workers.start(orphan_seconds=1)
    job = workers.submit(max_tokens=5000)
    wait_until(lambda: workers.has_token(job))
    workers.channel = "mlxpool:api:gone"
    orphan = workers.submit(max_tokens=5000)
    wait_until(lambda: any(isinstance(event, Finished) for event in workers.journal(orphan)))
    wait_until(lambda: workers.free_slots() == [31])


def test_everything_has_an_end(workers: Workers) -> None:
    """After a finished, a cancelled and a failed job, all that is left of them expires by itself, and soon."""
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


def test_no_text_in_rqs_books(workers: Workers) -> None:
    """RQ keeps counts of a finished request, no text of it."""
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
POISONS: dict[str, list[tuple[Any, ...]]] = {
    "an id that is no text": [("RPUSH", "rq:queue:m", b"\xff\xfe")],
    "a job without data": [("HSET", "rq:job:JOB", "status", "queued"), ("RPUSH", "rq:queue:m", "JOB")],
    "a job that is no hash": [("SET", "rq:job:JOB", "1"), ("RPUSH", "rq:queue:m", "JOB")],
    "a registry entry of three parts": [("ZADD", "rq:wip:m", 9e9, "a:b:c")],
    "a registry entry that is no text": [("ZADD", "rq:wip:m", 9e9, b"\xff:\xfe")],
    "an abandoned job without data": [
        ("HSET", "rq:job:JOB", "status", "started"),
        ("ZADD", "rq:wip:m", 9e9, "JOB:y"),
    ],
    "an abandoned job with a broken journal": [
        ("HSET", "rq:job:JOB", "status", "started"),
        ("XADD", "mlxpool:journal:JOB", "1-0", "no", "event"),
        ("ZADD", "rq:wip:m", 9e9, "JOB:y"),
    ],
    "an abandoned job whose journal is no stream": [
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
    "an id in the intermediate queue that is no text": [("RPUSH", "rq:queue:m:intermediate", b"\xff\xfe")],
}


def test_poison_in_redis(workers: Workers) -> None:
    """Broken entries hurt nobody: the worker lives, serves the next request and takes over what is really lost."""
    victim = workers.start()
    lost = workers.submit(max_tokens=100)
    wait_until(lambda: workers.has_token(lost))
    victim.send(signal.SIGKILL)
    for i, commands in enumerate(POISONS.values()):
        for name, *arguments in commands:
            named = [a.replace("JOB", f"poison{i}") if isinstance(a, str) else a for a in arguments]
            workers.client.execute_command(name, *named)
    survivor = workers.start()
    job = workers.submit()
    wait_until(lambda: workers.has_ended(job, lost))
    assert (workers.text(job), workers.text(lost)) == (exact(20), exact(100))
    time.sleep(2.5 * LEASE_SECONDS)  # rescue has looked too
    assert survivor.process.poll() is None
    wait_until(lambda: workers.free_slots() == [32])


def test_a_journal_that_became_something_else(workers: Workers) -> None:
    """The row whose journal cannot be written is given up alone; the others of its batch do not notice."""
    workers.start()
    broken, other = workers.submit(max_tokens=100), workers.submit(max_tokens=100)
    wait_until(lambda: workers.has_token(broken, other))
    workers.client.delete(f"mlxpool:journal:{broken}")
    workers.client.set(f"mlxpool:journal:{broken}", "x")
    wait_until(lambda: workers.has_ended(other))
    assert workers.text(other) == exact(100)
