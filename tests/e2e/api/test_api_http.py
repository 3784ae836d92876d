"""What goes over the wire, down to headers and half-sent bodies: gunicorn and the app as they are deployed."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from common.protocol import Delta, Event, Finished, GenerationJob, Started, Usage
from tests.e2e.api_pool import MODEL, ApiPool, api_pool, chat_body, read_response, request
from tests.fake_worker import WORDS, words

MAX_BODY_BYTES = 100_000
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    environ = {
        "MLXPOOL_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        "MLXPOOL_SSE_COMMENT_SECONDS": "0.5",
        "MLXPOOL_SSE_HEADER_SECONDS": "0.4",
    }
    with api_pool(environ) as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_chat_with_and_without_v1(api: ApiPool, path: str) -> None:
    """Both roots lead to the same."""
    answer = api.ask("POST", path, chat_body(), content_type="application/json")
    assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, "".join(WORDS))


@pytest.mark.parametrize("path", ["/v1/completions", "/completions"])
def test_completions_with_and_without_v1(api: ApiPool, path: str) -> None:
    """Both roots lead to the same."""
    answer = api.ask("POST", path, b'{"prompt":"hi"}', content_type="application/json")
    assert (answer.status, answer.json["choices"][0]["text"]) == (200, "".join(WORDS))


@pytest.mark.parametrize(
    "path", ["/v1/models/org/fake:%201", "/v1/models/org%2Ffake:%201", "/models/org%2ffake%3A%201"]
)
def test_a_model_by_its_path(api: ApiPool, path: str) -> None:
    """A slash in an id is a slash, or encoded."""
    answer = api.ask("GET", path)
    assert (answer.status, answer.json["id"], answer.json["object"]) == (200, MODEL, "model")
    assert answer.json["context_length"] == 4096


@pytest.mark.parametrize(
    "path", ["/v1/models", "/models", "/v1/models/org/fake:%201", "/health", "/livez", "/readyz"]
)
def test_get_and_head(api: ApiPool, path: str) -> None:
    """Each GET is JSON, and its HEAD says the same without the body."""
    got, head = api.ask("GET", path), api.ask("HEAD", path)
    assert (got.status, head.status) == (200, 200)
    assert got.headers["content-type"] == head.headers["content-type"] == "application/json"
    assert head.headers["content-length"] == str(len(got.body))
    assert got.json


def test_health(api: ApiPool) -> None:
    """What a supervisor wants to know at a glance."""
    health = api.ask("GET", "/health").json
    assert (health["status"], health["redis"], health["models"], health["workers"]) == ("ok", True, 1, 1)


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/nothing", "/v1/chat", "/v2/models", "/v1/chat/completions/x", "/%ff"]
)
def test_an_unknown_path(api: ApiPool, path: str) -> None:
    """404 in OpenAI's form."""
    answer = api.ask("GET", path)
    assert (answer.status, answer.error["type"], answer.error["param"]) == (
        404,
        "invalid_request_error",
        None,
    )


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/v1/models/x", "GET"),
        ("POST", "/livez", "GET"),
        ("BREW", "/v1/completions", "POST"),
    ],
)
def test_a_wrong_method(api: ApiPool, method: str, path: str, allowed: str) -> None:
    """405 in OpenAI's form, and what is allowed."""
    answer = api.ask(method, path)
    assert (answer.status, answer.error["type"]) == (405, "invalid_request_error")
    assert allowed in answer.headers["allow"].split(", ")


def test_request_ids(api: ApiPool) -> None:
    """The client's where it is sane; one of ours, a new one each time, on everything else."""
    assert api.ask("GET", "/health", x_request_id="abc-1.2").headers["x-request-id"] == "abc-1.2"
    ids = [
        api.ask("GET", path, **headers).headers["x-request-id"]
        for path, headers in [
            ("/health", {}),
            ("/nothing", {}),
            ("/health", {"x_request_id": "a b"}),
            ("/health", {"x_request_id": "x" * 500}),
        ]
    ]
    ids += [api.chat().headers["x-request-id"], api.chat(stream=True).headers["x-request-id"]]
    assert len(set(ids)) == 6
    assert all(id_.startswith("req_") for id_ in ids)


