"""Keys, and clients that take their time: over real HTTP, with a worker that follows a script."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from api import keys
from tests.e2e.api_pool import ApiPool, api_pool, chat_body, read_response, request

ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def key_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def secret(key_path: Path) -> str:
    return keys.add(key_path, "ann")


@pytest.fixture(scope="module")
def api(key_path: Path, secret: str) -> Iterator[ApiPool]:
    environ = {
        "MLXPOOL_API_KEYS_FILE": str(key_path),
        "MLXPOOL_CORS_ORIGINS": ORIGIN,
        "MLXPOOL_HEADER_SECONDS": "1",
        "MLXPOOL_BODY_SECONDS": "1",
    }
    with api_pool(environ) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x/y"),
        ("HEAD", "/v1/models"),
        ("GET", "/nowhere"),
    ],
)
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer sk-wrong", "Basic x", "Bearer é"]
)
def test_without_a_key_there_is_nothing(
    api: ApiPool, method: str, path: str, authorization: str | None
) -> None:
    """401 in OpenAI's form, whatever is asked for; a browser's script may read it."""
    headers = {"Origin": ORIGIN} | ({} if authorization is None else {"Authorization": authorization})
    with api.connect() as connection:
        connection.sendall(request(method, path, b"", **headers).replace("é".encode(), b"\xe9"))
        answer = read_response(connection, method)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    if method != "HEAD":
        assert answer.error["code"] == "invalid_api_key"
        assert answer.error["type"] == "invalid_request_error"
        assert "sk-wrong" not in answer.error["message"]


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz"])
def test_whether_it_is_alive_is_no_secret(api: ApiPool, path: str) -> None:
    """Those who watch it need no key, and neither does a browser's preflight."""
    assert api.ask("GET", path).status == 200
    preflight = api.ask(
        "OPTIONS", "/v1/chat/completions", origin=ORIGIN, access_control_request_method="POST"
    )
    assert preflight.status == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"]


def test_a_refused_body_is_not_read(api: ApiPool) -> None:
    """The answer comes before the body does."""
    with api.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{"
        )
        assert read_response(connection).status == 401


def test_keys_come_and_go_without_a_restart(api: ApiPool, key_path: Path, secret: str) -> None:
    """The openai SDK gets in with a key, with one that was made just now, and not with one that was revoked."""
    new = keys.add(key_path, "bob")
    time.sleep(1.1)
    for key in (secret, new):
        with openai.OpenAI(base_url=f"{api.pool.url}/v1", api_key=key, max_retries=0) as client:
            assert client.models.list().data
    keys.revoke(key_path, "bob")
    time.sleep(1.1)
    with (
        openai.OpenAI(base_url=f"{api.pool.url}/v1", api_key=new, max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.code == "invalid_api_key"
    assert "ann" not in api.pool.log("api")
    assert secret not in api.pool.log("api")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-"])
def test_half_a_head_holds_no_connection(api: ApiPool, sent: bytes) -> None:
    """It is told 408 and closed; others are served meanwhile."""
    with api.connect() as connection:
        connection.sendall(sent)
        assert api.ask("GET", "/health").status == 200
        answer = read_response(connection)
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
        assert connection.recv(100) == b""


def test_half_a_body_holds_no_connection(api: ApiPool, secret: str) -> None:
    """One that comes byte by byte as well: it has its time as a whole."""
    head = request("POST", "/v1/chat/completions", b"", Authorization=f"Bearer {secret}").removesuffix(
        b"\r\n"
    )
    with api.connect() as connection:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        for _ in range(7):
            time.sleep(0.2)
            connection.sendall(b" ")
        answer = read_response(connection)
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")


def test_a_connection_that_is_kept_lives_on(api: ApiPool, secret: str) -> None:
    """The limit is for the first head: a second request may come later."""
    body = chat_body()
    with api.connect() as connection:
        for _ in range(2):
            connection.sendall(
                request("POST", "/v1/chat/completions", body, Authorization=f"Bearer {secret}")
            )
            assert read_response(connection).status == 200
            time.sleep(1.3)
