"""API keys over HTTP: gunicorn and the app as they are deployed, with a scripted worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from api import keys
from tests.e2e.api_pool import ApiPool, api_pool, chat_body, read_response, request
from tests.redis.pool_of_workers import wait_until

ORIGIN = "https://app.example"
WRONG = "sk-mlxpool-" + "0" * 43


@pytest.fixture(scope="module")
def key_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def secret(key_path: Path) -> str:
    return keys.add(key_path, "ann")


@pytest.fixture(scope="module")
def revoked_later(key_path: Path) -> str:
    """A key that is valid when the API starts."""
    return keys.add(key_path, "eve")


@pytest.fixture(scope="module")
def api(key_path: Path, secret: str, revoked_later: str) -> Iterator[ApiPool]:
    assert secret != revoked_later
    environ = {
        "MLXPOOL_API_KEYS_FILE": str(key_path),
        "MLXPOOL_CORS_ORIGINS": ORIGIN,
        "MLXPOOL_BODY_SECONDS": "1",
        "MLXPOOL_LOG_LEVEL": "DEBUG",
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
        ("BREW", "/v1/models/"),
        ("GET", "/livez/x"),
        ("GET", "//v1//models/"),
        ("GET", "/v1/models?x=/livez"),
        ("GET", "/livez%2f..%2fv1/models"),
        ("GET", "http://x/livez"),
    ],
)
@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer sk-wrong", "Basic x", "Bearer é"]
)
def test_every_request_needs_a_key(api: ApiPool, method: str, path: str, authorization: str | None) -> None:
    """401 in OpenAI's error format for every path and method, readable by pages of allowed origins."""
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


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/openapi.json"])
def test_public_paths(api: ApiPool, path: str) -> None:
    """Health checks, the API's description and preflights need no key."""
    for method in ("GET", "HEAD"):
        assert api.ask(method, path).status == 200
        assert api.ask(method, path, authorization=f"Bearer {WRONG}").status == 200
    preflight = api.ask(
        "OPTIONS", "/v1/chat/completions", origin=ORIGIN, access_control_request_method="POST"
    )
    assert preflight.status == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"]


def test_a_refused_body_is_not_read(api: ApiPool) -> None:
    """The 401 comes before the body was sent, and in place of `100 Continue`; then the connection ends."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
    for more in (b"\r\n{", b"Expect: 100-continue\r\n\r\n"):
        with api.connect() as connection:
            connection.sendall(head + more)
            assert connection.recv(12) == b"HTTP/1.1 401"
            assert b"connection: close\r\n" in b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_authorization_scheme(api: ApiPool, secret: str, scheme: str) -> None:
    """Its case does not matter (RFC 9110, section 11.1), nor does a second space."""
    assert api.ask("GET", "/v1/models", authorization=f"{scheme} {secret}").status == 200
    assert api.ask("GET", "/nothing", authorization=f"{scheme} {secret}").status == 404


def test_the_name_of_the_key_is_sent_with_the_job(api: ApiPool, secret: str) -> None:
    """To the worker, and into the API's log line of the request."""
    headers = {"authorization": f"Bearer {secret}", "content_type": "application/json"}
    assert api.ask("POST", "/v1/chat/completions", chat_body(), **headers).status == 200
    job = api.worker.jobs[-1]
    assert job.api_key_name == "ann"
    wait_until(lambda: f"job {job.job_id}: model {job.model}, key ann, 1 choices" in api.pool.log("api"))


