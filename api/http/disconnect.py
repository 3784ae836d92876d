"""Tells a request at once that its client has left, streaming or not, and ends what belongs to the request.

falcon 4.4 looks for a disconnect only after the next event of a stream, gunicorn 27 cancels a handler after three seconds
and a plain request has no watcher at all. Here the server's `receive` is watched while a handler works, and its task is
cancelled within milliseconds. Wraps the falcon app; knows nothing of models or queues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from common.errors import RequestError

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

CLIENT = "mlxpool.client"
"""Where the scope has the request's `Client`."""


class Client:
    """Who waits for one request's answer.

    Attributes:
        has_left: Whether the connection is gone.
        body_is_read: Whether the whole body came.
    """

    def __init__(self, receive: Receive, headers: list[tuple[bytes, bytes]]) -> None:
        self.has_left = False
        lengths = [value for name, value in headers if name == b"content-length"]
        self.content_length = int(lengths[0]) if lengths else None
        self.body_is_read = self.content_length in (None, 0) and not any(
            name == b"transfer-encoding" for name, _ in headers
        )
        self._receive = receive
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._at_end: list[Callable[[], None]] = []

    async def receive(self) -> dict[str, Any]:
        """The server's next event."""
        event = await self._receive()
        if event["type"] == "http.disconnect":
            self.has_left = True
        elif not event.get("more_body", False):
            self.body_is_read = True
        return event

    async def read_body(self, max_bytes: int, seconds: float) -> bytes:
        """The request's body; reading stops at the limits.

        Raises:
            RequestError: 413, it is longer than `max_bytes` or says so; 408, it did not come within `seconds`.
        """
        too_large = RequestError(
            f"The request body is larger than {max_bytes} bytes.", status=413, code="request_too_large"
        )
        if (self.content_length or 0) > max_bytes:
            raise too_large
        too_late = RequestError("The request body did not come in time.", status=408, code="request_timeout")
        chunks: list[bytes] = []
        num_bytes = 0
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.body_is_read:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await self.receive()
            except TimeoutError:
                raise too_late from None
            # Python 3.11's wait_for, in which gunicorn waits, may swallow the time-out when a piece comes that moment.
            if self.has_left or asyncio.get_running_loop().time() >= deadline:
                raise too_late
            chunk = event.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise too_large
            chunks.append(chunk)
        return b"".join(chunks)

    def watch(self) -> None:
        """From now on, with the body read, the handler is cancelled when the client leaves."""
        self._watcher = asyncio.create_task(self._watch())

    def at_end(self, callback: Callable[[], None]) -> None:
        """Call this when the request has ended, in whatever way."""
        self._at_end.append(callback)

    def end(self) -> None:
        """The request has ended: run what was registered."""
        if self._watcher is not None:
            self._watcher.cancel()
        for callback in self._at_end:
            callback()

    async def _watch(self) -> None:
        while not self.has_left:
            await self.receive()
        if self._task is not None:
            self._task.cancel()


def with_disconnects(app: App) -> App:
    """`app`, whose HTTP scopes have a `Client`, and whose handlers are cancelled when it leaves."""

    async def wrapped(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # an upgrade on any path; there is none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        client = Client(receive, scope["headers"])
        first = True

        async def first_nothing() -> dict[str, Any]:
            # falcon 4.4 waits for the first piece of the body before it routes. A body that is refused is not to be
            # asked for, which is what `Expect: 100-continue` is about: it gets an empty piece.
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": b"", "more_body": True}
            return await client.receive()

        # falcon 4.4 fails on a query that is not UTF-8, outside of its error handling; there is none that we read.
        try:
            await app(scope | {CLIENT: client, "query_string": b""}, first_nothing, send)
        except asyncio.CancelledError:
            if not client.has_left:
                raise
        finally:
            client.end()

    return wrapped
