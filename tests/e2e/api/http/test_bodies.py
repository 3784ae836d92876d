"""Request bodies over the wire: types, sizes, framing, and what is refused before it reaches a queue."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.e2e.api_pool import ApiPool, api_pool, chat_body, read_response, request
from tests.fake_worker import words

MAX_BODY_BYTES = 100_000


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    with api_pool({"MLXPOOL_MAX_BODY_BYTES": str(MAX_BODY_BYTES)}) as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_body_of_another_type(api: ApiPool, kind: str) -> None:
    """415, whatever the body holds: a browser sends these types without a preflight."""
    answer = api.ask("POST", "/v1/chat/completions", chat_body(), content_type=kind)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")


def test_a_compressed_body(api: ApiPool) -> None:
    """415 that names the coding (RFC 9110, section 8.4) rather than a 400 for broken JSON; `identity` is accepted."""
    answer = api.ask("POST", "/v1/chat/completions", gzip.compress(chat_body()), content_encoding="gzip")
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert "gzip" in answer.error["message"]
    plain = api.ask("POST", "/v1/chat/completions", chat_body(), content_encoding="identity")
    assert plain.status == 200


@pytest.mark.parametrize(
    "headers", [{}, {"content_type": "application/json; charset=utf-8"}, {"content_type": "Application/JSON"}]
)
def test_json_content_types(api: ApiPool, headers: dict[str, str]) -> None:
    """With parameters, in any case, or without a content type."""
    assert api.ask("POST", "/v1/chat/completions", chat_body(), **headers).status == 200


def test_a_too_large_body_is_refused_unread(api: ApiPool) -> None:
    """413 by its Content-Length, before any of the body was sent."""
    with api.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n"
        )
        answer = read_response(connection)
    assert (answer.status, answer.error["type"]) == (413, "invalid_request_error")
    assert answer.headers["connection"] == "close"


def test_a_too_large_body_that_is_sent_anyway(api: ApiPool) -> None:
    """The client can read the 413: the connection is not reset while it sends."""
    answer = api.ask("POST", "/v1/completions", b"x" * 30_000_000, content_type="application/json")
    assert answer.status == 413


def test_a_chunked_body_that_grows_too_large(api: ApiPool) -> None:
    """Reading stops at the limit."""
    with api.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(11):
            connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        answer = read_response(connection)
    assert answer.status == 413


def test_a_chunked_body(api: ApiPool) -> None:
    """Chunks of one byte each."""
    with api.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for byte in chat_body():
            connection.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert read_response(connection).status == 200


def test_expect_100_continue(api: ApiPool) -> None:
    """100 Continue for an acceptable body, a 413 in its place for one that is too large."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    body = chat_body()
    with api.connect() as connection:
        connection.sendall(head % len(body))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n")
        connection.sendall(body)
        assert read_response(connection).status == 200
    with api.connect() as connection:
        connection.sendall(head % 99_999_999)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b'{"unknown":' + b"[" * 40_000 + b"]" * 40_000 + b"}", None),
        (chat_body(temperature="hot"), "temperature"),
        (chat_body(logit_bias={"1000": 1}), "logit_bias"),
        (chat_body(web_search_options={}), "web_search_options"),
    ],
    ids=["empty", "broken", "array", "bytes", "deep", "type", "vocabulary", "unsupported"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_reaches_no_queue(
    api: ApiPool, body: bytes, param: str | None, stream: bool
) -> None:
    """A 400 in OpenAI's error format, also if a stream was requested; nothing is enqueued."""
    if stream and body.startswith(b'{"messages"'):
        body = body[:-1] + b',"stream":true}'
    answer = api.ask("POST", "/v1/chat/completions", body, content_type="application/json")
    assert (answer.status, answer.error["param"]) == (400, param)
    assert "x-should-retry" not in answer.headers
    with redis.Redis.from_url(api.pool.redis_url) as client:
        assert client.keys("rq:queue:*") == []
    assert api.worker.jobs == []


def test_a_token_id_outside_of_the_vocabulary(api: ApiPool) -> None:
    """The model card has the vocabulary size that token ids are checked against."""
    ask: Any = lambda ids: api.ask("POST", "/v1/completions", json.dumps({"prompt": ids}).encode())  # noqa: E731
    assert ask([0, 999]).status == 200
    refused = ask([0, 1000])
    assert (refused.status, refused.error["param"]) == (400, "prompt")


def test_unknown_fields(api: ApiPool) -> None:
    """They are listed in a header, with unsafe characters replaced."""
    answer = api.chat(**{"zzz": 1, "a\r\nb": 2, "é": 3})
    assert (answer.status, answer.headers["x-ignored-parameters"]) == (200, "zzz, a??b, ?")
    assert "x-ignored-parameters" not in api.chat().headers


def test_incomplete_bodies_do_not_block_others(api: ApiPool) -> None:
    """Thirty clients send a part of their request and wait, or disconnect; others are served meanwhile."""
    sent = request("POST", "/v1/chat/completions", chat_body())
    incomplete = [api.connect() for _ in range(30)]
    for client in incomplete:
        client.sendall(sent[:-5])
    assert api.chat().status == 200
    for client in incomplete:
        client.close()
    assert api.chat().status == 200
    assert len(api.worker.jobs) == 2
