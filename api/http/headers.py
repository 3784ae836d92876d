"""Headers that every response carries: a request id, and what browsers want to see (CORS).

falcon middleware, called for each request and each response, errors too. Knows nothing of what is asked.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

import falcon
import falcon.asgi

from api.http.disconnect import CLIENT
from common.errors import invalid

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_SANE_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?")
_SANE_HEADER_LIST = re.compile(r"[A-Za-z0-9_, -]{1,2048}")

EXPOSED = "x-request-id, x-ignored-parameters, x-should-retry, retry-after"
ALLOWED = "authorization, content-type, x-request-id, x-request-timeout"
"""By name: a browser does not take `*` for authorization."""

METHODS = "GET, HEAD, POST, OPTIONS"
PREFLIGHT_SECONDS = "3600"


def for_any_origin(origins: str) -> dict[str, str]:
    """What lets any page read an answer; nothing where not every page may."""
    if origins.strip() != "*":
        return {}
    return {"access-control-allow-origin": "*", "access-control-expose-headers": EXPOSED}


def new_request_id() -> str:
    """An id for a request whose client gave none."""
    return "req_" + secrets.token_hex(12)


def timeout_seconds(req: falcon.asgi.Request, max_seconds: float) -> float:
    """The request's deadline: `x-request-timeout` in seconds, else `max_seconds`.

    Raises:
        RequestError: 400; the header says something else.
    """
    given = req.get_header("x-request-timeout")
    if given is None:
        return max_seconds
    seconds = float(given) if _SANE_SECONDS.fullmatch(given) else 0.0
    if not 0.0 < seconds <= max_seconds:
        raise invalid(
            f"The header X-Request-Timeout takes seconds, above 0 and at most {max_seconds:g}, not '{given[:40]}'.",
            "X-Request-Timeout",
        )
    return seconds


class RequestIds:
    """`x-request-id`: the client's where it is sane, else one of ours."""

    async def process_request(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        given = req.get_header("x-request-id") or ""
        req.context.request_id = given if _SANE_ID.fullmatch(given) else new_request_id()
        resp.set_header("x-request-id", req.context.request_id)


class Connections:
    """Says that the connection ends when a body was refused: what is left of it cannot be told from a new request."""

    async def process_response(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, _resource: Any, _succeeded: bool
    ) -> None:
        if not req.scope[CLIENT].body_is_read:
            resp.set_header("connection", "close")


class KnownMethods:
    """405 for a method that HTTP does not have; falcon 4.4 says 400."""

    async def process_resource(
        self, req: falcon.asgi.Request, _resp: falcon.asgi.Response, resource: Any, _params: dict[str, Any]
    ) -> None:
        if req.method not in falcon.COMBINED_METHODS:
            allowed = [name for name in falcon.HTTP_METHODS if hasattr(resource, f"on_{name.lower()}")]
            raise falcon.HTTPMethodNotAllowed([*allowed, "OPTIONS"])


class CrossOrigin:
    """CORS (fetch.spec.whatwg.org, section 3.3), on errors too.

    Args:
        origins: Separated by commas, or ``*``.
    """

    def __init__(self, origins: str) -> None:
        self._for_any = for_any_origin(origins)
        self._origins = frozenset(
            origin.strip().rstrip("/") for origin in origins.split(",") if origin.strip()
        )

    async def process_request(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """A preflight is fine whatever it asks for: what comes behind it is then answered in words, 404 or 405 too."""
        if req.method == "OPTIONS" and req.get_header("access-control-request-method") is not None:
            resp.complete = True

    async def process_response(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, _resource: Any, _succeeded: bool
    ) -> None:
        if self._for_any:
            resp.set_headers(self._for_any)
        else:
            resp.append_header("vary", "Origin")
            origin = req.get_header("origin")
            if origin not in self._origins:
                return
            resp.set_header("access-control-allow-origin", str(origin))
            resp.set_header("access-control-expose-headers", EXPOSED)
        if req.method == "OPTIONS":
            self._answer_preflight(req, resp)

    def _answer_preflight(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        asked = req.get_header("access-control-request-headers") or ""
        more = [name.strip() for name in asked.split(",")] if _SANE_HEADER_LIST.fullmatch(asked) else []
        names = dict.fromkeys([*ALLOWED.split(", "), *(name.lower() for name in more if name)])
        resp.set_header("access-control-allow-methods", METHODS)
        resp.set_header("access-control-allow-headers", ", ".join(names))
        resp.set_header("access-control-max-age", PREFLIGHT_SECONDS)
