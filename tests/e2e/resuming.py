"""A client that reads a stream frame by frame, breaks off where the test says, and comes back with the last frame's id."""

from __future__ import annotations

import re
import socket
from types import TracebackType
from typing import Self

from tests.e2e.api_pool import request

_ID = re.compile(rb"(?m)\Aid: (\S+):(\d+)\n")
_KEEP_ALIVES = (b":", b"event: ping\n", b"event: response.in_progress\n")
_CREATED = re.compile(rb'"created(_at)?":\d+(\.\d+)?')


class StreamReader:
    """One response; closing it is how the client dies.

    Attributes:
        status: Of the response.
        headers: By name in lower case.
        frames: Read so far, those without an id left out.
        unnumbered: Frames without an id, keep-alives left out.
        last_id: Of the last frame.
    """

    def __init__(self, port: int, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._connection.sendall(request(method, path, body, content_type="application/json", **headers))
        self._reader = self._connection.makefile("rb")
        self.status = int(self._reader.readline().split()[1])
        self.headers: dict[str, str] = {}
        while line := self._reader.readline().strip():
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()
        self.frames: list[bytes] = []
        self.unnumbered: list[bytes] = []
        self.last_id = ""
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The client dies."""
        self._reader.close()
        self._connection.close()

    def read(self, num_frames: int = 1_000_000) -> bytes:
        """Frames up to this number in all, or up to the end of the stream or of the connection; returns all numbered ones."""
        while len(self.frames) < num_frames:
            while b"\n\n" not in self._rest:
                chunk = self._chunk()
                if not chunk:
                    return b"".join(self.frames)
                self._rest += chunk
            frame, _, self._rest = self._rest.partition(b"\n\n")
            self._take(frame + b"\n\n")
        return b"".join(self.frames)

    def _take(self, frame: bytes) -> None:
        found = _ID.match(frame)
        if found is not None:
            self.last_id = f"{found[1].decode()}:{found[2].decode()}"
            self.frames.append(frame)
        elif not frame.startswith(_KEEP_ALIVES):
            self.unnumbered.append(frame)

    def _chunk(self) -> bytes:
        """The next part of the body; empty at its end, and if the server has died."""
        try:
            size = int(self._reader.readline() or b"0", 16)
            data = self._reader.read(size)
            self._reader.readline()
        except OSError:
            return b""
        return data


def anonymous(stream: bytes) -> bytes:
    """A stream without what differs between two equal requests: the answer's id and its time."""
    found = re.search(rb"\Aid: ([0-9a-f]+):", stream)
    assert found is not None
    return _CREATED.sub(b'"created":0', stream.replace(found[1], b"X"))
