"""Every error that a client sees, in OpenAI's form: a JSON body before the first byte, a frame in a stream after it.

Called by falcon for what handlers raise, and by the streams. The one place that decides on status and headers of errors.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import falcon
import falcon.asgi
import msgspec

from common.errors import RequestError, unavailable
from common.masking import masked
from common.protocol import Failed

log = logging.getLogger(__name__)

_REPEATED_BY_SDKS = (408, 409, 429)
"""and 5xx: the openai SDKs send such a request again by themselves."""

_FIRST_SERVER_ERROR = 500


class ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error, always with all four keys."""

    error: ErrorObject


def body(error: RequestError) -> bytes:
    """The JSON body; a key that a client put where it does not belong is not repeated."""
    param = None if error.param is None else masked(error.param)
    return msgspec.json.encode(ErrorBody(ErrorObject(masked(error.message), error.type, param, error.code)))


def frame(error: RequestError) -> bytes:
    """The last frame of a stream that had begun."""
    return b"data: " + body(error) + b"\n\n"


def from_event(event: Failed) -> RequestError:
    """What a worker, or the relay, said."""
    return RequestError(
        event.message,
        status=event.status,
        type=event.kind,
        param=event.param,
        code=event.code,
        retry_after_seconds=event.retry_after_seconds,
    )


def internal() -> RequestError:
    """A 500 that tells nothing."""
    return RequestError(
        "The server had an error while processing the request.", status=500, type="server_error"
    )


def queue_unavailable() -> RequestError:
    """A 503 while Redis is away."""
    return unavailable("The queue does not answer; try again in a moment.", code="queue_unavailable")


def install(app: falcon.asgi.App[Any, Any]) -> None:
    """Render everything that a handler raises."""
    app.add_error_handler(Exception, _on_exception)
    app.add_error_handler(falcon.HTTPError, _on_http_error)
    app.add_error_handler(RequestError, _on_request_error)


def render(resp: falcon.asgi.Response, error: RequestError) -> None:
    """Make `error` the response."""
    resp.status = falcon.code_to_http_status(error.status)
    resp.content_type = falcon.MEDIA_JSON
    resp.data = body(error)
    if error.retry_after_seconds is not None:
        resp.set_header("retry-after", str(max(1, math.ceil(error.retry_after_seconds))))
    elif error.status in _REPEATED_BY_SDKS or error.status >= _FIRST_SERVER_ERROR:
        resp.set_header("x-should-retry", "false")


async def _on_request_error(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, error: RequestError, _params: dict[str, Any]
) -> None:
    log.info(
        "request %s: %s %r answered %d (%s, param %r)",
        req.context.request_id,
        req.method,
        req.path,
        error.status,
        error.code or error.type,
        error.param,
    )
    render(resp, error)


async def _on_http_error(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, error: falcon.HTTPError, params: dict[str, Any]
) -> None:
    """What falcon itself found: no such path, no such method there."""
    status = error.status_code
    if isinstance(error, falcon.HTTPNotFound):
        message = f"Unknown request URL: {req.method} {req.path}."
    elif isinstance(error, falcon.HTTPMethodNotAllowed):
        message = f"{req.method} is not allowed for {req.path}."
    else:
        message = error.description or error.title or "The request cannot be served."
    if error.headers is not None:
        resp.set_headers(error.headers)
    kind = "invalid_request_error" if status < _FIRST_SERVER_ERROR else "server_error"
    await _on_request_error(req, resp, RequestError(message, status=status, type=kind), params)


async def _on_exception(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, error: Exception, _params: dict[str, Any]
) -> None:
    log.error("request %s: %s %r failed", req.context.request_id, req.method, req.path, exc_info=error)
    render(resp, internal())
