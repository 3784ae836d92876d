"""The server under test: one request and its answer, over HTTP or over a raw socket.

Used by all checks. Every 2xx answer is validated by `schema`. Nothing waits beyond the deadline of the current behavior.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from tests.conformance import schema

CHAT = "/v1/chat/completions"
LEGACY = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
ANTHROPIC_VERSION = "2023-06-01"

MAX_SECONDS = 30.0
"""Time limit of one behavior."""

_OK, _REDIRECTS = 200, 300
_MAX_AT_ONCE = 64


class NotShown(Exception):  # noqa: N818 (a finding, not an error)
    """The server does not have the behavior; the message is the reason, in one line."""


class Broken(NotShown):
    """The server closed the connection or did not answer in time: it may have died."""


def require(what: object, reason: str) -> None:
    """Raises:
    NotShown: `what` is false.
    """
    if not what:
        raise NotShown(reason)


@dataclass(frozen=True)
class Answer:
    """A response with its complete body, also of a stream."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            raise NotShown(f"status {self.status}, and the body is not JSON: {self.body[:60]!r}") from None

    @property
    def frames(self) -> list[str]:
        """The contents of a stream's `data:` lines."""
        texts = self.body.decode(errors="replace").split("\n")
        return [text.removeprefix("data:").strip() for text in texts if text.startswith("data:")]

    @property
    def chunks(self) -> list[Any]:
        """The frames that are JSON, parsed."""
        require(self.status == _OK, f"status {self.status}: {self.body[:80]!r}")
        try:
            found = [json.loads(frame) for frame in self.frames if frame != "[DONE]"]
        except ValueError as error:
            raise NotShown(f"a frame is not JSON: {error}") from None
        require(found, "the stream has no frames")
        failed = [chunk["error"] for chunk in found if "error" in chunk]
        require(not failed, f"the stream ended in an error: {failed[:1]}")
        return found

    @property
    def events(self) -> list[Any]:
        """The events of a stream of `/v1/responses` or `/v1/messages`: the data of each, whose `type` is the event's name."""
        require(self.status == _OK, f"status {self.status}: {self.body[:80]!r}")
        found = []
        for frame in self.body.decode(errors="replace").split("\n\n"):
            lines = dict(line.split(": ", 1) for line in frame.split("\n") if ": " in line and line[0] != ":")
            if "data" not in lines or lines["data"] == "[DONE]":
                continue
            try:
                data = json.loads(lines["data"])
            except ValueError as error:
                raise NotShown(f"a frame is not JSON: {error}") from None
            require("event" in lines, "a frame has no event name")
            require(data.get("type") == lines["event"], f"{lines['event']} has the type {data.get('type')!r}")
            found.append(data)
        require(found, "the stream has no events")
        failed = [event for event in found if event["type"] in ("error", "response.failed")]
        require(not failed, f"the stream ended in an error: {failed[:1]}")
        return found

    def texts(self, index: int = 0) -> list[str]:
        """The pieces of one choice's text in a stream."""
        pieces = []
        for chunk in self.chunks:
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                if choice["index"] == index and piece:
                    pieces.append(piece)
        return pieces

    def choice(self, index: int = 0) -> Any:
        """A choice of a non-streamed answer."""
        require(self.status == _OK, f"status {self.status}: {self.body[:80]!r}")
        for choice in self.json.get("choices", []):
            if choice["index"] == index:
                return choice
        raise NotShown(f"there is no choice {index}")

    def text(self, index: int = 0) -> str:
        """The text of a non-streamed chat or completion."""
        choice = self.choice(index)
        return (choice["message"]["content"] or "") if "message" in choice else choice["text"]


