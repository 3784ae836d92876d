"""Deadlines and a full queue, as a client sees them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from common import connections
from common.protocol import Delta, Event, GenerationJob, Started
from common.rq import JsonQueue
from tests.e2e.api_pool import MODEL, ApiPool, api_pool, chat_body, read_response, request
from tests.fake_worker import FakeWorker
from tests.redis.pool_of_workers import wait_until


@pytest.fixture(scope="module")
def api() -> Iterator[ApiPool]:
    environ = {"MLXPOOL_MAX_QUEUED_REQUESTS": "2", "MLXPOOL_REQUEST_SECONDS": "30"}
    with api_pool(environ) as running:
        yield running


def endless(_job: GenerationJob) -> Iterator[Event | float]:
    yield Started(0, 5)
    yield Delta(1, 1, " one")
    yield 60.0


def test_a_deadline(api: ApiPool) -> None:
    """A request that is not streamed ends with a 504, a stream with an error frame; its job is cancelled and no retry advised."""
    api.follow(endless)
    began_at = time.monotonic()
    answer = api.ask("POST", "/v1/chat/completions", chat_body(model=MODEL), x_request_timeout="0.5")
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert 0.5 <= time.monotonic() - began_at < 5
    stream = api.ask(
        "POST", "/v1/chat/completions", chat_body(model=MODEL, stream=True), x_request_timeout="0.5"
    )
    assert stream.status == 200
    assert stream.frames[-1]["error"]["code"] == "deadline_exceeded"
    assert b" one" in stream.body
    wait_until(lambda: len(api.worker.cancelled) == 2)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "31", "1e400", "nan", "inf", "0x10", ""])
def test_an_invalid_deadline(api: ApiPool, value: str) -> None:
    """A 400 that names the header; nothing is enqueued."""
    api.follow(endless)
    refused = api.ask("POST", "/v1/chat/completions", chat_body(model=MODEL), x_request_timeout=value)
    assert refused.status == 400
    assert refused.error["param"] == "X-Request-Timeout"
    assert api.worker.jobs == []


def test_a_full_queue(api: ApiPool) -> None:
    """A request beyond the limit is a 429 with `Retry-After`; a disconnect or a deadline makes room again."""
    with connections.connect(api.pool.redis_url) as client:
        queue = JsonQueue("slow", connection=client)
        idle_worker = FakeWorker(api.pool.redis_url, "slow")  # shows a card but takes no job
        idle_worker.show_card()
        waiting = []
        for _ in range(2):
            waiting.append(api.connect())
            waiting[-1].sendall(request("POST", "/v1/chat/completions", chat_body(model="slow", stream=True)))
        wait_until(lambda: queue.count == 2)
        refused = api.chat(model="slow")
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert "x-should-retry" not in refused.headers
        assert queue.count == 2
        waiting[0].close()
        wait_until(lambda: queue.count == 1)
        idle_worker.show_card()
        with api.connect() as third:
            third.sendall(
                request("POST", "/v1/chat/completions", chat_body(model="slow"), x_request_timeout="1")
            )
            wait_until(lambda: queue.count == 2)
            assert read_response(third).status == 504
        wait_until(lambda: queue.count == 1)
        waiting[1].close()
        wait_until(lambda: queue.count == 0)
