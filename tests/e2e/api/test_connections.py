"""The edges of HTTP, over raw sockets: what does not end, what is no HTTP, and clients that leave, or take nothing."""

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

HEAD_SECONDS = 0.5
TAKE_SECONDS = 2.0
MAX_BODY_BYTES = 100_000
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = request("GET", "/livez")
SECRET = b"swordfish"


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    environ = {
        "MLXPOOL_HEADER_SECONDS": str(HEAD_SECONDS),
        "MLXPOOL_TAKE_SECONDS": str(TAKE_SECONDS),
        "MLXPOOL_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    }
    with api_pool(environ) as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


def last_answer(connection: socket.socket) -> Response:
    """What comes on a connection that the server then closes."""
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
def test_a_head_that_does_not_end(api: ApiPool, sent: bytes) -> None:
    """Its connection gets a 408 in OpenAI's form and is closed; so it is as a connection's second one."""
    with api.connect() as first, api.connect() as second:
        first.sendall(sent)
        second.sendall(WHOLE + sent)
        answer = last_answer(first)
        later = second.makefile("rb").read() if sent else b""
    assert (answer.status, answer.error["type"]) == (408, "invalid_request_error")
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"].startswith("req_")
    if sent:
        assert later.startswith(b"HTTP/1.1 200")
        assert later.count(b"HTTP/1.1 408") == 1


def trickle(connection: socket.socket, data: bytes) -> None:
    """Byte by byte, until there is an answer."""
    for byte in data:
        connection.sendall(bytes([byte]))
        if select.select([connection], [], [], 0.02)[0]:
            return


def test_a_head_that_trickles(api: ApiPool) -> None:
    """A byte now and then wins no time."""
    with api.connect() as connection:
        trickle(connection, b"GET /livez HTTP/1.1\r\nX: " + b"x" * 500)
        assert last_answer(connection).status == 408


def test_many_slow_heads_bother_nobody(api: ApiPool) -> None:
    """Sixty of them while another is served; then they are gone."""
    slow = [api.connect() for _ in range(60)]
    for connection in slow:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert api.chat().status == 200
    assert {last_answer(connection).status for connection in slow} == {408}
    for connection in slow:
        connection.close()


def test_a_head_in_pieces(api: ApiPool) -> None:
    """Within its time it may come byte by byte, on a connection that rested longer than a head may take."""
    with api.connect() as connection:
        for _ in range(2):
            for byte in WHOLE:
                connection.sendall(bytes([byte]))
            assert read_response(connection).status == 200
            time.sleep(1.5 * HEAD_SECONDS)
        connection.sendall(request("POST", "/v1/chat/completions", chat_body()))
        assert read_response(connection).status == 200


def slow_words(_job: GenerationJob) -> Iterator[Event | float]:
    """An answer that takes longer than a head may."""
    yield Started(0, 5)
    yield Delta(1, 1, "a")
    yield 1.5 * HEAD_SECONDS
    yield Finished(2, "stop", Usage(5, 1))


def test_answers_and_bodies_have_their_own_time(api: ApiPool) -> None:
    """Neither a slow answer nor a slow body ends with the time for a head; nor does half a head behind it count meanwhile."""
    api.follow(slow_words)
    for stream in (True, False):
        assert api.chat(stream=stream).status == 200
    body = chat_body()
    api.follow(words)
    with api.connect() as connection:
        connection.sendall(request("POST", "/v1/chat/completions", body)[: -len(body)])
        time.sleep(1.5 * HEAD_SECONDS)
        connection.sendall(body + WHOLE[:10])
        assert read_response(connection).status == 200
        connection.sendall(WHOLE[10:])
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
        "no CR",
        "TLS",
        "HTTP/2",
        "secret method",
        "secret version",
        "secret in a name",
        "secret coding",
    ],
)
def test_what_is_not_http_at_all(api: ApiPool, sent: bytes, status: int) -> None:
    """One answer in OpenAI's form that repeats nothing, then the connection's end; no traceback, nothing for a worker."""
    log = api.pool.log("api")
    with api.connect() as connection:
        connection.sendall(sent)
        answer = last_answer(connection)
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
    """With all that a chunked body may have; it is asked for where its client waits to be asked."""
    body = chat_body()
    with api.connect() as connection:
        connection.sendall(POST + expect + b"Transfer-Encoding: chunked\r\n\r\n")
        if expect:
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"%x%s\r\n%s\r\n0\r\n%s\r\n" % (len(body), extension, body, trailer))
        assert read_response(connection).status == 200
        connection.sendall(WHOLE)
        assert read_response(connection).status == 200


