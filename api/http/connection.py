"""What gunicorn 27's HTTP connections lack: timeouts for request headers and for clients that stop reading, a close that
does not lose the response, and errors in OpenAI's format.

gunicorn's asgi worker creates an `ASGIProtocol` per connection; `install`, called in each API process by `api.server`, makes
it create a `Connection` instead. gunicorn has no hooks for this: whatever depends on its private parts is in this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import http
import socket
import sys
import termios
from collections.abc import Iterable, Mapping
from typing import Any

from gunicorn.asgi.protocol import ASGIProtocol  # type: ignore[import-untyped]
from gunicorn.workers import gasgi  # type: ignore[import-untyped]

from api.http import errors
from api.http.headers import new_request_id
from common.errors import RequestError

LINGER_SECONDS = 5.0
LINGER_BYTES = 64 * 1024 * 1024
"""For how long, and up to how many bytes, the rest of a refused request is read and discarded. Otherwise TCP resets the
connection, and the client loses the response."""

_SO_NWRITE = 0x1024
"""From macOS's sys/socket.h; Python 3.13 has no name for it."""

_MESSAGES = {
    http.HTTPStatus.REQUEST_URI_TOO_LONG: "The request line is too long.",
    http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "The request's headers are too many or too long.",
    http.HTTPStatus.INTERNAL_SERVER_ERROR: errors.internal().message,
    http.HTTPStatus.NOT_IMPLEMENTED: "The request's Transfer-Encoding is not supported.",
}
"""By status, in place of gunicorn's own messages, which quote the request and so may contain a key."""

_NOT_HTTP = "The request is not valid HTTP/1.1."
"""For every other status."""


def _num_unacknowledged_bytes(transport: asyncio.Transport) -> int:
    """Bytes in asyncio's buffer and in the kernel's; the latter asks for more only when a third of its buffer is free."""
    peer = transport.get_extra_info("socket")
    if sys.platform == "darwin":
        in_kernel = peer.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
    else:
        in_kernel = int.from_bytes(fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return transport.get_write_buffer_size() + int(in_kernel)


def install(
    header_seconds: float, take_seconds: float, headers: Mapping[str, str], error_formats: errors.ErrorFormats
) -> None:
    """Make gunicorn create a `Connection` for each connection of this process from now on.

    Args:
        header_seconds: Timeout for request headers, from the opening of the connection or the first byte of a later request.
        take_seconds: Timeout for a client that reads none of the response that is buffered for it.
        headers: Added to each error response that is created here.
        error_formats: The error format of each protocol, for the bodies of these errors.
    """
    gasgi.ASGIProtocol = functools.partial(Connection, header_seconds, take_seconds, headers, error_formats)


class Connection(ASGIProtocol):  # type: ignore[misc]  # gunicorn has no types
    """One HTTP connection; the arguments are those of `install`."""

    def __init__(
        self,
        header_seconds: float,
        take_seconds: float,
        headers: Mapping[str, str],
        error_formats: errors.ErrorFormats,
        worker: Any,
    ) -> None:
        super().__init__(worker)
        self._headers = headers
        self._error_formats = error_formats
        self._header_seconds = header_seconds
        self._take_seconds = take_seconds
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._linger_bytes = LINGER_BYTES
        self._closes_after_response = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._linger_timer is None:
            super().data_received(data)
            return
        self._linger_bytes -= len(data)
        if self._linger_bytes < 0:
            self.transport.close()

    # Timeout for request headers. All of their bytes pass through the parser here, also those behind another request's body.

    def _feed_callback_parser(self, data: bytes) -> bool:
        try:
            accepts_more = bool(super()._feed_callback_parser(data))
        except ValueError:  # a Content-Length of over 4300 digits, which int() refuses
            self._send_error_response(http.HTTPStatus.BAD_REQUEST)
            self._close_transport()
            accepts_more = False
        if accepts_more and self._current_request is None:
            self._start_header_timer()
        else:
            self._stop_header_timer()
        return accepts_more

    def _arm_keepalive_timer(self) -> None:
        if self._header_timer is None:  # a request has begun
            super()._arm_keepalive_timer()

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._cancel_keepalive_timer()
            self._header_timer = self.worker.loop.call_later(self._header_seconds, self._on_header_timeout)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        self._refuse(
            http.HTTPStatus.REQUEST_TIMEOUT,
            f"The request headers did not arrive within {self._header_seconds:g} seconds.",
        )
        self._close_transport()

    # Timeout for a client that stops reading: neither the response nor the close would ever complete.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _start_write_timer(self) -> None:
        has_data = self.transport is not None and self.transport.get_write_buffer_size() > 0
        if self._write_timer is None and has_data:
            self._write_timer = self.worker.loop.call_later(
                self._take_seconds, self._check_write_progress, _num_unacknowledged_bytes(self.transport)
            )

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _check_write_progress(self, num_bytes_before: int) -> None:
        self._write_timer = None
        if _num_unacknowledged_bytes(self.transport) < num_bytes_before:
            self._start_write_timer()
        else:
            self.transport.abort()

    # Closing. gunicorn ignores `Connection: close` in a response; it looks at the request only.

    def _send_response_start(self, status: int, headers: Any, request: Any, close: bool = False) -> None:
        self._closes_after_response = (b"connection", b"close") in headers
        super()._send_response_start(status, headers, request, close=close)

    async def _serve_http_request(self, request: Any, sockname: Any, peername: Any) -> bool:
        keeps_alive = await super()._serve_http_request(request, sockname, peername)
        return bool(keeps_alive) and not self._closes_after_response

    def _close_transport(self) -> None:
        receiver = self._body_receiver
        is_body_incomplete = receiver is not None and not receiver._complete  # noqa: SLF001
        if self._closed or not (self._closes_after_response or is_body_incomplete):
            super()._close_transport()
        else:
            self._linger()
        self._start_write_timer()  # the transport closes only after everything was written

    def _linger(self) -> None:
        """Shut down the sending side now, and close when the client has closed, or after `LINGER_SECONDS`."""
        self._closed = True
        self._linger_timer = self.worker.loop.call_later(LINGER_SECONDS, self.transport.close)
        with contextlib.suppress(OSError):  # already closed by the client
            self.transport.write_eof()
        self._resume_reading()
        if self._body_receiver is not None:
            self._body_receiver.signal_disconnect()
        self._request_ready.set()  # wakes gunicorn's loop, which then ends

    # Errors of the HTTP layer itself

    def _send_error_response(
        self, status: int, _message: str = "", extra_headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Replaces gunicorn's plain-text error; its callers close the connection."""
        self._refuse(status, _MESSAGES.get(http.HTTPStatus(status), _NOT_HTTP), extra_headers)

    def _path(self) -> str:
        """The request's path as far as it was parsed; empty if the request line is not complete."""
        target = getattr(self._callback_parser, "path", None) or b""
        return bytes(target).partition(b"?")[0].decode("latin-1")

    def _refuse(self, status: int, message: str, extra_headers: Iterable[tuple[str, str]] = ()) -> None:
        if self._closed:
            return
        self._closes_after_response = True
        kind = "invalid_request_error" if status < http.HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        request_id = new_request_id()
        error = RequestError(message, status=status, type=kind)
        body = self._error_formats.body(self._path(), error, request_id)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-Id": request_id,
            "Request-Id": request_id,
            **self._headers,
            **dict(extra_headers),
        }
        lines = [
            f"HTTP/1.1 {int(status)} {http.HTTPStatus(status).phrase}",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        self._safe_write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
