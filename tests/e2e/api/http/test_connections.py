"""Connections over raw sockets: timeouts, malformed HTTP, refused bodies, and clients that disconnect or stop reading."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
import redis

from api.http.connection import LINGER_BYTES, LINGER_SECONDS
from common.protocol import Delta, Event, Finished, GenerationJob, Started, Usage
from tests.e2e.api_pool import MODEL, ApiPool, Response, api_pool, chat_body, read_response, request
from tests.fake_worker import words
from tests.redis.pool_of_workers import wait_until

HEADER_SECONDS = 0.5
TAKE_SECONDS = 2.0
MAX_BODY_BYTES = 100_000
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LIVEZ = request("GET", "/livez")
SECRET = b"swordfish"


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    environ = {
        "MLXPOOL_HEADER_SECONDS": str(HEADER_SECONDS),
        "MLXPOOL_TAKE_SECONDS": str(TAKE_SECONDS),
        "MLXPOOL_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    }
    with api_pool(environ) as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


def last_response(connection: socket.socket) -> Response:
    """The next response; the server has to close the connection after it."""
    answer = read_response(connection)
    assert connection.recv(1) == b""
    return answer


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"G",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a",
    ],
    ids=["nothing", "empty line", "byte", "headers", "half a header"],
)
def test_incomplete_headers_time_out(api: ApiPool, sent: bytes) -> None:
    """408 in OpenAI's error format, then the connection is closed; also for a later request of the connection."""
    with api.connect() as first, api.connect() as second:
        first.sendall(sent)
        second.sendall(LIVEZ + sent)
        answer = last_response(first)
        later = second.makefile("rb").read() if sent else b""
    assert (answer.status, answer.error["type"]) == (408, "invalid_request_error")
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"].startswith("req_")
    if sent:
        assert later.startswith(b"HTTP/1.1 200")
        assert later.count(b"HTTP/1.1 408") == 1


def trickle(connection: socket.socket, data: bytes) -> None:
    """Send byte by byte until there is a response."""
    for byte in data:
        connection.sendall(bytes([byte]))
        if select.select([connection], [], [], 0.02)[0]:
            return


def test_headers_that_trickle(api: ApiPool) -> None:
    """Headers that arrive one byte at a time do not extend the timeout."""
    with api.connect() as connection:
        trickle(connection, b"GET /livez HTTP/1.1\r\nX: " + b"x" * 500)
        assert last_response(connection).status == 408


def test_slow_headers_do_not_block_others(api: ApiPool) -> None:
    """Another client is served next to sixty slow ones, which then time out."""
    slow = [api.connect() for _ in range(60)]
    for connection in slow:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert api.chat().status == 200
    assert {last_response(connection).status for connection in slow} == {408}
    for connection in slow:
        connection.close()


def test_headers_in_pieces(api: ApiPool) -> None:
    """Headers may arrive byte by byte within the timeout, also on a connection that was idle for longer than it."""
    with api.connect() as connection:
        for _ in range(2):
            for byte in LIVEZ:
                connection.sendall(bytes([byte]))
            assert read_response(connection).status == 200
            time.sleep(1.5 * HEADER_SECONDS)
        connection.sendall(request("POST", "/v1/chat/completions", chat_body()))
        assert read_response(connection).status == 200


def slow_words(_job: GenerationJob) -> Iterator[Event | float]:
    """A response that takes longer than `HEADER_SECONDS`."""
    yield Started(0, 5)
    yield Delta(1, 1, "a")
    yield 1.5 * HEADER_SECONDS
    yield Finished(2, "stop", Usage(5, 1))


