"""What gunicorn 27's asgi protocol leaves out, put in: errors in our form, and an end to waiting for a request's head.

Installed in each API process by `api.server`. gunicorn has no hooks for either.
"""

from __future__ import annotations

import http
from collections.abc import Iterable
from typing import Any

from api import errors
from api.headers import new_request_id
from common.errors import RequestError


def install(header_seconds: float) -> None:
    """Change the protocol of this process.

    Args:
        header_seconds: What a new connection gets to say what it wants. One that said so before has its keep-alive time.
    """
    from gunicorn.asgi.protocol import ASGIProtocol  # type: ignore[import-untyped]

    # What is not HTTP is refused before the app; clients still want to see an error object.
    ASGIProtocol._send_error_response = send_error  # noqa: SLF001
    start = ASGIProtocol._start_http1  # noqa: SLF001

    def start_and_wait(protocol: Any, buffered: bytes = b"") -> None:
        start(protocol, buffered)
        protocol.worker.loop.call_later(header_seconds, _end_if_silent, protocol, header_seconds)

    ASGIProtocol._start_http1 = start_and_wait  # noqa: SLF001


def _end_if_silent(protocol: Any, header_seconds: float) -> None:
    """Half a head would otherwise hold a connection for ever."""
    if protocol._closed or not protocol._awaiting_request or protocol.req_count > 1:  # noqa: SLF001
        return
    send_error(protocol, 408, f"No request came within {header_seconds:g} seconds.")
    protocol._keepalive_timeout()  # noqa: SLF001 (closes, and wakes the loop that waits)


def send_error(
    protocol: Any, status: int, message: str, extra_headers: Iterable[tuple[str, str]] = ()
) -> None:
    """In place of gunicorn's, which answers in plain text; its callers close the connection."""
    kind = "invalid_request_error" if status < http.HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    body = errors.body(RequestError(message, status=status, type=kind))
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        "X-Request-Id": new_request_id(),
        **dict(extra_headers),
    }
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    protocol._safe_write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)  # noqa: SLF001
