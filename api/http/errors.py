"""Errors as HTTP responses: status, headers, and a body in the format of the protocol that the request's path belongs to.

Called by falcon for what handlers and middleware raise, and by `api.http.connection` for what is refused before a request
exists. Protocols bring their formats (`api.protocols` lists them); this file must not know any of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import falcon
import falcon.asgi

from api.http.paths import NotFound
from common.errors import RequestError
from common.masking import masked

log = logging.getLogger(__name__)

_RETRIED_BY_SDKS = (408, 409, 429)
"""and 5xx: the openai and anthropic SDKs send such a request again by themselves."""

_FIRST_SERVER_ERROR = 500


def _own_status(error: RequestError) -> int:
    return error.status


@dataclass(frozen=True)
class ErrorFormat:
    """How a protocol writes an error.

    Attributes:
        body: The JSON body of a response, from the error and the request's id.
        status: The HTTP status, if it differs from the error's.
    """

    body: Callable[[RequestError, str], bytes]
    status: Callable[[RequestError], int] = _own_status


class ErrorFormats:
    """The error format of each request.

    Args:
        default: For every request that the others do not cover.
        by_prefix: Formats by path prefix, such as ``/v1/messages``, which covers that path and all below it. The longest
            matching prefix wins.
        by_header: Formats by the name of a request header that only clients of that protocol send, in lower case, for the paths
            that `by_prefix` does not cover.
    """

    def __init__(
        self,
        default: ErrorFormat,
        by_prefix: Mapping[str, ErrorFormat] | None = None,
        by_header: Mapping[str, ErrorFormat] | None = None,
    ) -> None:
        self._default = default
        self._by_prefix = sorted((by_prefix or {}).items(), key=lambda item: -len(item[0]))
        self._by_header = by_header or {}

    def body(
        self, path: str, error: RequestError, request_id: str, req: falcon.asgi.Request | None = None
    ) -> bytes:
        """The body of an error response to a request for `path`; API keys in it are masked. See `find`."""
        return self.find(path, req).body(masked_error(error), request_id)

    def find(self, path: str, req: falcon.asgi.Request | None = None) -> ErrorFormat:
        """The format of an error response to a request for `path`.

        Args:
            req: The request, if its headers could be parsed.
        """
        for prefix, error_format in self._by_prefix:
            if path == prefix or path.startswith(prefix + "/"):
                return error_format
        if req is not None:
            for name, error_format in self._by_header.items():
                if req.get_header(name) is not None:
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
        not_found: For the messages of 404s.
    """

    def __init__(self, formats: ErrorFormats, not_found: NotFound) -> None:
        self._formats = formats
        self._not_found = not_found

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
            self._formats.find(req.path, req).status(error),
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
            message = self._not_found.message(req.method, req.path)
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
        resp.status = falcon.code_to_http_status(self._formats.find(req.path, req).status(error))
        resp.content_type = falcon.MEDIA_JSON
        resp.data = self._formats.body(req.path, error, req.context.request_id, req)
        if error.retry_after_seconds is not None:
            resp.set_header("retry-after", str(max(1, math.ceil(error.retry_after_seconds))))
        elif error.status in _RETRIED_BY_SDKS or error.status >= _FIRST_SERVER_ERROR:
            resp.set_header("x-should-retry", "false")
