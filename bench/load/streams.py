"""A load generator for any server with a streaming API of OpenAI's or Anthropic's: many streams, one thread, little CPU.

`python -m bench.load --url http://127.0.0.1:8080 --model MODEL_ID --streams 64` sends that many requests at once and
reports how fast they came. It uses sockets and a selector instead of an HTTP library: it runs on the same machine as the pool, so
its CPU share must be small, and is measured. Streams of `bench.harness.synthetic_worker` can be checked token by token.
"""

from __future__ import annotations

import argparse
import errno
import re
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bench.harness.table import percentile, say
from bench.load.protocols import CHAT, PROTOCOLS, Protocol

_READ_BYTES = 1 << 16
_SELECT_SECONDS = 0.5


class Stream:
    """One request and its response.

    Attributes:
        began_at: Monotonic seconds, before the connection was opened; as the others.
        answered_at: When the response headers were complete.
        retry_after_seconds: The Retry-After header of a refusal.
        first_at: When the first text came; 0 if none did.
        last_at: When the last text came, or the finish reason after tokens that have no text.
        num_chunks: Chunks with text: tokens, if the server sends each in a chunk of its own.
        gaps_seconds: Between consecutive chunks with text.
        latencies_us: From the end of a token's step to its arrival here, if the synthetic worker adds time stamps.
        completion_tokens: The server's count, if usage was asked for.
        text: The whole text, if `keep_text`.
        error: Why the stream is incomplete or wrong; None if it is complete.

    Args:
        check: Check that the text is the synthetic worker's: " 1 2 3 ...", each number once and in order.
        keep_text: Keep the text.
        protocol: Of the request.
    """

    def __init__(
        self, request: bytes, *, check: bool = False, keep_text: bool = False, protocol: Protocol = CHAT
    ) -> None:
        self.request = request
        self.status = 0
        self.began_at = self.answered_at = self.first_at = self.last_at = 0.0
        self.retry_after_seconds: int | None = None
        self.num_chunks = 0
        self.num_checked = 0
        self.completion_tokens = 0
        self.gaps_seconds: list[float] = []
        self.latencies_us: list[int] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.is_done = False
        self._read_frame = protocol.read
        self._check = check
        self._keep_text = keep_text
        self._texts: list[str] = []
        self._raw = b""  # from the socket: an incomplete transfer chunk
        self._body = b""  # of the response: an incomplete event
        self._is_chunked = False

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def feed(self, data: bytes) -> None:
        """Process data from the socket; empty data means that the server closed the connection."""
        if not data:
            self._end(f"the server closed the connection (status {self.status}): {self._body[:300]!r}")
            return
        self._raw += data
        if self.status == 0 and not self._read_headers():
            return
        self._read_body()

    def _read_headers(self) -> bool:
        head, separator, rest = self._raw.partition(b"\r\n\r\n")
        if not separator:
            return False
        self.status = int(head[9:12])
        self.answered_at = time.monotonic()
        if retry_after := re.search(rb"\r\nretry-after: (\d+)", head, re.IGNORECASE):
            self.retry_after_seconds = int(retry_after[1])
        self._is_chunked = b"transfer-encoding: chunked" in head.lower()
        self._raw = rest
        return True

    def _read_body(self) -> None:
        if not self._is_chunked:
            self._body += self._raw
            self._raw = b""
        else:
            self._read_transfer_chunks()
        if self.status != 200:  # noqa: PLR2004
            return
        events = self._body.split(b"\n\n")
        self._body = events.pop()
        now, now_us = time.monotonic(), time.time_ns() // 1000
        for event in events:
            start = event.find(b"data: ")  # perhaps after an id line
            if start >= 0:
                self._take(event[start + 6 :], now, now_us)

    def _read_transfer_chunks(self) -> None:
        raw, at, parts = self._raw, 0, [self._body]
        while (end := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:end], 16)
            if len(raw) < end + size + 4:
                break
            parts.append(raw[end + 2 : end + 2 + size])
            at = end + size + 4
        self._raw, self._body = raw[at:], b"".join(parts)

    def _take(self, data: bytes, now: float, now_us: int) -> None:
        frame = self._read_frame(data)
        if frame.error is not None:
            self._end(frame.error)
            return
        self.completion_tokens = frame.completion_tokens or self.completion_tokens
        self.finish_reason = frame.finish_reason or self.finish_reason
        if frame.text:
            self._take_text(frame.text, now, now_us)
        elif frame.finish_reason:
            self.last_at = now
        if frame.is_last:
            self._end(None if self.finish_reason else "the stream ended without saying why")

    def _take_text(self, text: str, now: float, now_us: int) -> None:
        if self.num_chunks:
            self.gaps_seconds.append(now - self.last_at)
        else:
            self.first_at = now
        self.last_at = now
        self.num_chunks += 1
        if self._keep_text:
            self._texts.append(text)
        if self._check:
            for word in text.split(" ")[1:]:
                number, _, mark = word.partition("@")
                self.num_checked += 1
                if number != str(self.num_checked):
                    self._end(f"token {number} instead of {self.num_checked}")
                    return
                if mark:
                    self.latencies_us.append(now_us - int(mark))

    def _end(self, error: str | None) -> None:
        if not self.is_done:
            self.is_done, self.error = True, error


