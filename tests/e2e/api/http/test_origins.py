"""What web pages can do with an API without keys: CORS, foreign origins, and host names (DNS rebinding)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.api_pool import MODEL, ApiPool, api_pool, chat_body, read_response, request
from tests.fake_worker import words

LOCAL = "http://localhost:5173"
FOREIGN = "https://evil.example"
CHAT = "/v1/chat/completions"
ALLOW_ORIGIN = "access-control-allow-origin"
PRIVATE_NETWORK = "access-control-allow-private-network"


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    with api_pool() as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(words)
    return running


def test_preflight_of_a_local_page(api: ApiPool) -> None:
    """It allows the origin, authorization by name, and the requested headers; another page cannot use the cached response."""
    preflight = {"access_control_request_method": "POST"}
    preflight["access_control_request_headers"] = "authorization,content-type,x-stainless-os"
    answer = api.ask("OPTIONS", CHAT, origin=LOCAL, **preflight)
    assert (answer.status, answer.headers[ALLOW_ORIGIN], answer.headers["vary"]) == (200, LOCAL, "Origin")
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].split(", ")
    assert {"authorization", "content-type", "x-stainless-os"} <= set(allowed)
    assert PRIVATE_NETWORK not in answer.headers


@pytest.mark.parametrize("origin", [LOCAL, "app://obsidian.md", "vscode-webview://1a2b"])
def test_a_private_network_preflight(api: ApiPool, origin: str) -> None:
    """Chrome asks whether a page may call an address of a private network; allowed origins may."""
    preflight = {"access_control_request_method": "POST", "access_control_request_private_network": "true"}
    answer = api.ask("OPTIONS", CHAT, origin=origin, **preflight)
    assert (answer.status, answer.headers[ALLOW_ORIGIN], answer.headers[PRIVATE_NETWORK]) == (
        200,
        origin,
        "true",
    )
    refused = api.ask("OPTIONS", CHAT, origin=FOREIGN, **preflight)
    assert (refused.status, refused.error["code"]) == (403, "origin_not_allowed")
    assert [name for name in refused.headers if name.startswith("access-control")] == []


def test_a_local_page(api: ApiPool) -> None:
    """It may read answers, errors and streams, and our headers."""
    chat = {"origin": LOCAL, "content_type": "application/json"}
    for answer, status in [
        (api.ask("POST", CHAT, chat_body(), **chat), 200),
        (api.ask("POST", CHAT, chat_body(stream=True), **chat), 200),
        (api.ask("POST", CHAT, b"{", **chat), 400),
        (api.ask("GET", "/nothing", origin=LOCAL), 404),
    ]:
        assert (answer.status, answer.headers[ALLOW_ORIGIN]) == (status, LOCAL)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize("origin", [FOREIGN, "null", "http://localhost.evil.example:80"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/json"])
def test_a_foreign_page(api: ApiPool, origin: str, kind: str) -> None:
    """403 that names the setting, with nothing generated, also for a POST that needs no preflight."""
    for path in (CHAT, "/v1/completions", "/nothing"):
        answer = api.ask("POST", path, chat_body(prompt="hi"), origin=origin, content_type=kind)
        assert (answer.status, answer.error["type"]) == (403, "invalid_request_error")
        assert answer.error["code"] == "origin_not_allowed"
        assert "MLXPOOL_CORS_ORIGINS" in answer.error["message"]
        assert origin in answer.error["message"]
        assert ALLOW_ORIGIN not in answer.headers
    assert api.worker.jobs == []


def test_a_foreign_page_is_refused_before_its_body(api: ApiPool) -> None:
    """The 403 comes before the body was sent; then the connection ends."""
    with api.connect() as connection:
        connection.sendall(request("POST", CHAT, origin=FOREIGN, content_length="1000000"))
        answer = read_response(connection)
    assert (answer.status, answer.headers["connection"]) == (403, "close")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "other.local", "x"]
)
def test_a_rebound_host_name(api: ApiPool, host: str) -> None:
    """403 that says what to do, also for a page whose origin is that host."""
    for headers in ({}, {"origin": f"http://{host}"}):
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", CHAT),
            ("OPTIONS", CHAT),
            ("GET", "/openapi.json"),
        ):
            answer = api.ask(method, path, chat_body() if method == "POST" else b"", host=host, **headers)
            assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
            assert host in answer.error["message"]
            assert "MLXPOOL_CORS_ORIGINS" in answer.error["message"]
            assert ALLOW_ORIGIN not in answer.headers
    assert api.worker.jobs == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]:8080", "pool.localhost", "10.0.0.5"])
def test_names_of_this_machine(api: ApiPool, host: str) -> None:
    """Served, also to a page of the same origin, such as one behind the same proxy."""
    assert api.ask("GET", "/v1/models", host=host).status == 200
    assert api.ask("GET", "/v1/models", host=host, origin=f"http://{host}").status == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
def test_probes(api: ApiPool, path: str) -> None:
    """Health checks are served under any name; a page cannot read them."""
    for headers in ({"host": "pool.example"}, {"origin": FOREIGN}):
        answer = api.ask("GET", path, **headers)
        assert answer.status == 200
        assert ALLOW_ORIGIN not in answer.headers


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /v1/models HTTP/1.0\r\n\r\n", 200),
        (b"GET /v1/models HTTP/1.0\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nOrigin: null\r\n\r\n",
            403,
        ),
    ],
    ids=["no host", "HTTP/1.0", "two hosts", "absolute-form", "absolute-form of another host", "two origins"],
)
def test_odd_requests(api: ApiPool, sent: bytes, status: int) -> None:
    """No other way to name the host or the origin gets past the checks."""
    with api.connect() as connection:
        connection.sendall(sent)
        assert read_response(connection).status == status


def test_every_page_may_call_if_the_setting_allows_it() -> None:
    """`*`: any origin under any host name; errors of the HTTP layer itself can be read too."""
    preflight = {"access_control_request_method": "POST", "access_control_request_private_network": "true"}
    with api_pool({"MLXPOOL_CORS_ORIGINS": "*"}) as api:
        headers = {"host": "evil.example", "origin": FOREIGN}
        answer = api.ask("POST", CHAT, chat_body(), **headers)
        assert (answer.status, answer.headers[ALLOW_ORIGIN]) == (200, "*")
        allowed = api.ask("OPTIONS", CHAT, **headers, **preflight)
        assert (allowed.status, allowed.headers[ALLOW_ORIGIN], allowed.headers[PRIVATE_NETWORK]) == (
            200,
            "*",
            "true",
        )
        with api.connect() as connection:
            connection.sendall(b"not HTTP\r\n\r\n")
            assert read_response(connection).headers[ALLOW_ORIGIN] == "*"


def test_a_list_of_origins() -> None:
    """Only these may call, and their host names are accepted, such as a proxy's; local pages are not among them."""
    with api_pool({"MLXPOOL_CORS_ORIGINS": "https://other.example, https://*.app.example"}) as api:
        for origin in ("https://other.example", "https://my.app.example"):
            answer = api.ask("GET", "/v1/models", origin=origin, host=origin.removeprefix("https://"))
            assert (answer.status, answer.headers[ALLOW_ORIGIN]) == (200, origin)
            assert "Origin" in answer.headers["vary"].split(", ")
        for origin in (FOREIGN, LOCAL):
            assert api.ask("GET", "/v1/models", origin=origin).status == 403
        assert api.ask("GET", "/v1/models", host="evil.example").status == 403
        plain = api.chat(model=MODEL)
        assert plain.status == 200
        assert ALLOW_ORIGIN not in plain.headers
        with api.connect() as connection:
            connection.sendall(b"not HTTP\r\n\r\n")
            assert ALLOW_ORIGIN not in read_response(connection).headers
