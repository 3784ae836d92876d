"""What gunicorn 27's HTTP connections lack: an end to waiting for a head or for a client that takes nothing, a close that
loses no answer, and errors in our form.

gunicorn's asgi worker makes one `ASGIProtocol` a connection; `install`, called in each API process by `api.server`, has it
make a `Connection` instead. gunicorn has no hooks for any of this; all that is known of its insides is in this file.
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
"""How long, and how much of, what a refused client still sends is read and dropped: TCP answers it with a reset
otherwise, which takes our answer away from the client."""

_SO_NWRITE = 0x1024
"""From macOS's sys/socket.h; Python 3.13 does not name it."""

_MESSAGES = {
    http.HTTPStatus.REQUEST_URI_TOO_LONG: "The request line is too long.",
    http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "The request's headers are too many or too long.",
    http.HTTPStatus.INTERNAL_SERVER_ERROR: errors.internal().message,
    http.HTTPStatus.NOT_IMPLEMENTED: "The request's Transfer-Encoding is not supported.",
}
"""gunicorn's own sentences quote what was sent, which may be a key. Any other status: the one below."""

_NOT_HTTP = "The request is not valid HTTP/1.1."


def _num_untaken(transport: asyncio.Transport) -> int:
    """Bytes that wait here and in the kernel, which asks for more only when a third of its room, a megabyte, is free."""
    peer = transport.get_extra_info("socket")
    if sys.platform == "darwin":
        in_kernel = peer.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
    else:
        in_kernel = int.from_bytes(fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return transport.get_write_buffer_size() + int(in_kernel)


def install(
    header_seconds: float, take_seconds: float, headers: Mapping[str, str], error_formats: errors.ErrorFormats
) -> None:
    """From now on this process's connections are `Connection`s.

    Args:
        header_seconds: From a connection's opening, or from a later request's first byte, to the end of that head.
        take_seconds: How long a client may take nothing of what waits for it.
        headers: Of each error that is made here, beside its own.
        error_formats: For the bodies of errors.
    """
    gasgi.ASGIProtocol = functools.partial(Connection, header_seconds, take_seconds, headers, error_formats)


class Connection(ASGIProtocol):  # type: ignore[misc]  # gunicorn has no types
    """One HTTP connection; `install` tells of its arguments."""

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
        self._head_timer: asyncio.TimerHandle | None = None
        self._take_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._linger_bytes = LINGER_BYTES
        self._says_close = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_take()
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

    # A head that does not end. Every byte of one passes the parser's feeding, also if it came behind another's body.

    def _feed_callback_parser(self, data: bytes) -> bool:
        try:
            goes_on = bool(super()._feed_callback_parser(data))
        except ValueError:  # a Content-Length of more digits than Python's int() takes, which are 4300
            self._send_error_response(http.HTTPStatus.BAD_REQUEST)
            self._close_transport()
            goes_on = False
        if goes_on and self._current_request is None:
            self._begin_head()
        else:
            self._end_head()
        return goes_on

    def _arm_keepalive_timer(self) -> None:
        if self._head_timer is None:  # what has begun is not idle
            super()._arm_keepalive_timer()

    def _begin_head(self) -> None:
        if self._head_timer is None:
            self._cancel_keepalive_timer()
            self._head_timer = self.worker.loop.call_later(self._header_seconds, self._head_is_late)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._refuse(
            http.HTTPStatus.REQUEST_TIMEOUT, f"No request came within {self._header_seconds:g} seconds."
        )
        self._close_transport()

    # A client that takes nothing: neither an answer nor a close would ever come to its end.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin_take()

    def resume_writing(self) -> None:
        self._end_take()
        super().resume_writing()

    def _begin_take(self) -> None:
        is_waiting = self.transport is not None and self.transport.get_write_buffer_size() > 0
        if self._take_timer is None and is_waiting:
            self._take_timer = self.worker.loop.call_later(
                self._take_seconds, self._look_at_take, _num_untaken(self.transport)
            )

    def _end_take(self) -> None:
        if self._take_timer is not None:
            self._take_timer.cancel()
            self._take_timer = None

    def _look_at_take(self, before: int) -> None:
        self._take_timer = None
        if _num_untaken(self.transport) < before:
            self._begin_take()
        else:
            self.transport.abort()

    # The end of a connection. `Connection: close` of the app is none for gunicorn, which goes by the request alone.

    def _send_response_start(self, status: int, headers: Any, request: Any, close: bool = False) -> None:
        self._says_close = (b"connection", b"close") in headers
        super()._send_response_start(status, headers, request, close=close)

    async def _serve_http_request(self, request: Any, sockname: Any, peername: Any) -> bool:
        keeps_alive = await super()._serve_http_request(request, sockname, peername)
        return bool(keeps_alive) and not self._says_close

    def _close_transport(self) -> None:
        receiver = self._body_receiver
        is_body_left = receiver is not None and not receiver._complete  # noqa: SLF001
        if self._closed or not (self._says_close or is_body_left):
            super()._close_transport()
        else:
            self._linger()
        self._begin_take()  # closing waits until all is written

    def _linger(self) -> None:
        """Say at once that nothing more comes, but close only when the client has, or has had its time."""
        self._closed = True
        self._linger_timer = self.worker.loop.call_later(LINGER_SECONDS, self.transport.close)
        with contextlib.suppress(OSError):  # the client has closed already
            self.transport.write_eof()
        self._resume_reading()
        if self._body_receiver is not None:
            self._body_receiver.signal_disconnect()
        self._request_ready.set()  # gunicorn's loop sees that this is closed

    # What is not HTTP

    def _send_error_response(
        self, status: int, _message: str = "", extra_headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """In place of gunicorn's, which answers in plain text; its callers close the connection."""
        self._refuse(status, _MESSAGES.get(http.HTTPStatus(status), _NOT_HTTP), extra_headers)

    def _path(self) -> str:
        """The request's path as far as it was parsed; empty if the request line is not complete."""
        target = getattr(self._callback_parser, "path", None) or b""
        return bytes(target).partition(b"?")[0].decode("latin-1")

    def _refuse(self, status: int, message: str, extra_headers: Iterable[tuple[str, str]] = ()) -> None:
        if self._closed:
            return
        self._says_close = True
        kind = "invalid_request_error" if status < http.HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        request_id = new_request_id()
        error = RequestError(message, status=status, type=kind)
        body = self._error_formats.body(self._path(), error, request_id)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-Id": request_id,
            **self._headers,
            **dict(extra_headers),
        }
        lines = [
            f"HTTP/1.1 {int(status)} {http.HTTPStatus(status).phrase}",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        self._safe_write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
