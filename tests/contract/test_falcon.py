"""falcon 4.4: what `api/app.py` and `api/http/` rely on, and the shortcomings that they work around. The app is called directly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import falcon
import falcon.asgi
import pytest

Event = dict[str, Any]


class Resource:
    """Responds with the given attributes."""

    def __init__(self, **attributes: Any) -> None:
        self._attributes = attributes

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        for name, value in self._attributes.items():
            setattr(resp, name, value)


class Failing:
    """Raises the given error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def on_get(self, _req: falcon.asgi.Request, _resp: falcon.asgi.Response) -> None:
        raise self._error


def _scope(method: str = "GET", path: str = "/", query: bytes = b"") -> Event:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": [(b"host", b"h")],
        "scheme": "http",
        "server": ("h", 80),
        "client": ("127.0.0.1", 1),
    }


def _ask(app: Any, scope: Event | None = None, received: list[Event] | None = None) -> tuple[int, bytes]:
    """Status and body; afterwards, `received` has the events that the app did not receive."""
    events = [{"type": "http.request", "body": b"", "more_body": False}] if received is None else received
    sent: list[Event] = []

    async def receive() -> Event:
        if events:
            return events.pop(0)
        return await asyncio.Future()

    async def send(event: Event) -> None:
        sent.append(event)

    asyncio.run(asyncio.wait_for(app(scope or _scope(), receive, send), 5))
    return sent[0]["status"], b"".join(event.get("body", b"") for event in sent[1:])


def _app(resource: object, *middleware: object) -> falcon.asgi.App[Any, Any]:
    app: falcon.asgi.App[Any, Any] = falcon.asgi.App(
        media_type=falcon.MEDIA_JSON, middleware=list(middleware)
    )
    app.add_route("/", resource)
    return app


def test_bytes_are_sent_as_they_are() -> None:
    """`resp.data` and the bytes of `resp.stream` are sent unchanged. Open api/generation/delivery.py."""

    async def frames() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    assert _ask(_app(Resource(data=b"{}"))) == (200, b"{}")
    assert _ask(_app(Resource(stream=frames()))) == (200, b"ab")


def test_most_special_handler_wins() -> None:
    """A handler for `Exception` does not handle errors that have a handler of their own, whatever their order. Open api/http/errors.py, `install`."""

    async def render(_req: Any, resp: falcon.asgi.Response, error: Exception, _params: Any) -> None:
        resp.status = falcon.HTTP_418
        resp.data = type(error).__name__.encode()

    async def other(_req: Any, resp: falcon.asgi.Response, _error: Exception, _params: Any) -> None:
        resp.status = falcon.HTTP_500

    app = _app(Failing(KeyError("k")))
    app.add_error_handler(KeyError, render)
    app.add_error_handler(Exception, other)
    assert _ask(app) == (418, b"KeyError")


def test_errors_of_falcon() -> None:
    """falcon's own errors are `HTTPError`s with a status, a title and headers. Open api/http/errors.py, `_on_http_error`."""
    seen: list[falcon.HTTPError] = []

    async def note(_req: Any, resp: falcon.asgi.Response, error: falcon.HTTPError, _params: Any) -> None:
        seen.append(error)
        resp.status = falcon.code_to_http_status(error.status_code)

    app = _app(Resource())
    app.add_error_handler(falcon.HTTPError, note)
    assert _ask(app, _scope(path="/nowhere"))[0] == 404
    assert _ask(app, _scope("POST"))[0] == 405
    assert isinstance(seen[0], falcon.HTTPNotFound)
    assert isinstance(seen[1], falcon.HTTPMethodNotAllowed)
    assert dict(seen[1].headers or {})["Allow"] == "GET, OPTIONS"


def test_middleware_hooks() -> None:
    """Request ids, keys and CORS are middleware; `process_response` is called for errors too. Open api/app.py, api/http/origins.py."""
    called: list[str] = []

    class Hooks:
        async def process_request(self, req: Any, _resp: Any) -> None:
            req.context.request_id = "r"
            called.append("request")

        async def process_resource(self, _req: Any, _resp: Any, _resource: Any, _params: Any) -> None:
            called.append("resource")

        async def process_response(self, req: Any, _resp: Any, _resource: Any, succeeded: bool) -> None:
            called.append(f"response {req.context.request_id} {succeeded}")

    _ask(_app(Resource(), Hooks()))
    _ask(_app(Resource(), Hooks()), _scope(path="/nowhere"))
    assert called == ["request", "resource", "response r True", "request", "response r False"]


def test_middleware_ends_a_request() -> None:
    """`resp.complete` skips the resource: a preflight is answered before routing. Open api/http/origins.py, `CrossOrigin`."""

    class Complete:
        async def process_request(self, _req: Any, resp: falcon.asgi.Response) -> None:
            resp.complete = True

    assert _ask(_app(Failing(KeyError()), Complete()), _scope("OPTIONS"))[0] == 200


def test_lifespan_hooks() -> None:
    """The relay and the model directory start and end with these. Open api/app.py, `Lifespan`."""
    called: list[str] = []

    class Hooks:
        async def process_startup(self, _scope: Any, _event: Any) -> None:
            called.append("startup")

        async def process_shutdown(self, _scope: Any, _event: Any) -> None:
            called.append("shutdown")

    events = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[Event] = []

    async def receive() -> Event:
        return events.pop(0)

    async def send(event: Event) -> None:
        sent.append(event)

    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}}
    asyncio.run(_app(Resource(), Hooks())(scope, receive, send))
    assert called == ["startup", "shutdown"]
    assert [event["type"] for event in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_body_is_awaited_before_the_route() -> None:
    """falcon receives the first chunk of a body before it routes, which sends `100 Continue` for a body that is refused.

    If this fails, the empty first chunk can go. Open api/http/disconnect.py, `with_disconnects`.
    """
    received: list[Event] = [{"type": "http.request", "body": b"", "more_body": True}]
    assert _ask(_app(Resource()), _scope(path="/nowhere"), received)[0] == 404
    assert received == []


def test_query_that_is_not_utf8() -> None:
    """A query string that is not UTF-8 fails outside of error handlers, so it is removed. If this fails, it need not be.

    Open api/http/disconnect.py, `with_disconnects`.
    """
    with pytest.raises(UnicodeDecodeError):
        _ask(_app(Resource()), _scope(query=b"\xff=1"))


def test_unknown_methods() -> None:
    """A method that HTTP does not define is a 400, which `UnknownMethods` turns into a 405. If this fails, it can go. Open api/http/methods.py."""
    assert _ask(_app(Resource()), _scope("BREW"))[0] == 400
    assert "GET" in falcon.HTTP_METHODS
    assert set(falcon.HTTP_METHODS) <= set(falcon.COMBINED_METHODS)


def test_suffixes_and_paths() -> None:
    """Health has three routes on one resource, and a model's id may contain slashes. Open api/app.py, `create_app`."""

    class Suffixed:
        async def on_get_live(self, _req: Any, resp: falcon.asgi.Response) -> None:
            resp.data = b"live"

        async def on_get_model(self, _req: Any, resp: falcon.asgi.Response, model_id: str) -> None:
            resp.data = model_id.encode()

    app = _app(Resource())
    app.add_route("/livez", Suffixed(), suffix="live")
    app.add_route("/models/{model_id:path}", Suffixed(), suffix="model")
    assert _ask(app, _scope(path="/livez"))[1] == b"live"
    assert _ask(app, _scope(path="/models/a/b"))[1] == b"a/b"