@dataclass
class Server:
    """See the module.

    Attributes:
        probed: What `probes` found out about the model, by name.
        complaints: Where answers violated the SDK's types.
    """

    url: str
    model: str
    key: str | None = None
    probed: dict[str, Any] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    deadline: float = 0.0
    _answers: dict[tuple[Any, ...], Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self._client = httpx2.Client(
            base_url=self.url,
            limits=httpx2.Limits(max_connections=_MAX_AT_ONCE),
            trust_env=False,
            verify=self.url.startswith("https"),  # certificates take a while to load
        )
        self.set_deadline()

    def close(self) -> None:
        self._client.close()

    def set_deadline(self, seconds: float = MAX_SECONDS) -> None:
        """Allow the next requests this much time together."""
        self.deadline = time.monotonic() + seconds

    @property
    def left_seconds(self) -> float:
        return max(0.1, self.deadline - time.monotonic())

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request.

        Raises:
            Broken: No answer, or only a part of it.
        """
        return Answer(*self._asked(method, path, body, headers))

    def _asked(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> tuple[int, dict[str, str], bytes]:
        sent = {"content-type": "application/json"} if body is not None else {}
        if self.key:
            sent["authorization"] = f"Bearer {self.key}"
        if path.startswith(MESSAGES):
            sent["anthropic-version"] = ANTHROPIC_VERSION
        sent |= headers or {}
        try:
            with self._client.stream(
                method,
                path,
                content=body,
                headers={name: value for name, value in sent.items() if value},
                timeout=httpx2.Timeout(self.left_seconds),
            ) as response:
                data = bytearray()
                for piece in response.iter_bytes():
                    data += piece
                    if time.monotonic() > self.deadline:
                        raise Broken(f"the answer did not end within {MAX_SECONDS:g} s")
                found = {name.lower(): value for name, value in response.headers.items()}
                if _OK <= response.status_code < _REDIRECTS and method in ("GET", "POST"):
                    self.complaints += schema.complaints(path, found.get("content-type", ""), bytes(data))
                return response.status_code, found, bytes(data)
        except httpx2.TimeoutException:
            raise Broken("no answer in time") from None
        except httpx2.HTTPError as error:
            raise Broken(f"the connection broke: {type(error).__name__} {error}"[:120]) from None

    def chat(self, **fields: Any) -> Answer:
        """A chat, by default greedy with one token; a field that is None is omitted."""
        return self.post(CHAT, fields)

    def complete(self, **fields: Any) -> Answer:
        """A legacy completion, with defaults as in `chat`."""
        return self.post(LEGACY, fields)

    def post(self, path: str, fields: Mapping[str, Any]) -> Answer:
        return self.ask("POST", path, self.body(path, fields))

    def once(self, path: str, **fields: Any) -> Answer:
        """As `post`, but a repeated request returns the cached answer, which several behaviors share."""
        return self.ask_once("POST", path, self.body(path, fields), {})

    def ask_once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        """As `ask`, cached like `once`."""
        key = (method, path, body, *sorted(headers.items()))
        if key not in self._answers:
            self._answers[key] = self.ask(method, path, body, headers)
        return self._answers[key]

    def body(self, path: str, fields: Mapping[str, Any]) -> bytes:
        whole = self.fields(path) | dict(fields)
        return json.dumps({name: value for name, value in whole.items() if value is not None}).encode()

    def fields(self, path: str) -> dict[str, Any]:
        """The default fields of a request."""
        given: dict[str, Any] = {"model": self.model, "max_tokens": 1, "temperature": 0}
        if path.startswith(RESPONSES):
            return {
                "model": self.model,
                "max_output_tokens": 1,
                "temperature": 0,
                "input": "Say hello to the sea.",
            }
        if path.startswith(MESSAGES):
            return given | {"messages": [{"role": "user", "content": "Say hello to the sea."}]}
        if path.partition("?")[0].rstrip("/").endswith("chat/completions"):
            return given | {"messages": [{"role": "user", "content": "Say hello to the sea."}]}
        return given | {"prompt": "The sea is"}

    def both(self, path: str, **fields: Any) -> tuple[Answer, Answer]:
        """A non-streamed answer, and the same request streamed."""
        return self.post(path, fields), self.post(path, fields | {"stream": True})

    def concurrently(self, requests: list[tuple[str, dict[str, Any]]]) -> list[Answer]:
        """The answers of concurrent requests."""
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda request: self.post(*request), requests))

    def concurrent_chats(self, requests: list[dict[str, Any]]) -> list[Answer]:
        """The answers of concurrent chats."""
        return self.concurrently([(CHAT, fields) for fields in requests])

    def lines(self, path: str, fields: Mapping[str, Any]) -> Iterator[str]:
        """The lines of a stream as they arrive; a caller that stops iterating disconnects.

        Raises:
            Broken: As `ask`.
        """
        body = json.dumps(self.fields(path) | dict(fields) | {"stream": True}).encode()
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        try:
            with self._client.stream(
                "POST", path, content=body, headers=headers, timeout=self.left_seconds
            ) as response:
                require(response.status_code == _OK, f"status {response.status_code}")
                yield from response.iter_lines()
        except httpx2.HTTPError as error:
            raise Broken(f"the stream broke: {type(error).__name__}") from None

    def connect(self) -> Connection:
        """A new raw connection.

        Raises:
            Broken: The server does not accept it.
        """
        address = urlsplit(self.url)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            opened = socket.create_connection((address.hostname or "", port), timeout=self.left_seconds)
        except OSError as error:
            raise Broken(f"no connection: {error}") from None
        if address.scheme == "https":
            import ssl

            opened = ssl.create_default_context().wrap_socket(opened, server_hostname=address.hostname)
        return Connection(opened, address.netloc, self.key)


class Connection:
    """A raw connection: bytes to the server and its answers."""

    def __init__(self, opened: socket.socket, host: str, key: str | None) -> None:
        self._socket = opened
        self._host = host
        self._key = key
        self._reader = opened.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def request_headers(self, method: str, path: str, *headers: str, version: str = "1.1") -> bytes:
        """The request line and headers, with the empty line that ends them."""
        lines = [f"{method} {path} HTTP/{version}", f"Host: {self._host}", "Content-Type: application/json"]
        if self._key:
            lines.append(f"Authorization: Bearer {self._key}")
        return "\r\n".join([*lines, *headers, "", ""]).encode()

    def post(self, path: str, body: bytes) -> bytes:
        """A complete POST request."""
        return self.request_headers("POST", path, f"Content-Length: {len(body)}") + body

    def send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:  # it may have answered and closed before it read everything
            return

    def read_status(self) -> tuple[int, dict[str, str]]:
        """The next status line and headers.

        Raises:
            Broken: The connection ended, or nothing arrived.
        """
        try:
            words = self._reader.readline().split()
            headers = {}
            while line := self._reader.readline().strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
        except OSError as error:
            raise Broken(f"no answer: {error}") from None
        if len(words) < 2 or not words[0].startswith(b"HTTP/"):
            raise Broken("the connection was closed without an answer")
        return int(words[1]), headers

    def read(self) -> Answer:
        """The next complete answer.

        Raises:
            Broken: As `read_status`.
        """
        status, headers = self.read_status()
        while status == 100:
            status, headers = self.read_status()
        try:
            if "chunked" in headers.get("transfer-encoding", ""):
                body = b"".join(iter(self._chunk, b""))
            elif "content-length" in headers:
                body = self._reader.read(int(headers["content-length"]))
            else:
                body = self._reader.read()
        except (OSError, ValueError) as error:
            raise Broken(f"the answer broke off: {error}") from None
        return Answer(status, headers, body)

    def _chunk(self) -> bytes:
        size = int(self._reader.readline().split(b";")[0], 16)
        data = self._reader.read(size)
        self._reader.readline()
        return data
