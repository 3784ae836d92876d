"""Errors have the format of the request's protocol: in bodies, in streams, and before a handler runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import falcon.asgi
import msgspec
import pytest
from falcon import testing
from gunicorn.config import Config

from api import app, keys
from api.generation import delivery
from api.generation.front_end import AnswerEvent, FrontEnd
from api.generation.request import GenerationRequest
from api.generation.stored_answer import EventSource
from api.http import sse
from api.http.connection import Connection
from api.http.errors import ErrorFormat, ErrorFormats
from api.openai.chat.rendering import ChatRendering
from api.openai.errors import error_body
from api.protocols import FRONT_ENDS
from common.errors import RequestError, invalid
from common.protocol import Delta, Failed, Finished
from common.settings import Settings
from tests.unit.api.openai.records import record

KEY = "sk-" + "x" * 48


def other_body(error: RequestError, request_id: str) -> bytes:
    """Another protocol's error, with the request's id in it."""
    return msgspec.json.encode({"kind": error.status, "text": error.message, "request": request_id})


def refuse(_body: bytes) -> GenerationRequest:
    raise invalid(f"No, {KEY}.")


PLAIN, OTHER_FORMAT = ErrorFormat(error_body), ErrorFormat(other_body)
FORMATS = ErrorFormats(
    PLAIN, {"/v1/messages": OTHER_FORMAT, "/v1/messages/plain": PLAIN}, {"other-version": OTHER_FORMAT}
)
OTHER = FrontEnd("other", refuse, Mock(), Mock())


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[testing.TestClient, str]:
    """The application with a second protocol and no Redis, and a key for it."""
    path = tmp_path / "keys"
    secret = keys.add(path, "ann")
    monkeypatch.setattr(app, "ERROR_FORMATS", FORMATS)
    monkeypatch.setattr(app, "FRONT_ENDS", {**FRONT_ENDS, "/messages": OTHER})
    served = app.create_app(Settings(api_keys_file=str(path)))

    async def with_lists(scope: Any, receive: Any, send: Any) -> None:
        if "headers" in scope:  # falcon 4.4's client sends iterators of iterators, which no server does
            scope |= {"headers": [tuple(header) for header in scope["headers"]]}
        await served(scope, receive, send)

    return testing.TestClient(with_lists), secret


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/messages", {"authorization": ""}, 401),
        ("POST", "/messages/anything", {}, 404),
        ("GET", "/messages", {}, 405),
        ("MADEUP", "/messages", {}, 405),
        ("POST", "/messages", {"content-type": "text/plain"}, 415),
        ("POST", "/messages", {"content-length": "99999999"}, 413),
        ("POST", "/messages", {}, 400),
    ],
)
def test_bodies_by_path(
    client: tuple[testing.TestClient, str], method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """The second protocol's format below its prefix, OpenAI's at other paths, whichever part of the server refuses; keys are masked."""
    tested, secret = client
    sent = {"authorization": f"Bearer {secret}", "x-request-id": "me"} | headers
    other = tested.simulate_request(method, f"/v1{path}", headers=sent, body="{}")
    assert (other.status_code, other.json["kind"], other.json["request"]) == (status, status, "me")
    assert other.headers["content-type"] == "application/json"
    assert KEY not in other.text
    openai = tested.simulate_request(method, "/v1/messages_" + path, headers=sent, body="{}")
    assert set(openai.json["error"]) == {"message", "type", "param", "code"}
    plain = tested.simulate_request(method, "/v1/messages/plain" + path, headers=sent, body="{}")
    assert set(plain.json["error"]) == {"message", "type", "param", "code"}


def test_a_format_by_header(client: tuple[testing.TestClient, str]) -> None:
    """A header of the second protocol selects its format, but not below another format's prefix."""
    tested, _ = client
    sent = {"other-version": "1"}
    assert tested.simulate_get("/v1/models", headers=sent).json["kind"] == 401
    assert set(tested.simulate_get("/v1/messages/plain", headers=sent).json["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/messages?a=b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: x\r\n\r\n", 501),
        (b"POST /v1/messages HTTP/1.1\r\nHost: h\r\nno header\r\n\r\n", 400),
        (b"POST /v1/messages HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_bodies_of_malformed_requests(head: bytes, status: int) -> None:
    """A request that the connection refuses gets the format of its path, once the request line is parsed."""
    other = exchange(head)
    assert (other["kind"], other["request"][:4]) == (status, "req_")
    assert set(exchange(head.replace(b"messages", b"models"))["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


def test_a_body_without_a_path() -> None:
    """The default format."""
    assert set(exchange(b"nonsense\r\n\r\n")["error"]) == {"message", "type", "param", "code"}


def exchange(data: bytes) -> Any:
    """The error of a connection that gets `data`."""

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        worker = SimpleNamespace(
            cfg=Config(), log=Mock(), asgi=Mock(), loop=loop, nr_conns=0, nr=0, alive=True, state={},
            max_requests=100, pid=1, ppid=1,
        )  # fmt: skip
        made: list[Connection] = []

        def make() -> Connection:
            made.append(Connection(60.0, 60.0, {}, FORMATS, worker))
            return made[-1]

        async with await loop.create_server(make, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(data)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            await writer.wait_closed()
            await asyncio.wait([made[0]._task], timeout=5)
        return answer

    head, _, body = asyncio.run(run()).partition(b"\r\n\r\n")
    assert b"application/json" in head
    return json.loads(body)


class OtherRendering(ChatRendering):
    """Another protocol's rendering, whose frames have event names."""

    def opening(self) -> bytes:
        return b""

    def frames(self, index: int, events: list[AnswerEvent]) -> bytes:
        return b"".join(
            sse.frame(msgspec.json.encode(event.text), event="text")
            for event in events
            if isinstance(event, Delta)
        )

    def error(self, error: RequestError) -> bytes:
        return sse.frame(other_body(error, ""), event="error")

    def keep_alive(self) -> bytes:
        return sse.frame(b"{}", event="ping")


class FakeRequest:
    """Batches of events, then its end."""

    def __init__(self, *batches: list[Any]) -> None:
        self._batches = list(batches)
        self.job_id = "a"
        self.is_aborted = False

    @property
    def is_done(self) -> bool:
        return not self._batches

    async def take(self) -> Any:
        return [(0, self._batches.pop(0))]

    def finished(self) -> list[Finished]:
        raise invalid(f"No, {KEY}.")


def test_a_stream_fails_in_its_own_format() -> None:
    """The rendering supplies the error frame and the keep-alive; API keys are masked."""

    async def run() -> bytes:
        resp = falcon.asgi.Response()
        request = cast("EventSource", FakeRequest([], [Delta(1, 7, "a"), Failed(2, "no")]))
        await delivery.send_stream(resp, request, OtherRendering(record()), Settings(sse_ids=True))
        return b"".join([frame async for frame in cast("Any", resp.stream)])

    assert asyncio.run(run()) == (
        b"event: ping\ndata: {}\n\n"
        b'id: a:0\nevent: text\ndata: "a"\n\n'
        b'id: a:1\nevent: error\ndata: {"kind":400,"text":"No, sk-....","request":""}\n\n'
    )


def test_a_request_that_fails_at_once() -> None:
    """It is an error with a status, not a stream."""

    async def run() -> None:
        request = cast("EventSource", FakeRequest([Failed(1, "no")]))
        await delivery.send_stream(falcon.asgi.Response(), request, OtherRendering(record()), Settings())

    with pytest.raises(RequestError, match="No"):
        asyncio.run(run())
