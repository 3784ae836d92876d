"""Event streams over the wire: their headers, comments and end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from common.protocol import Delta, Event, Finished, GenerationJob, Started, Usage
from tests.e2e.api_pool import ApiPool, api_pool, chat_body, request
from tests.fake_worker import words


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    with api_pool({"MLXPOOL_SSE_COMMENT_SECONDS": "0.5", "MLXPOOL_SSE_HEADER_SECONDS": "0.4"}) as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


def test_a_stream_on_the_wire(api: ApiPool) -> None:
    """Headers keep proxies from caching or buffering it; it ends with one [DONE]."""
    answer = api.chat(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.body.endswith(b"\ndata: [DONE]\n\n")
    assert answer.body.count(b"[DONE]") == 1


def slow(_job: GenerationJob) -> Iterator[Event | float]:
    """Pauses before the first token and between tokens."""
    yield 1.5
    yield Started(0, 5)
    yield Delta(1, 1, "a")
    yield 2.3
    yield Delta(2, 2, "b")
    yield Finished(3, "stop", Usage(5, 2))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_comments_while_nothing_is_generated(api: ApiPool, path: str) -> None:
    """Headers are sent before the first token, and comments keep the connection alive."""
    api.follow(slow)
    body = json.dumps(
        {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "stream": True}
    ).encode()
    began_at = time.monotonic()
    with api.connect() as connection:
        connection.sendall(request("POST", path, body))
        assert connection.recv(12) == b"HTTP/1.1 200"
        assert time.monotonic() - began_at < 0.9
        data = b""
        while b"[DONE]" not in data:
            data += connection.recv(65536)
    assert data.count(b": keep-alive\n\n") >= 2
    assert b'"a"' in data
    assert b'"b"' in data


def test_http_1_0_stream(api: ApiPool) -> None:
    """The stream is not chunked and ends with the connection."""
    body = chat_body(stream=True)
    with api.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    assert data.endswith(b"data: [DONE]\n\n")
