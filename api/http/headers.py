"""Headers of every endpoint: the request id, the client's deadline, and `Connection: close` after an unread body.

The classes are falcon middleware, called for each request and each response, errors included. CORS is in
`api.http.origins`, the check of `Host` in `api.http.hosts`. Independent of what a request asks for.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

import falcon.asgi

from api.http.disconnect import CLIENT
from common.errors import invalid

_VALID_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_VALID_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?")


def new_request_id() -> str:
    """An id for a request whose client sent none."""
    return "req_" + secrets.token_hex(12)


def timeout_seconds(req: falcon.asgi.Request, max_seconds: float) -> float:
    """The request's deadline: `x-request-timeout` in seconds, else `max_seconds`.

    Raises:
        RequestError: 400, the header is not a number of seconds in that range.
    """
    given = req.get_header("x-request-timeout")
    if given is None:
        return max_seconds
    seconds = float(given) if _VALID_SECONDS.fullmatch(given) else 0.0
    if not 0.0 < seconds <= max_seconds:
        raise invalid(
            f"The header X-Request-Timeout must be a number of seconds above 0 and at most {max_seconds:g}, not '{given[:40]}'.",
            "X-Request-Timeout",
        )
    return seconds


def is_resumable(req: falcon.asgi.Request) -> bool:
    """Whether the stream can be resumed and goes on without its client: `x-resumable`, true or false.

    Raises:
        RequestError: 400, the header is something else.
    """
    given = req.get_header("x-resumable")
    if given is None:
        return False
    if given.lower() not in ("true", "false"):
        raise invalid(f"The header X-Resumable must be true or false, not '{given[:40]}'.", "X-Resumable")
    return given.lower() == "true"


class RequestIds:
    """Sets `x-request-id`, OpenAI's name, and `request-id`, Anthropic's: the client's own id if it is well-formed, otherwise a new one."""

    async def process_request(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        given = req.get_header("x-request-id") or ""
        req.context.request_id = given if _VALID_ID.fullmatch(given) else new_request_id()
        resp.set_header("x-request-id", req.context.request_id)
        resp.set_header("request-id", req.context.request_id)


class ConnectionClose:
    """Adds `Connection: close` if the body was not read to its end: the rest could be taken for the next request."""

    async def process_response(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, _resource: Any, _succeeded: bool
    ) -> None:
        if not req.scope[CLIENT].is_body_complete:
            resp.set_header("connection", "close")