class Load:
    """Requests to one server."""

    def __init__(self, url: str, model: str, api_key: str | None = None, protocol: Protocol = CHAT) -> None:
        self.protocol = protocol
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._model = model
        self._api_key = api_key

    def request(
        self, prompt: str, max_tokens: int, protocol: Protocol | None = None, **options: Any
    ) -> bytes:
        """A streaming request, as the bytes of a whole connection.

        Args:
            protocol: Instead of this load's own.
            options: More fields.
        """
        protocol = protocol or self.protocol
        body = msgspec.json.encode(
            {"model": self._model, "stream": True} | protocol.body(prompt, max_tokens) | options
        )
        key = f"Authorization: Bearer {self._api_key}\r\n" if self._api_key else ""
        head = (
            f"POST {protocol.path} HTTP/1.1\r\nHost: {self._address[0]}:{self._address[1]}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body

    def run(
        self, streams: Iterable[Stream], timeout_seconds: float = 120.0, *, apart_seconds: float = 0.0
    ) -> list[Stream]:
        """Send all requests, each on a connection of its own; returns when all have ended.

        Args:
            apart_seconds: Between the starts of two requests; 0: all at once.
        """
        streams = list(streams)
        began_at = time.monotonic()
        deadline = began_at + timeout_seconds
        coming = deque(enumerate(streams))
        with selectors.DefaultSelector() as selector:
            num_open = len(streams)
            while num_open and (now := time.monotonic()) < deadline:
                while coming and coming[0][0] * apart_seconds <= now - began_at:
                    self._connect(coming.popleft()[1], selector)
                for key, _ in selector.select(
                    min(_SELECT_SECONDS, apart_seconds) if coming else _SELECT_SECONDS
                ):
                    stream = key.data
                    self._on_ready(stream, key, selector)
                    if stream.is_done:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]
                        num_open -= 1
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
        for stream in streams:
            if not stream.is_done:
                stream.error = f"incomplete after {timeout_seconds:.0f} s"
        return streams

    def _connect(self, stream: Stream, selector: selectors.BaseSelector) -> None:
        stream.began_at = time.monotonic()
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if connection.connect_ex(self._address) not in (0, errno.EINPROGRESS):
            raise OSError(f"cannot connect to {self._address}")
        selector.register(connection, selectors.EVENT_WRITE, stream)

    @staticmethod
    def _on_ready(stream: Stream, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
        connection: Any = key.fileobj
        try:
            if key.events & selectors.EVENT_WRITE:  # a request fits into the socket's buffer
                connection.send(stream.request)
                selector.modify(connection, selectors.EVENT_READ, stream)
            else:
                stream.feed(connection.recv(_READ_BYTES))
        except BlockingIOError:
            pass
        except OSError as error:
            stream.is_done, stream.error = True, str(error)


def errors(streams: Iterable[Stream]) -> list[str]:
    """The errors of the streams that have one."""
    return [stream.error for stream in streams if stream.error is not None]


def inexact(streams: Iterable[Stream], num_tokens: int) -> list[str]:
    """An error for each checked stream that failed or has another number of tokens."""
    return [
        stream.error or f"{stream.num_checked} of {num_tokens} tokens"
        for stream in streams
        if stream.error is not None or stream.num_checked != num_tokens
    ]


def summary(streams: list[Stream], own_cpu_seconds: float) -> str:
    """A summary of one run, in lines."""
    complete = [stream for stream in streams if stream.error is None]
    lines = [f"{len(complete)} of {len(streams)} streams are complete"]
    lines += sorted(set(errors(streams)))[:5]
    if complete:
        num_chunks = sum(stream.num_chunks for stream in complete)
        seconds = max(stream.last_at for stream in complete) - min(stream.began_at for stream in complete)
        first = [1000 * (stream.first_at - stream.began_at) for stream in complete]
        gaps = [1000 * gap for stream in complete for gap in stream.gaps_seconds]
        lines += [
            f"{num_chunks} chunks in {seconds:.2f} s: {num_chunks / seconds:,.1f} per second",
            f"first text after {percentile(first, 50):.1f} ms median, {percentile(first, 99):.1f} ms p99",
            f"gaps {percentile(gaps, 50):.1f} ms median, {percentile(gaps, 99):.1f} ms p99",
            f"longest gap {max(gaps, default=0):.1f} ms",
            f"this client used {1e6 * own_cpu_seconds / num_chunks:.1f} µs per chunk",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Load a server; the exit status is 1 if a stream was not complete."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", required=True, metavar="MODEL_ID")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--streams", type=int, default=16, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--prompt", default="Write a long story about the sea.")
    parser.add_argument(
        "--check", action="store_true", help="check that the texts are the synthetic worker's"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="chat")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    protocol = PROTOCOLS[arguments.protocol]
    load = Load(arguments.url, arguments.model, arguments.api_key, protocol)
    request = load.request(arguments.prompt, arguments.max_tokens)
    began = time.process_time()
    streams = load.run(
        [Stream(request, check=arguments.check, protocol=protocol) for _ in range(arguments.streams)],
        arguments.timeout,
    )
    say(summary(streams, time.process_time() - began))
    return 1 if errors(streams) else 0
