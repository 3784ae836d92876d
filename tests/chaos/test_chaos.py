"""What docs/faults.md promises, in a short form: processes are killed, and every token is checked."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import psutil
import pytest

from bench import chaos, overload
from bench.chaos import STEPS_PER_SECOND
from bench.harness.pool import Pool
from bench.harness.proxy import Proxy
from common import connections, names
from common.rq import JsonQueue
from tests.chaos.conftest import Chaos
from tests.redis.pool_of_workers import wait_until
from worker.jobs.watchdog import EXIT_STALLED


def test_kills(running: Chaos) -> None:
    """The worker that has all streams is killed, twice in a row: every stream is exact, and nothing is left in Redis."""
    running.start()
    running.outcome = chaos.kills(running.workers, 2)
    running.assert_exact()


@pytest.mark.heavy
def test_mixed_faults(running: Chaos) -> None:
    """SIGKILL, SIGSTOP, SIGTERM and cut connections under 24 streams on three workers: each stream is exact."""
    running.start()
    running.outcome = chaos.mixed(running.workers, 5, seed=3)
    running.assert_exact()


def test_redis_restarts(running: Chaos) -> None:
    """Streams pause while Redis is away and continue with the next token: none is lost, none is repeated."""
    running.start()
    running.outcome = chaos.redis_away(running.workers, 3.0)
    running.assert_exact()


def test_redis_loses_its_data(running: Chaos) -> None:
    """Redis restarts without data: running streams end in the error `answer_lost`, and the pool serves requests again."""
    running.start(2)
    streams = [running.stream(1000) for _ in range(6)]
    thread = threading.Thread(target=running.load.run, args=(streams,))
    thread.start()
    wait_until(lambda: all(stream.num_chunks for stream in streams))
    running.pool.stop("redis")
    shutil.rmtree(running.pool.folder / "redis")
    running.pool.start_redis()
    thread.join(60)
    assert all(stream.is_done for stream in streams)
    assert all("answer_lost" in str(stream.error) for stream in streams), [s.error for s in streams]
    wait_until(lambda: _is_served(running), 20)


def _is_served(running: Chaos) -> bool:
    [stream] = running.load.run([running.stream(5)], 10)
    return stream.error is None and stream.num_checked == 5


@pytest.mark.heavy
def test_bad_network(running: Chaos) -> None:
    """Redis has 20 ms of latency and its connections are reset three times during steps: every stream is exact."""
    with Proxy(running.pool.redis_port) as proxy:
        running.pool.redis_url = f"redis://127.0.0.1:{proxy.port}/0"
        running.start(2)
        proxy.delay_seconds = 0.02
        with chaos.running(running.load, 32, 5 * STEPS_PER_SECOND, running.outcome):
            for _ in range(3):
                time.sleep(1.0)
                proxy.reset_all()
        proxy.delay_seconds = 0.0
        running.assert_exact()


@pytest.mark.settings(sse_comment_seconds=0.5)
def test_last_worker_dies(running: Chaos) -> None:
    """Streams wait, with comments, and continue when a worker joins."""
    running.start()
    [victim] = running.workers.roles
    with chaos.running(running.load, 4, 2 * STEPS_PER_SECOND, running.outcome):
        running.workers.kill(victim)
        time.sleep(3.0)
        running.workers.start()
    running.assert_exact()


@pytest.mark.settings(request_seconds=3)
def test_no_worker_joins(running: Chaos) -> None:
    """At its deadline a stream that waits for a worker ends in a 504, and its job leaves the queue."""
    running.start()
    stream = running.stream(500)
    thread = threading.Thread(target=running.load.run, args=([stream],))
    thread.start()
    wait_until(lambda: stream.num_chunks)
    running.workers.kill(running.workers.roles[0])
    thread.join(20)
    assert "deadline_exceeded" in str(stream.error)
    with connections.connect(running.pool.redis_url) as client:
        wait_until(lambda: not JsonQueue(chaos.MODEL, connection=client).count)


@pytest.mark.settings(api_processes=2, orphan_seconds=1)
def test_api_process_dies(running: Chaos) -> None:
    """Clients of a killed API process see a broken connection and their jobs stop; streams of the other process are exact."""
    running.start()
    streams = [running.stream(4 * STEPS_PER_SECOND) for _ in range(12)]
    # Not all at once: processes that share a socket share a burst unevenly.
    thread = threading.Thread(target=running.load.run, args=(streams,), kwargs={"apart_seconds": 0.03})
    thread.start()
    wait_until(lambda: all(stream.num_chunks for stream in streams))
    with connections.connect(running.pool.redis_url) as client:
        [master] = running.pool.pids("api")[:1]
        victim = psutil.Process(master).children()[0]
        victim.kill()
        thread.join(60)
        broken = [stream for stream in streams if stream.error]
        whole = [stream for stream in streams if not stream.error]
        assert all("closed the connection" in str(s.error) or "reset" in str(s.error) for s in broken), [
            s.error for s in broken
        ]
        assert all(stream.num_checked == 4 * STEPS_PER_SECOND for stream in whole)
        assert broken
        assert whole
        wait_until(lambda: not chaos.leftovers(running.pool))
        assert not JsonQueue(chaos.MODEL, connection=client).count
    wait_until(lambda: len(psutil.Process(master).children()) == 2)


@pytest.mark.settings(api_processes=2, drain_seconds=10)
@pytest.mark.heavy
def test_rolling_restart(running: Chaos) -> None:
    """All workers and all API processes are replaced under load: no request fails."""
    running.start(2)
    [master] = running.pool.pids("api")[:1]
    old = {child.pid for child in psutil.Process(master).children()}
    streams = [running.stream(STEPS_PER_SECOND) for _ in range(120)]
    thread = threading.Thread(target=running.load.run, args=(streams,), kwargs={"apart_seconds": 0.1})
    thread.start()
    wait_until(lambda: streams[3].num_chunks)
    for role in list(running.workers.roles):
        running.workers.start()
        running.workers.send(role, signal.SIGTERM)
        running.workers.roles.remove(role)
    os.kill(master, signal.SIGHUP)
    wait_until(lambda: not old & {child.pid for child in psutil.Process(master).children()}, 30)
    thread.join(60)
    running.outcome.add(streams, STEPS_PER_SECOND)
    running.assert_exact()


@pytest.mark.settings(stall_seconds=2, lease_seconds=1)
def test_step_that_hangs(running: Chaos) -> None:
    """The worker ends itself, the other streams continue on another worker and are exact; the one that hangs fails in the end."""
    running.start(1, "--obey")
    streams = [running.stream(3 * STEPS_PER_SECOND) for _ in range(4)]
    bad = running.stream(3 * STEPS_PER_SECOND, "hang 10")
    thread = threading.Thread(target=running.load.run, args=([*streams, bad],))
    thread.start()
    process = running.pool.process(running.workers.roles[0])
    assert process.wait(30) == EXIT_STALLED
    restarting = _Restarts(running)
    thread.join(90)
    restarting.stop()
    running.outcome.add(streams, 3 * STEPS_PER_SECOND)
    running.assert_exact()
    assert "worker_lost" in str(bad.error)


class _Restarts:
    """A supervisor: restarts a worker that died, until `stop`."""

    def __init__(self, running: Chaos) -> None:
        self._running = running
        self._over = threading.Event()
        self.num = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        workers, pool = self._running.workers, self._running.pool
        while not self._over.wait(0.1):
            for role in list(workers.roles):
                if pool.process(role).poll() is not None:
                    workers.roles.remove(role)
                    self.num += 1
                    workers.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize(
    "how",
    [
        "crash 1",
        pytest.param("crash 20", marks=pytest.mark.heavy),
        pytest.param("raise 20", marks=pytest.mark.heavy),
    ],
)
@pytest.mark.settings(lease_seconds=1)
def test_poison(running: Chaos, how: str) -> None:
    """A request that kills every worker that takes it fails with `worker_lost`; the other streams are exact."""
    running.start(1, "--obey")
    restarting = _Restarts(running)
    streams = [running.stream(3 * STEPS_PER_SECOND) for _ in range(5)]
    bad = running.stream(3 * STEPS_PER_SECOND, how)
    running.load.run([*streams[:3], bad, *streams[3:]], 120)
    restarting.stop()
    running.outcome.add(streams, 3 * STEPS_PER_SECOND)
    running.assert_exact()
    assert "worker_lost" in str(bad.error)
    if how != "raise 20":
        assert 2 <= restarting.num <= 4


def test_one_failing_sequence(running: Chaos) -> None:
    """A sequence whose sampler raises fails at once; the other streams are exact."""
    running.start(1, "--obey")
    streams = [running.stream(STEPS_PER_SECOND) for _ in range(4)]
    bad = running.stream(STEPS_PER_SECOND, "fail 5")
    running.load.run([*streams, bad])
    running.outcome.add(streams, STEPS_PER_SECOND)
    running.assert_exact()
    assert "The model failed" in str(bad.error)
    assert bad.num_checked == 4


@pytest.mark.settings(lease_seconds=1)
def test_stopped_worker_with_an_expired_lease(running: Chaos) -> None:
    """A worker wakes up after another one has taken its jobs over: each n is journaled once, and the first drops its sequences."""
    running.start(2)
    with chaos.running(running.load, 8, 5 * STEPS_PER_SECOND, running.outcome):
        sleeper = running.workers.roles[0]
        running.workers.send(sleeper, signal.SIGSTOP)
        time.sleep(2.0)
        running.workers.send(sleeper, signal.SIGCONT)
    running.assert_exact()
    with connections.connect(running.pool.redis_url) as client:
        journals = client.keys(names.journal("*"))
        assert len(journals) == 8
        for journal in journals:
            entries = [entry.decode() for entry, _ in client.xrange(journal)]
            assert entries == [f"{n}-0" for n in range(1, 5 * STEPS_PER_SECOND + 2)]
        wait_until(lambda: _free_slots(client) == [32, 32])


def _free_slots(client: object) -> list[int]:
    workers = client.zrange(names.WORKER_CARDS, 0, -1)  # type: ignore[attr-defined]
    cards = [client.hget(names.worker_card(w.decode()), "free_slots") for w in workers]  # type: ignore[attr-defined]
    return [int(free) for free in cards if free is not None]


# ARGV: a model. Returns each unfinished job that is not in exactly one of the queue, the intermediate queue and the registry
# of running executions, with the number of lists that it is in.
_MISPLACED_JOBS = """
local counts, wrong = {}, {}
local function count(id) counts[id] = (counts[id] or 0) + 1 end
for _, list in ipairs({'rq:queue:' .. ARGV[1], 'rq:queue:' .. ARGV[1] .. ':intermediate'}) do
  for _, id in ipairs(redis.call('LRANGE', list, 0, -1)) do count(id) end