def test_the_header_timeout_is_for_headers_only(api: ApiPool) -> None:
    """It does not end a slow response or a slow body, nor count while the next request's headers wait behind a body."""
    api.follow(slow_words)
    for stream in (True, False):
        assert api.chat(stream=stream).status == 200
    body = chat_body()
    api.follow(words)
    with api.connect() as connection:
        connection.sendall(request("POST", "/v1/chat/completions", body)[: -len(body)])
        time.sleep(1.5 * HEADER_SECONDS)
        connection.sendall(body + LIVEZ[:10])
        assert read_response(connection).status == 200
        connection.sendall(LIVEZ[10:])
        assert read_response(connection).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n", 431),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 100 + b"\r\n", 431),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 100_000 + b"\r\n", 431),
        (b"A" * 1_000_000, 414),
        (POST + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\n", 400),
        (POST + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n", 413),
        (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
        (POST + b"Content-Length: +2\r\n\r\n{}", 400),
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: identity\r\n\r\n{}", 400),
        (CHUNKED + b"zz\r\nab\r\n0\r\n\r\n", 400),
        (CHUNKED + b"-5\r\nab\r\n0\r\n\r\n", 400),
        (CHUNKED + b"2\r\n{}XX0\r\n\r\n", 400),
        (CHUNKED + b"0" * 1_000_000, 400),
        (CHUNKED + b"2;a=" + b"b" * 1_000_000 + b"\r\n{}\r\n0\r\n\r\n", 400),
        (CHUNKED + b"2\r\n{}\r\n0\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n", 431),
        (b"GET /livez HTTP/1.1\nHost: localhost\n\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\n" * 200, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (SECRET + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / " + SECRET + b"\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nAuthorization Bearer " + SECRET + b": x\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: " + SECRET + b"\r\n\r\n", 501),
    ],
    ids=[
        "long header",
        "101 headers",
        "100001 headers",
        "long line",
        "length of 5000 digits",
        "length of 31 digits",
        "two lengths",
        "signed length",
        "length and chunks",
        "identity",
        "chunk size",
        "negative chunk",
        "chunk end",
        "long chunk size",
        "long chunk extension",
        "long trailer",
        "no carriage return",
        "TLS",
        "HTTP/2",
        "secret method",
        "secret version",
        "secret in a name",
        "secret coding",
    ],
)
def test_malformed_http(api: ApiPool, sent: bytes, status: int) -> None:
    """One error in OpenAI's format that quotes nothing of the request, then the connection ends; no traceback, no job."""
    log = api.pool.log("api")
    with api.connect() as connection:
        connection.sendall(sent)
        answer = last_response(connection)
    kind = "server_error" if status == 501 else "invalid_request_error"
    assert (answer.status, answer.error["type"]) == (status, kind)
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"].startswith("req_")
    assert "access-control-allow-origin" not in answer.headers, "the origin is unknown"
    assert SECRET not in answer.body
    assert "Traceback" not in api.pool.log("api")[len(log) :]
    assert api.worker.jobs == []


@pytest.mark.parametrize("trailer", [b"", b"X-Checksum: 1\r\n"])
@pytest.mark.parametrize("extension", [b"", b";name=value"])
@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_a_chunked_body_without_a_length(
    api: ApiPool, trailer: bytes, extension: bytes, expect: bytes
) -> None:
    """With extensions and trailers, and with 100 Continue if the client expects it."""
    body = chat_body()
    with api.connect() as connection:
        connection.sendall(POST + expect + b"Transfer-Encoding: chunked\r\n\r\n")
        if expect:
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"%x%s\r\n%s\r\n0\r\n%s\r\n" % (len(body), extension, body, trailer))
        assert read_response(connection).status == 200
        connection.sendall(LIVEZ)
        assert read_response(connection).status == 200


@pytest.mark.parametrize("size", [150_000, 5_000_000])
def test_the_connection_ends_after_a_refused_body(api: ApiPool, size: int) -> None:
    """The 413 has `Connection: close`, and the server closes, even if the complete body arrived."""
    with api.connect() as connection:
        connection.sendall(request("POST", "/v1/completions", b"x" * size))
        answer = last_response(connection)
    assert (answer.status, answer.headers["connection"]) == (413, "close")


@pytest.mark.parametrize("is_chunked", [True, False])
def test_the_largest_body(api: ApiPool, is_chunked: bool) -> None:
    """A body of exactly the limit is accepted, one byte more is not."""
    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)):
        body = chat_body().ljust(size)
        sent = CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (size, body)
        with api.connect() as connection:
            connection.sendall(sent if is_chunked else request("POST", "/v1/chat/completions", body))
            assert read_response(connection).status == status


def test_a_refused_client_is_not_kept_waiting(api: ApiPool) -> None:
    """The response and the end of the stream come at once; what the client sends later is still accepted for a while."""
    with api.connect() as connection:
        connection.settimeout(1)  # less than LINGER_SECONDS
        connection.sendall(POST + b"Content-Length: 99999999\r\n\r\n")
        assert last_response(connection).status == 413
        for _ in range(20):
            connection.sendall(b"x" * 100_000)