def test_preflight(api: ApiPool) -> None:
    """A browser may call: any origin by default, authorization by name, what it asked for, and what it may read."""
    answer = api.ask(
        "OPTIONS",
        "/v1/chat/completions",
        origin=ORIGIN,
        access_control_request_method="POST",
        access_control_request_headers="authorization,content-type,x-stainless-os",
    )
    headers = answer.headers
    assert (answer.status, headers["access-control-allow-origin"]) == (200, "*")
    assert "POST" in headers["access-control-allow-methods"]
    allowed = headers["access-control-allow-headers"].split(", ")
    assert {"authorization", "content-type", "x-stainless-os"} <= set(allowed)
    for got in (api.ask("GET", "/v1/models", origin=ORIGIN), api.ask("GET", "/nothing", origin=ORIGIN)):
        assert got.headers["access-control-allow-origin"] == "*"
        assert "x-request-id" in got.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/x/y", "/v1/completions", "/health", "/livez", "/readyz"]
)
def test_options_everywhere(api: ApiPool, path: str) -> None:
    """Each route answers it."""
    answer = api.ask("OPTIONS", path)
    assert answer.status == 200
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_body_of_another_type(api: ApiPool, kind: str) -> None:
    """415, whatever is in it."""
    answer = api.ask("POST", "/v1/chat/completions", chat_body(), content_type=kind)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")


def test_a_compressed_body(api: ApiPool) -> None:
    """415, which says so (RFC 9110, section 8.4), not that the JSON is none; what is not compressed may say that."""
    answer = api.ask("POST", "/v1/chat/completions", gzip.compress(chat_body()), content_encoding="gzip")
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert "gzip" in answer.error["message"]
    plain = api.ask("POST", "/v1/chat/completions", chat_body(), content_encoding="identity")
    assert plain.status == 200


@pytest.mark.parametrize(
    "headers", [{}, {"content_type": "application/json; charset=utf-8"}, {"content_type": "Application/JSON"}]
)
def test_json_by_any_name(api: ApiPool, headers: dict[str, str]) -> None:
    """With parameters, in any case, or not said at all."""
    assert api.ask("POST", "/v1/chat/completions", chat_body(), **headers).status == 200


def test_a_body_that_is_too_large_is_refused_unread(api: ApiPool) -> None:
    """413 comes while nothing of the body was sent."""
    with api.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        answer = read_response(connection)
    assert (answer.status, answer.error["type"]) == (413, "invalid_request_error")
    assert answer.headers["connection"] == "close"


def test_a_body_that_is_too_large_and_sent_all_the_same(api: ApiPool) -> None:
    """Its client reads the 413: the connection is not reset under it."""
    answer = api.ask("POST", "/v1/completions", b"x" * 30_000_000, content_type="application/json")
    assert answer.status == 413


def test_a_chunked_body_that_grows_too_large(api: ApiPool) -> None:
    """Reading stops at the limit."""
    with api.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(11):
            connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        answer = read_response(connection)
    assert answer.status == 413


def test_a_chunked_body(api: ApiPool) -> None:
    """In as many pieces as it likes."""
    with api.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for byte in chat_body():
            connection.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert read_response(connection).status == 200


def test_expect_100_continue(api: ApiPool) -> None:
    """A body that is wanted is asked for, one that is too large is refused without it."""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    )
    body = chat_body()
    with api.connect() as connection:
        connection.sendall(head % len(body))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n")
        connection.sendall(body)
        assert read_response(connection).status == 200
    with api.connect() as connection:
        connection.sendall(head % 99_999_999)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_one_connection_for_many_requests(api: ApiPool) -> None:
    """Plain, streamed, refused and missing ones, one after another and pipelined."""
    wrong = request("POST", "/v1/chat/completions", chat_body(temperature=5))
    good = request("POST", "/v1/chat/completions", chat_body(stream=True))
    with api.connect() as connection:
        for sent, status in [(good, 200), (wrong, 400), (request("GET", "/nothing"), 404), (good, 200)]:
            connection.sendall(sent)
            assert read_response(connection).status == status
    with api.connect() as connection:
        connection.sendall(good + wrong)
        data = b""
        while b"HTTP/1.1 400" not in data:
            data += connection.recv(65536)
        assert data.startswith(b"HTTP/1.1 200")
        assert data.index(b"data: [DONE]") < data.index(b"HTTP/1.1 400")