@pytest.mark.parametrize("is_right_first", [True, False])
def test_two_keys_in_one_request(api: ApiPool, secret: str, is_right_first: bool) -> None:
    """A repeated header is a 401, whichever key is valid: a proxy may have checked the other one."""
    both = [secret, WRONG] if is_right_first else [WRONG, secret]
    with api.connect() as connection:
        lines = [
            "GET /v1/models HTTP/1.1",
            "Host: localhost",
            *(f"Authorization: Bearer {one}" for one in both),
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        assert read_response(connection).status == 401


def test_a_connection_is_kept_after_a_401(api: ApiPool, secret: str) -> None:
    """If no body is left on it; each request needs a key."""
    with api.connect() as connection:
        for headers, status in [({}, 401), ({"authorization": f"Bearer {secret}"}, 200), ({}, 401)]:
            connection.sendall(request("GET", "/v1/models", **headers))
            assert read_response(connection).status == status


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("GET /v1/KEY HTTP/1.1\r\nHost: localhost", 401),
        ("GET /v1/KEY HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer KEY", 404),
        ("PUT /v1/models/KEY HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer KEY", 405),
        ("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: KEY", 401),
        ("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization Bearer KEY: x", 400),
        ("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: KEY", 501),
        ("KEY / HTTP/1.1\r\nHost: localhost", 400),
        ("GET / KEY", 400),
    ],
)
def test_a_misplaced_key(api: ApiPool, secret: str, sent: str, status: int) -> None:
    """It is in no error and in no log line, not even at level DEBUG."""
    log = api.pool.log("api")
    with api.connect() as connection:
        connection.sendall(sent.replace("KEY", secret).encode() + b"\r\n\r\n")
        answer = read_response(connection)
    assert answer.status == status
    assert secret.encode() not in answer.body
    assert secret not in api.pool.log("api")[len(log) :]


def test_a_key_in_a_body(api: ApiPool, secret: str) -> None:
    """As a model, a parameter or a value: neither the error nor the log has it."""
    log = api.pool.log("api")
    for body in (
        chat_body(model=secret),
        chat_body(**{secret: 1}),
        chat_body(temperature=secret),
        chat_body(tool_choice=secret),
    ):
        answer = api.ask("POST", "/v1/chat/completions", body, authorization=f"Bearer {secret}")
        assert secret.encode() not in answer.body
    refused = api.ask(
        "POST",
        "/v1/chat/completions",
        chat_body(),
        authorization=f"Bearer {secret}",
        x_request_timeout=secret,
    )
    assert refused.status == 400
    assert secret[:24] not in refused.error["message"]
    assert secret not in api.pool.log("api")[len(log) :]


def test_keys_change_without_a_restart(api: ApiPool, key_path: Path, secret: str) -> None:
    """The openai SDK is served with a key and with a new key, and refused with a revoked one."""
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
    assert secret not in api.pool.log("api")
    assert new not in api.pool.log("api")


def test_an_incomplete_body_times_out(api: ApiPool, secret: str) -> None:
    """Also if it arrives byte by byte: the timeout is for the complete body."""
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


def test_a_malformed_file_and_restarted_processes(
    api: ApiPool, key_path: Path, secret: str, revoked_later: str
) -> None:
    """All processes use the last good keys, restarted ones included: valid keys stay valid, revoked ones stay revoked."""

    def status(key: str) -> int:
        try:
            return api.ask("GET", "/v1/models", authorization=f"Bearer {key}").status
        except (OSError, IndexError):  # a process that is ending
            return 0

    assert status(revoked_later) == 200
    keys.revoke(key_path, "eve")
    wait_until(lambda: status(revoked_later) == 401)
    good = key_path.read_bytes()
    key_path.write_bytes(b"garbled")
    try:
        wait_until(lambda: (status(secret), api.pool.log("api").count("not a file of API keys")) == (200, 1))
        master, *before = api.pool.pids("api")
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: set(api.pool.pids("api")) - {master, *before} and status(secret) == 200)
        assert (status(revoked_later), status(WRONG)) == (401, 401)
        os.kill(master, signal.SIGHUP)
        wait_until(lambda: api.pool.log("api").count("Booting worker") == 1 + 2 * len(before))
        wait_until(lambda: status(secret) == 200)
        assert (status(revoked_later), status(WRONG)) == (401, 401)
    finally:
        key_path.write_bytes(good)
    late = keys.add(key_path, "late")
    wait_until(lambda: status(late) == 200)


def test_foreign_pages_and_host_names(api: ApiPool, secret: str) -> None:
    """A foreign origin is refused before its key is looked at; host names are not checked: a rebound page has no key."""
    for authorization in (f"Bearer {secret}", f"Bearer {WRONG}"):
        foreign = api.ask("GET", "/v1/models", origin="https://evil.example", authorization=authorization)
        assert (foreign.status, foreign.error["code"]) == (403, "origin_not_allowed")
    assert api.ask("GET", "/v1/models", host="pool.example", authorization=f"Bearer {secret}").status == 200
    assert api.ask("GET", "/v1/models", host="pool.example").status == 401