@pytest.mark.parametrize("size", [150_000, 5_000_000])
def test_the_connection_ends_with_a_refused_body(api: ApiPool, size: int) -> None:
    """The 413 says so, and so it is, also where all of the body came."""
    with api.connect() as connection:
        connection.sendall(request("POST", "/v1/completions", b"x" * size))
        answer = last_answer(connection)
    assert (answer.status, answer.headers["connection"]) == (413, "close")


@pytest.mark.parametrize("is_chunked", [True, False])
def test_the_largest_body(api: ApiPool, is_chunked: bool) -> None:
    """It may have as many bytes as is said, and not one more."""
    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)):
        body = chat_body().ljust(size)
        sent = CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (size, body)
        with api.connect() as connection:
            connection.sendall(sent if is_chunked else request("POST", "/v1/chat/completions", body))
            assert read_response(connection).status == status


def test_a_refused_client_is_not_kept_waiting(api: ApiPool) -> None:
    """The end comes with the answer, though not a byte of the body did; what comes later is still taken, for a while."""
    with api.connect() as connection:
        connection.settimeout(1)  # the server's patience is longer
        connection.sendall(POST + b"Content-Length: 99999999\r\n\r\n")
        assert last_answer(connection).status == 413
        for _ in range(20):
            connection.sendall(b"x" * 100_000)


def is_reset_within(connection: socket.socket, max_bytes: int, piece: bytes, pause: float) -> bool:
    """Whether sending fails before so much was sent."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < max_bytes:
            sent += connection.send(piece)
            time.sleep(pause)
        return False
    return True


def test_a_refused_client_that_goes_on_and_on(api: ApiPool) -> None:
    """It is listened to up to an amount, and for a time."""
    pause = 0.05
    for max_bytes, piece in ((3 * LINGER_BYTES, b"x" * 1_000_000), (int(10 * LINGER_SECONDS / pause), b"x")):
        with api.connect() as connection:
            connection.sendall(POST + b"Content-Length: 99999999999\r\n\r\n")
            assert is_reset_within(connection, max_bytes, piece, 0 if len(piece) > 1 else pause)


def test_a_connection_goes_on_behind_a_refusal(api: ApiPool) -> None:
    """A body that was read leaves it in order, whatever was in it."""
    with api.connect() as connection:
        for body, status in [(b"{", 400), (chat_body(), 200), (chat_body(temperature=9), 400)]:
            connection.sendall(request("POST", "/v1/chat/completions", body))
            answer = read_response(connection)
            assert (answer.status, answer.headers.get("connection")) == (status, None)


ANSWERS = 400
"""of some 60 KB each: more than the sockets' buffers hold."""


def ask_for_much(connection: socket.socket) -> None:
    connection.sendall(request("GET", "/openapi.json") * ANSWERS)


def take(connection: socket.socket, slow_seconds: float = 0.0) -> int:
    """How many answers come to a client that takes little for a time, and then all."""
    count, rest = 0, b""
    fast_at = time.monotonic() + slow_seconds
    with contextlib.suppress(ConnectionError):
        while count < ANSWERS:
            is_slow = time.monotonic() < fast_at
            data = connection.recv(5_000 if is_slow else 500_000)
            if not data:
                break
            count += (rest + data).count(b"HTTP/1.1 200")
            rest = data[-11:]
            if is_slow:
                time.sleep(0.02)
    return count


def test_a_client_that_takes_nothing(api: ApiPool) -> None:
    """It is cut off; one that takes little at a time is not, though less than the system calls room for more."""
    with api.connect() as idle, api.connect() as slow:
        ask_for_much(idle)
        ask_for_much(slow)
        assert take(slow, 2.5 * TAKE_SECONDS) == ANSWERS
        wait_until(lambda: not connections_of(api, idle))
        assert take(idle) < ANSWERS


def test_a_stream_that_nobody_takes(api: ApiPool) -> None:
    """Its job is cancelled with its connection."""
    api.follow(lambda job: words(job, ["x" * 1000] * 20_000))
    with api.connect() as connection:
        connection.sendall(request("POST", "/v1/chat/completions", chat_body(stream=True)))
        wait_until(lambda: not connections_of(api, connection))
    wait_until(lambda: json.loads(api.ask("GET", "/health").body)["open_requests"] == 0)


def connections_of(api: ApiPool, client: socket.socket) -> list[object]:
    """The server's end of a client's connection."""
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
def test_a_client_that_leaves_in_the_middle_of_its_body(api: ApiPool, sent: bytes, is_reset: bool) -> None:
    """Nothing reaches a worker or the queue, and the next one is served."""
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