end
for _, entry in ipairs(redis.call('ZRANGE', 'rq:wip:' .. ARGV[1], 0, -1)) do
  count(string.sub(entry, 1, string.find(entry, ':') - 1))
end
for _, key in ipairs(redis.call('KEYS', 'rq:job:*')) do
  local id, status = string.sub(key, 8), redis.call('HGET', key, 'status')
  if (status == 'queued' or status == 'started') and counts[id] ~= 1 then
    wrong[#wrong + 1] = id .. ' ' .. status .. ' ' .. (counts[id] or 0)
  end
end
return wrong
"""


def test_every_job_is_in_one_list(running: Chaos) -> None:
    """A job is never in no list and never in two, observed a thousand times a second while workers are killed."""
    running.start(2)
    over = threading.Event()
    wrong: list[bytes] = []
    with connections.connect(running.pool.redis_url) as client:
        look = client.register_script(_MISPLACED_JOBS)

        def watch() -> None:
            while not over.wait(0.001):
                wrong.extend(look(args=(chaos.MODEL,)))

        thread = threading.Thread(target=watch)
        thread.start()
        for _ in range(2):
            with chaos.running(running.load, 12, STEPS_PER_SECOND, running.outcome):
                running.workers.kill(running.workers.roles[0])
                running.workers.start()
        over.set()
        thread.join()
    assert wrong == []
    running.assert_exact()


@pytest.mark.heavy
def test_overload() -> None:
    """Ten times the capacity for a few seconds: each request is complete, or refused with `Retry-After`."""
    with Pool({"MLXPOOL_MAX_QUEUED_REQUESTS": str(overload.MAX_QUEUED)}) as pool:
        overload.start(pool)
        result = overload.overload(pool, factor=10.0, seconds=4.0)
    assert result.wrong == []
    assert result.num_refused > result.num_completed > 0
