"""Errors as HTTP responses: status, headers, and a body in the format of the protocol that the request's path belongs to.

Called by falcon for what handlers and middleware raise, and by `api.http.connection` for what is refused before a request
exists. Protocols bring their formats (`api.protocols` lists them); this file must not know any of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

import falcon
import falcon.asgi

from common.errors import RequestError
from common.masking import masked

log = logging.getLogger(__name__)

_RETRIED_BY_SDKS = (408, 409, 429)
"""and 5xx: the openai and anthropic SDKs send such a request again by themselves."""

_FIRST_SERVER_ERROR = 500


class ErrorFormat(Protocol):
    """How a protocol writes an error as the JSON body of a response."""

    def __call__(self, error: RequestError, request_id: str) -> bytes: ...


class ErrorFormats:
    """The error format of each path.

    Args:
        default: For every path that `by_prefix` does not cover.
        by_prefix: Formats by path prefix, such as ``/v1/messages``, which covers that path and all below it. The longest
            matching prefix wins.
    """

    def __init__(self, default: ErrorFormat, by_prefix: Mapping[str, ErrorFormat] | None = None) -> None:
        self._default = default
        self._by_prefix = sorted((by_prefix or {}).items(), key=lambda item: -len(item[0]))

    def body(self, path: str, error: RequestError, request_id: str) -> bytes:
        """The body of an error response to a request for `path`; API keys in it are masked."""
        return self._format(path)(masked_error(error), request_id)

    def _format(self, path: str) -> ErrorFormat:
        for prefix, error_format in self._by_prefix:
            if path == prefix or path.startswith(prefix + "/"):
                return error_format
        return self._default


def masked_error(error: RequestError) -> RequestError:
    """The error without API keys that a client put where they do not belong."""
    return RequestError(
        masked(error.message),
        status=error.status,
        type=error.type,
        param=None if error.param is None else masked(error.param),
        code=error.code,
        retry_after_seconds=error.retry_after_seconds,
    )


def internal() -> RequestError:
    """A 500 that reveals no internals."""
    return RequestError(
        "The server had an error while processing the request.", status=500, type="server_error"
    )


class ErrorHandlers:
    """falcon's error handlers: every exception of a handler or of middleware becomes a response.

    Args:
        formats: For the bodies.
    """

    def __init__(self, formats: ErrorFormats) -> None:
        self._formats = formats

    def install(self, app: falcon.asgi.App[Any, Any]) -> None:
        """Handle everything that `app` raises."""
        app.add_error_handler(Exception, self._on_exception)
        app.add_error_handler(falcon.HTTPError, self._on_http_error)
        app.add_error_handler(RequestError, self._on_request_error)

    async def _on_request_error(
        self,
        req: falcon.asgi.Request,
        resp: falcon.asgi.Response,
        error: RequestError,
        _params: dict[str, Any],
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
        self._render(req, resp, error)

    async def _on_http_error(
        self,
        req: falcon.asgi.Request,
        resp: falcon.asgi.Response,
        error: falcon.HTTPError,
        params: dict[str, Any],
    ) -> None:
        """Errors that falcon itself raises: an unknown path, a method that the path does not have."""
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
        await self._on_request_error(req, resp, RequestError(message, status=status, type=kind), params)

    async def _on_exception(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, error: Exception, _params: dict[str, Any]
    ) -> None:
        log.error("request %s: %s %r failed", req.context.request_id, req.method, req.path, exc_info=error)
        self._render(req, resp, internal())

    def _render(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, error: RequestError) -> None:
        resp.status = falcon.code_to_http_status(error.status)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = self._formats.body(req.path, error, req.context.request_id)
        if error.retry_after_seconds is not None:
            resp.set_header("retry-after", str(max(1, math.ceil(error.retry_after_seconds))))
        elif error.status in _RETRIED_BY_SDKS or error.status >= _FIRST_SERVER_ERROR:
            resp.set_header("x-should-retry", "false")
