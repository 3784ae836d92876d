"""A TCP proxy on loopback that simulates a bad network: latency, and connections that are reset.

Tests run it in a thread (`Proxy`), benchmarks in a process of its own: `python -m bench.harness.proxy --to PORT --delay-ms 1`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections import deque
from types import TracebackType
from typing import Self

from bench.harness.table import say

HOST = "127.0.0.1"


class _Side(asyncio.Protocol):
    """One side of a connection: forwards what it receives to the other side, in order, after the delay."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._delayed: deque[bytes | None] = deque()  # None: end of the stream
        self._early: list[bytes] = []  # received before the other side was connected
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._proxy.sides.add(self)

    def join(self, other: _Side) -> None:
        """Connect the other side, and forward what was received before."""
        self.other = other
        for data in self._early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
        else:
            self._send_later(data)

    def _send_later(self, data: bytes | None) -> None:
        self._delayed.append(data)
        self._loop.call_later(self._proxy.delay_seconds, self._send_next)

    def _send_next(self) -> None:
        data = self._delayed.popleft()
        transport = None if self.other is None else self.other.transport
        if transport is None:
            return
        if data is None:
            transport.close()
        else:
            transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._proxy.sides.discard(self)
        if exc is not None and self.other is not None and self.other.transport is not None:
            self.other.transport.abort()
        else:
            self._send_later(None)


class Proxy:
    """Runs in a thread for the duration of a `with` block.

    Attributes:
        delay_seconds: Delay of data, each way; may be changed while no data is in transit.

    Args:
        port: The port on 127.0.0.1 to which connections are forwarded.
    """

    def __init__(self, port: int, delay_seconds: float = 0.0) -> None:
        self.delay_seconds = delay_seconds
        self.port = 0
        self.sides: set[_Side] = set()
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def join(self) -> None:
        """Wait until the process ends."""
        self._thread.join()

    def reset_all(self) -> None:
        """Reset every connection, whatever is in transit."""
        self._loop.call_soon_threadsafe(self._reset)

    def _reset(self) -> None:
        for side in list(self.sides):
            if side.transport is not None:
                side.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(self._loop.create_server(self._accepted, HOST, 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._reset()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    def _accepted(self) -> _Side:
        side = _Side(self)
        task = self._loop.create_task(self._forward(side))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return side

    async def _forward(self, side: _Side) -> None:
        try:
            _, target = await self._loop.create_connection(lambda: _Side(self), HOST, self._target)
        except OSError:
            if side.transport is not None:
                side.transport.abort()
            return
        target.join(side)
        side.join(target)


def main(argv: list[str] | None = None) -> int:
    """Print the proxy's port and run until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m bench.harness.proxy", description=__doc__)
    parser.add_argument("--to", type=int, required=True, metavar="PORT")
    parser.add_argument("--delay-ms", type=float, default=0.0, metavar="MS", help="each way")
    arguments = parser.parse_args(argv)
    with Proxy(arguments.to, arguments.delay_ms / 1000) as proxy:
        say(str(proxy.port))
        proxy.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
