"""Clients that disconnect, and a server that shuts down: generation is cancelled at once, queued or running."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from common import names
from common.protocol import Delta, Event, GenerationJob, Started
from common.rq import JsonJob, JsonQueue
from tests.e2e.api_pool import MODEL, ApiPool, Response, api_pool, chat_body, read_response, request
from tests.fake_worker import FakeWorker, words

TIMEOUT_SECONDS = 5.0


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    with api_pool() as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(endless)
    return running


def endless(_job: GenerationJob) -> Iterator[Event | float]:
    """A token every 20 ms."""
    yield Started(0, 5)
    for n in range(1, 100_000):
        yield Delta(n, n, f" {n}")
        yield 0.02


def silent(_job: GenerationJob) -> Iterator[Event | float]:
    """A long prefill: no event."""
    yield 60.0


def wait_for(condition: Callable[[], Any], seconds: float = TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def begin(api: ApiPool, **fields: Any) -> socket.socket:
    """Send a request and wait until the worker has it."""
    before = len(api.worker.jobs)
    connection = api.connect()
    connection.sendall(request("POST", "/v1/chat/completions", chat_body(model=MODEL, **fields)))
    wait_for(lambda: len(api.worker.jobs) > before)
    return connection


@pytest.mark.parametrize(("script", "prompt_tokens"), [(endless, "5"), (silent, "unknown")])
@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels(api: ApiPool, stream: bool, script: Any, prompt_tokens: str) -> None:
    """The job is cancelled within 0.2 seconds, during prefill and decoding, and logged with what is known of it."""
    api.follow(script)
    connection = begin(api, stream=stream)
    time.sleep(0.3)
    job_id = api.worker.jobs[0].job_id
    assert job_id not in api.worker.cancelled
    closed_at = time.monotonic()
    connection.close()
    wait_for(lambda: job_id in api.worker.cancelled)
    assert api.worker.cancelled[job_id] - closed_at < 0.2
    wait_for(lambda: api.ask("GET", "/health").json["open_requests"] == 0)
    [line] = [line for line in api.pool.log("api").splitlines() if f"job {job_id}: model" in line]
    assert f"key -, 1 choices, {prompt_tokens} prompt tokens, " in line
    assert line.endswith("client left, status 499")


@pytest.mark.parametrize("stream", [True, False])
def test_a_half_close_counts_as_a_disconnect(api: ApiPool, stream: bool) -> None:
    """A client that shuts down its sending side cannot be told from one that closed; docs/faults.md says why."""
    api.follow(silent)
    with begin(api, stream=stream) as connection:
        job_id = api.worker.jobs[0].job_id
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: job_id in api.worker.cancelled, 1)
        assert connection.recv(100) == b""


def test_a_reset_cancels(api: ApiPool) -> None:
    """A connection that the client resets is like a closed one."""
    connection = begin(api, stream=True)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    job_id = api.worker.jobs[0].job_id
    wait_for(lambda: job_id in api.worker.cancelled, 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_removes_a_queued_job(api: ApiPool, stream: bool) -> None:
    """A job that no worker has taken yet is removed from the queue and from Redis."""
    model = "not consumed"
    worker = FakeWorker(api.pool.redis_url, model)
    worker.show_card()
    with redis.Redis.from_url(api.pool.redis_url) as client:
        queue = JsonQueue(model, connection=client)
        connection = api.connect()
        connection.sendall(request("POST", "/v1/chat/completions", chat_body(model=model, stream=stream)))
        wait_for(lambda: queue.job_ids)
        [job_id] = queue.job_ids
        connection.close()
        wait_for(lambda: not queue.job_ids, 1)
        wait_for(lambda: not client.exists(JsonJob.key_for(job_id)), 1)
        assert client.exists(names.cancelled(job_id))


def test_a_disconnect_after_the_response(api: ApiPool) -> None:
    """A client that disconnects after its response cancels nothing."""
    api.follow(words)
    before = dict(api.worker.cancelled)
    assert api.chat(model=MODEL).status == 200
    assert api.chat(model=MODEL, stream=True).status == 200
    time.sleep(0.3)
    assert api.worker.cancelled == before


def test_a_slow_reader_does_not_block_others(api: ApiPool) -> None:
    """A client that does not read costs little memory and does not delay other clients; when it reads, its response is complete."""
    text = "x" * 1000
    api.follow(lambda job: words(job, [text] * 8000))
    with redis.Redis.from_url(api.pool.redis_url) as client:
        before = api.pool.rss_bytes()["api"]
        connection = begin(api, stream=True)
        job_id = api.worker.jobs[0].job_id
        wait_for(lambda: client.xlen(names.journal(job_id)) > 8000, 60)
        api.follow(words)
        began_at = time.monotonic()
        assert api.chat(model=MODEL).status == 200
        assert time.monotonic() - began_at < 1
        assert api.pool.rss_bytes()["api"] - before < 12_000_000
    answer = read_response(connection)
    connection.close()
    assert answer.frames[-1] == "[DONE]"
    assert sum(len(f["choices"][0]["delta"].get("content", "")) for f in answer.frames[:-1]) == 8_000_000


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT])
def test_a_shutdown_ends_streams(with_signal: signal.Signals) -> None:
    """A stream that outlasts the drain ends with an error frame, and its job is cancelled; Ctrl-C does not drain."""
    with api_pool({"MLXPOOL_DRAIN_SECONDS": "0" if with_signal == signal.SIGTERM else "30"}) as api:
        api.follow(endless)
        connection = begin(api, stream=True)
        time.sleep(0.2)
        master = api.pool.pids("api")[0]
        os.kill(master, with_signal)
        data = b"".join(iter(lambda: connection.recv(65536), b""))
        connection.close()
        job_id = api.worker.jobs[0].job_id
        assert b'"code":"shutting_down"' in data
        wait_for(lambda: job_id in api.worker.cancelled)


def test_a_shutdown_drains() -> None:
    """A stream that ends within the drain is complete."""
    with api_pool({"MLXPOOL_DRAIN_SECONDS": "10"}) as api:
        api.follow(lambda job: words(job, ["a"] * 40, pause=0.03))
        connection = begin(api, stream=True)
        os.kill(api.pool.pids("api")[0], signal.SIGTERM)
        answer: Response = read_response(connection)
        connection.close()
        assert answer.frames[-1] == "[DONE]"
        assert len(answer.frames) == 43
