"""A server with the part of Redis's protocol that contract tests of redis-py need; each test scripts its replies."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

HANGS_UP = b""
"""In place of a reply: close the connection."""

_GREETINGS = {"HELLO": b"%1\r\n$5\r\nproto\r\n:3\r\n", "CLIENT": b"+OK\r\n"}
"""redis-py 8 requests RESP 3, in which pub/sub messages are pushes."""


class RespServer:
    """Replies to each command with what `answer` returns for it, and records all commands except those of a handshake.

    Attributes:
        commands: Received, except those of handshakes.
    """

    def __init__(self, answer: Callable[[list[str]], bytes]) -> None:
        self.commands: list[list[str]] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            connection.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as received:
            try:
                while header := received.readline():
                    words = []
                    for _ in range(int(header[1:])):
                        length = int(received.readline()[1:])
                        words.append(received.read(length + 2)[:-2].decode())
                    if words[0].upper() in _GREETINGS:
                        connection.sendall(_GREETINGS[words[0].upper()])
                        continue
                    self.commands.append(words)
                    answer = self._answer(words)
                    if answer == HANGS_UP:
                        return
                    connection.sendall(answer)
            except OSError:
                return