def test_a_stream_on_the_wire(api: ApiPool) -> None:
    """Its headers keep proxies from storing or holding it back; it ends with [DONE], once."""
    answer = api.chat(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
    assert answer.body.count(b"[DONE]") == 1


def slow(_job: GenerationJob) -> Iterator[Event | float]:
    yield 1.5
    yield Started(0, 5)
    yield Delta(1, 1, "a")
    yield 2.3
    yield Delta(2, 2, "b")
    yield Finished(3, "stop", Usage(5, 2))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_slow_answer_does_not_look_dead(api: ApiPool, path: str) -> None:
    """Headers go out though nothing has come yet, and comments fill the silence."""
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
        (chat_body(store=True), "store"),
    ],
    ids=["empty", "broken", "array", "bytes", "deep", "type", "vocabulary", "unsupported"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_reaches_nobody(api: ApiPool, body: bytes, param: str | None, stream: bool) -> None:
    """A 400 in OpenAI's form, also for a stream; nothing is put into a queue."""
    if stream and body.startswith(b'{"messages"'):
        body = body[:-1] + b',"stream":true}'
    answer = api.ask("POST", "/v1/chat/completions", body, content_type="application/json")
    assert (answer.status, answer.error["param"]) == (400, param)
    assert "x-should-retry" not in answer.headers
    with redis.Redis.from_url(api.pool.redis_url) as client:
        assert client.keys("rq:queue:*") == []
    assert api.worker.jobs == []


def test_a_token_id_outside_of_the_vocabulary(api: ApiPool) -> None:
    """It is the model's card that says what is inside."""
    ask: Any = lambda ids: api.ask("POST", "/v1/completions", json.dumps({"prompt": ids}).encode())  # noqa: E731
    assert ask([0, 999]).status == 200
    refused = ask([0, 1000])
    assert (refused.status, refused.error["param"]) == (400, "prompt")


def test_fields_that_nobody_knows(api: ApiPool) -> None:
    """They are named in a header, and break nothing there."""
    answer = api.chat(**{"zzz": 1, "a\r\nb": 2, "é": 3})
    assert (answer.status, answer.headers["x-ignored-parameters"]) == (200, "zzz, a??b, ?")
    assert "x-ignored-parameters" not in api.chat().headers


def test_the_models_name_is_echoed(api: ApiPool) -> None:
    """As asked, or as it is where nobody asked."""
    assert api.chat(model=MODEL).json["model"] == MODEL
    assert api.chat(model="default_model").json["model"] == "default_model"
    assert api.chat().json["model"] == MODEL
    assert api.chat(model=None).json["model"] == MODEL


@pytest.mark.parametrize("target", ["/v1/models?%ff=%fe", "/health?a&&=;", "/v1/models?" + "a" * 5000])
def test_odd_queries_change_nothing(api: ApiPool, target: str) -> None:
    """There are none that we read."""
    with api.connect() as connection:
        connection.sendall(request("GET", target))
        assert read_response(connection).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health?x=\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    ],
    ids=["line", "bytes", "header", "length", "long line", "long header"],
)
def test_what_is_not_http(api: ApiPool, sent: bytes, status: int) -> None:
    """Refused by the server, before the app: in OpenAI's form all the same."""
    with api.connect() as connection:
        connection.sendall(sent)
        answer = read_response(connection)
    assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
    assert answer.headers["x-request-id"]


def test_half_a_body_bothers_nobody(api: ApiPool) -> None:
    """Thirty clients that send half a request and wait, or leave, while another is served."""
    head = request("POST", "/v1/chat/completions", chat_body())
    halves = [api.connect() for _ in range(30)]
    for half in halves:
        half.sendall(head[:-5])
    assert api.chat().status == 200
    for half in halves:
        half.close()
    assert api.chat().status == 200
    assert len(api.worker.jobs) == 2


def test_http_1_0(api: ApiPool) -> None:
    """An old client gets its stream, ended by the end of the connection."""
    body = chat_body(stream=True)
    with api.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    assert data.endswith(b"data: [DONE]\n\n")


def test_a_strict_api_with_its_own_origins() -> None:
    """Unknown fields are a 400, other origins get no leave, and there is a default model."""
    environ = {
        "MLXPOOL_STRICT_PARAMETERS": "1",
        "MLXPOOL_CORS_ORIGINS": f"https://other.example, {ORIGIN}",
        "MLXPOOL_DEFAULT_MODEL": "not there",
    }
    with api_pool(environ) as api:
        refused = api.chat(model=MODEL, zzz=1)
        assert (refused.status, refused.error["param"], refused.error["code"]) == (
            400,
            "zzz",
            "unknown_parameter",
        )
        unserved = api.chat()
        assert (unserved.status, unserved.error["code"]) == (503, "model_unavailable")
        assert int(unserved.headers["retry-after"]) >= 1
        allowed = api.ask("GET", "/health", origin=ORIGIN).headers
        assert (allowed["access-control-allow-origin"], allowed["vary"]) == (ORIGIN, "Origin")
        for headers in ({"origin": "https://evil.example"}, {}):
            assert "access-control-allow-origin" not in api.ask("GET", "/health", **headers).headers
        with api.connect() as connection:
            connection.sendall(b"no HTTP\r\n\r\n")
            assert "access-control-allow-origin" not in read_response(connection).headers


def test_a_websocket_is_refused(api: ApiPool) -> None:
    """An upgrade on any path is no request of ours: 403, and the server lives."""
    upgrade = {"upgrade": "websocket", "connection": "Upgrade", "sec_websocket_version": "13"}
    response = api.ask("GET", "/v1/models", sec_websocket_key="dGhlIHNhbXBsZSBub25jZQ==", **upgrade)
    assert response.status == 403
    assert api.ask("GET", "/v1/models").status == 200
