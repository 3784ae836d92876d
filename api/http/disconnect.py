"""Cancels a request's handler within milliseconds after its client has disconnected, streamed or not.

falcon 4.4 detects a disconnect only after the next event of a stream, gunicorn 27 cancels a handler after three seconds, and
for a request that is not streamed nothing watches at all. `with_disconnects`, called by `api.app`, wraps the falcon app and
gives each request a `Client`, which watches the server's `receive`. A half-close counts as a disconnect (docs/faults.md).
Independent of models and queues.
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
"""The key of the request's `Client` in the ASGI scope."""


class Client:
    """The client of one request: its body, and whether it is still connected.

    Attributes:
        is_disconnected: Whether the connection has been lost.
        is_body_complete: Whether the complete body was received.
        content_length: As the request headers declare it, or None.
    """

    def __init__(self, receive: Receive, headers: list[tuple[bytes, bytes]]) -> None:
        self.is_disconnected = False
        lengths = [value for name, value in headers if name == b"content-length"]
        self.content_length = int(lengths[0]) if lengths else None
        self.is_body_complete = self.content_length in (None, 0) and not any(
            name == b"transfer-encoding" for name, _ in headers
        )
        self._receive = receive
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._end_callbacks: list[Callable[[], None]] = []

    async def receive(self) -> dict[str, Any]:
        """The next ASGI event from the server."""
        event = await self._receive()
        if event["type"] == "http.disconnect":
            self.is_disconnected = True
        elif not event.get("more_body", False):
            self.is_body_complete = True
        return event

    async def read_body(self, max_bytes: int, seconds: float) -> bytes:
        """The request body; reading stops at the limits.

        Raises:
            RequestError: 413, the body or its Content-Length exceeds `max_bytes`; 408, it did not arrive within `seconds`.
        """
        too_large = RequestError(
            f"The request body is larger than {max_bytes} bytes.", status=413, code="request_too_large"
        )
        if (self.content_length or 0) > max_bytes:
            raise too_large
        too_late = RequestError(
            "The request body did not arrive in time.", status=408, code="request_timeout"
        )
        chunks: list[bytes] = []
        num_bytes = 0
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.is_body_complete:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await self.receive()
            except TimeoutError:
                raise too_late from None
            # Python 3.11's wait_for, which gunicorn uses, may swallow the timeout if a chunk arrives at that moment.
            if self.is_disconnected or asyncio.get_running_loop().time() >= deadline:
                raise too_late
            chunk = event.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise too_large
            chunks.append(chunk)
        return b"".join(chunks)

    def watch(self) -> None:
        """Cancel the handler when the client disconnects; call this after the body was read. May be called again."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the request has ended, however it ends."""
        self._end_callbacks.append(callback)

    def end(self) -> None:
        """Stop watching, and run the callbacks of `on_end`."""
        if self._watcher is not None:
            self._watcher.cancel()
        for callback in self._end_callbacks:
            callback()

    async def _watch(self) -> None:
        while not self.is_disconnected:
            await self.receive()
        if self._task is not None:
            self._task.cancel()


def with_disconnects(app: App) -> App:
    """Wrap `app`: each HTTP scope has a `Client`, and a handler that watches it is cancelled when it disconnects."""

    async def wrapped(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # an upgrade request, which no path supports
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        client = Client(receive, scope["headers"])
        is_first = True

        async def receive_after_empty_chunk() -> dict[str, Any]:
            # falcon 4.4 receives the first chunk of the body before it routes, which would send `100 Continue` also for
            # a body that is refused. So it gets an empty chunk first.
            nonlocal is_first
            if is_first:
                is_first = False
                return {"type": "http.request", "body": b"", "more_body": True}
            return await client.receive()

        # falcon 4.4 fails on a query string that is not UTF-8, outside its error handling; it may only contain ASCII.
        query = scope["query_string"] if scope["query_string"].isascii() else b""
        try:
            await app(scope | {CLIENT: client, "query_string": query}, receive_after_empty_chunk, send)
        except asyncio.CancelledError:
            if not client.is_disconnected:
                raise
        finally:
            client.end()

    return wrapped
