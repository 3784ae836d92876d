"""The API as deployed, on a private Redis, with a scripted worker, and a raw HTTP client."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.harness.pool import HOST, Pool
from tests.fake_worker import FakeWorker, Script, words

MODEL = "org/fake: 1"
HI = [{"role": "user", "content": "hi"}]


@dataclass
class ApiPool:
    """The pool and its scripted worker."""

    pool: Pool
    worker: FakeWorker

    @property
    def url(self) -> str:
        return f"{self.pool.url}/v1"

    def follow(self, script: Script) -> None:
        """Set the script for the next jobs."""
        self.worker.script = script
        self.worker.jobs.clear()

    def connect(self) -> socket.socket:
        return socket.create_connection((HOST, self.pool.port), timeout=10)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Response:
        """Send one request on a new connection; header names have _ in place of -."""
        with self.connect() as connection:
            connection.sendall(request(method, path, body, **headers))
            return read_response(connection, method)

    def chat(self, **fields: Any) -> Response:
        """One chat request."""
        return self.ask("POST", "/v1/chat/completions", chat_body(**fields), content_type="application/json")


@dataclass
class Response:
    """An HTTP response; its body unchunked."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, checked to be in OpenAI's format and of the right type."""
        assert self.headers["content-type"] == "application/json"
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        return error

    @property
    def frames(self) -> list[Any]:
        """The frames of a stream."""
        data = [line for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return ["[DONE]" if frame == "data: [DONE]" else json.loads(frame[6:]) for frame in data]


@contextmanager
def api_pool(environ: dict[str, str] | None = None, *, num_processes: int = 1) -> Iterator[ApiPool]:
    """A pool while the block lasts."""
    with Pool(environ) as pool, FakeWorker(pool.redis_url, MODEL) as worker:
        pool.start_api(num_processes)
        yield ApiPool(pool, worker)


def chat_body(**fields: Any) -> bytes:
    return json.dumps({"messages": HI} | fields).encode()


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A request's bytes; `host` in `headers` replaces the default."""
    fields = {"host": "localhost"} | headers
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_response(connection: socket.socket, method: str = "POST") -> Response:
    """The next response on a connection that may stay open."""
    reader = connection.makefile("rb")
    status = 100
    while status == 100:
        status = int(reader.readline().split()[1])
        headers = {}
        while line := reader.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            assert name.lower() not in headers, f"{name} twice"
            headers[name.lower()] = value.strip()
    if method == "HEAD":
        body = b""
    elif headers.get("transfer-encoding") == "chunked":
        body = b"".join(iter(lambda: _chunk(reader), b""))
    else:
        body = reader.read(int(headers["content-length"]))
    return Response(status, headers, body)


def _chunk(reader: Any) -> bytes:
    size = int(reader.readline(), 16)
    data: bytes = reader.read(size)
    reader.readline()
    return data


__all__ = ["HI", "MODEL", "ApiPool", "Response", "api_pool", "chat_body", "read_response", "request", "words"]