def is_reset_within(connection: socket.socket, max_bytes: int, piece: bytes, pause: float) -> bool:
    """Whether sending fails before `max_bytes` were sent."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < max_bytes:
            sent += connection.send(piece)
            time.sleep(pause)
        return False
    return True


def test_a_refused_client_that_keeps_sending(api: ApiPool) -> None:
    """Its data is discarded up to `LINGER_BYTES` and `LINGER_SECONDS`, then the connection is reset."""
    pause = 0.05
    for max_bytes, piece in ((3 * LINGER_BYTES, b"x" * 1_000_000), (int(10 * LINGER_SECONDS / pause), b"x")):
        with api.connect() as connection:
            connection.sendall(POST + b"Content-Length: 99999999999\r\n\r\n")
            assert is_reset_within(connection, max_bytes, piece, 0 if len(piece) > 1 else pause)


def test_a_connection_is_kept_after_a_400(api: ApiPool) -> None:
    """If the body was read to its end, the next request can follow."""
    with api.connect() as connection:
        for body, status in [(b"{", 400), (chat_body(), 200), (chat_body(temperature=9), 400)]:
            connection.sendall(request("POST", "/v1/chat/completions", body))
            answer = read_response(connection)
            assert (answer.status, answer.headers.get("connection")) == (status, None)


NUM_RESPONSES = 400
"""Of about 60 KB each: more than the sockets' buffers hold."""


def request_many(connection: socket.socket) -> None:
    connection.sendall(request("GET", "/openapi.json") * NUM_RESPONSES)


def read_slowly(connection: socket.socket, slow_seconds: float = 0.0) -> int:
    """The number of responses that arrive if the client first reads little at a time for `slow_seconds`."""
    count, rest = 0, b""
    fast_at = time.monotonic() + slow_seconds
    with contextlib.suppress(ConnectionError):
        while count < NUM_RESPONSES:
            is_slow = time.monotonic() < fast_at
            data = connection.recv(5_000 if is_slow else 500_000)
            if not data:
                break
            count += (rest + data).count(b"HTTP/1.1 200")
            rest = data[-11:]
            if is_slow:
                time.sleep(0.02)
    return count


def test_a_client_that_stops_reading(api: ApiPool) -> None:
    """It is disconnected; a client that reads slowly is not, even below what the kernel counts as progress."""
    with api.connect() as idle, api.connect() as slow:
        request_many(idle)
        request_many(slow)
        assert read_slowly(slow, 2.5 * TAKE_SECONDS) == NUM_RESPONSES
        wait_until(lambda: not connections_of(api, idle))
        assert read_slowly(idle) < NUM_RESPONSES


def test_a_stream_that_is_not_read(api: ApiPool) -> None:
    """The connection is closed and the job cancelled."""
    api.follow(lambda job: words(job, ["x" * 1000] * 20_000))
    with api.connect() as connection:
        connection.sendall(request("POST", "/v1/chat/completions", chat_body(stream=True)))
        wait_until(lambda: not connections_of(api, connection))
    wait_until(lambda: json.loads(api.ask("GET", "/health").body)["open_requests"] == 0)


def connections_of(api: ApiPool, client: socket.socket) -> list[object]:
    """The server's side of a client's connection, if it is open."""
    port = client.getsockname()[1]
    return [
        each
        for pid in api.pool.pids("api")
        for each in psutil.Process(pid).net_connections()
        if each.raddr and each.raddr.port == port
    ]


@pytest.mark.parametrize("is_reset", [True, False])
@pytest.mark.parametrize(
    "sent",
    [POST + b"Content-Length: 500\r\n\r\n{", CHUNKED, CHUNKED + b"5\r\n{", CHUNKED + b"1\r\n{\r\n"],
    ids=["length", "no chunk", "half a chunk", "chunk"],
)
def test_a_disconnect_during_the_body(api: ApiPool, sent: bytes, is_reset: bool) -> None:
    """Nothing reaches the queue or a worker, and the next request is served."""
    log = api.pool.log("api")
    connection = api.connect()
    connection.sendall(sent)
    if is_reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    assert api.chat(model=MODEL).status == 200
    assert len(api.worker.jobs) == 1
    with redis.Redis.from_url(api.pool.redis_url) as client:
        assert client.keys("rq:queue:*") == []
    assert json.loads(api.ask("GET", "/health").body)["open_requests"] == 0
    assert "Traceback" not in api.pool.log("api")[len(log) :]
