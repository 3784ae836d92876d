"""Streams that can be resumed, with `GET /v1/streams/{id}`: ids of frames, and the same bytes again from any of them."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.conformance import judge
from tests.conformance.server import CHAT, RESPONSES, Answer, Broken, Server, require

_RESUMABLE = {"X-Resumable": "true", "content-type": "application/json"}
_PAUSE_SECONDS = 0.1


def _frames(answer: Answer) -> list[tuple[str, bytes]]:
    """Each frame with an id, as (id, frame)."""
    require(answer.status == 200, f"status {answer.status}: {answer.body[:80]!r}")
    found: list[tuple[str, bytes]] = []
    for frame in answer.body.split(b"\n\n"):
        lines = [line for line in frame.split(b"\n") if line.startswith(b"id:")]
        found += [(line[3:].strip().decode(), frame) for line in lines]
    return found


def _body(server: Server, path: str, **fields: Any) -> bytes:
    name = "max_output_tokens" if path == RESPONSES else "max_tokens"
    return server.body(path, {"stream": True, name: 6} | fields)


def _resumable(server: Server, path: str = CHAT, **fields: Any) -> tuple[Answer, str]:
    answer = server.ask("POST", path, _body(server, path, **fields), _RESUMABLE)
    require(answer.status == 200, f"status {answer.status}: {answer.body[:80]!r}")
    return answer, answer.headers.get("x-stream-id", "")


def _again(server: Server, stream: str, last: str = "", query: str = "") -> Answer:
    return server.ask("GET", f"/v1/streams/{stream}{query}", None, {"Last-Event-ID": last} if last else {})


def ids(server: Server, path: str) -> None:
    found = _frames(_resumable(server, path)[0])
    require(found, "no frame has an id")
    streams = {each.rpartition(":")[0] for each, _ in found}
    numbers = [each.rpartition(":")[2] for each, _ in found]
    require(len(streams) == 1, f"the ids are of {len(streams)} streams")
    require(numbers == [str(i) for i in range(len(numbers))], f"they are {numbers[:8]}")


def header(server: Server) -> None:
    answer, stream = _resumable(server)
    first = _frames(answer)[0][0]
    require(stream and first == f"{stream}:0", f"x-stream-id is {stream!r}, the first id {first!r}")


def again(server: Server, path: str) -> None:
    answer, stream = _resumable(server, path)
    frames = _frames(answer)
    require(_frames(_again(server, stream)) == frames, "the frames are not the same")


def after(server: Server) -> None:
    answer, stream = _resumable(server)
    frames = _frames(answer)
    for i in (0, len(frames) // 2):
        rest = _frames(_again(server, stream, frames[i][0]))
        require(rest == frames[i + 1 :], f"after frame {i} come {[each for each, _ in rest][:5]}")


def starting_after(server: Server) -> None:
    answer, stream = _resumable(server)
    frames = _frames(answer)
    rest = _frames(_again(server, stream, query="?starting_after=1"))
    require(rest == frames[2:], f"after frame 1 come {[each for each, _ in rest][:5]}")


def after_last(server: Server) -> None:
    answer, stream = _resumable(server)
    rest = _frames(_again(server, stream, _frames(answer)[-1][0]))
    require(not rest, f"there are {len(rest)} frames")


def disconnect(server: Server) -> None:
    """The client leaves after the first frames; the stream is complete later."""
    body = _body(server, CHAT, max_tokens=12)
    with server.connect() as connection:
        connection.send(
            connection.request_headers("POST", CHAT, f"Content-Length: {len(body)}", "X-Resumable: true")
            + body
        )
        status, headers = connection.read_status()
        require(status == 200, f"status {status}")
    stream = headers.get("x-stream-id", "")
    while server.left_seconds > 1:
        answer = _again(server, stream)
        if b"[DONE]" in answer.body:
            return
        time.sleep(_PAUSE_SECONDS)
    raise Broken("the stream does not end")


def choices(server: Server) -> None:
    answer, stream = _resumable(server, n=2)
    require(_frames(_again(server, stream)) == _frames(answer), "the frames are not the same")


def unknown(server: Server) -> None:
    judge.check_error(_again(server, "0" * 38), 404)


def not_resumable(server: Server) -> None:
    answer = server.ask("POST", CHAT, _body(server, CHAT), _RESUMABLE | {"X-Resumable": "false"})
    require(answer.status == 200, f"status {answer.status}: {answer.body[:80]!r}")
    require("x-stream-id" not in answer.headers, "it has x-stream-id")


def bad_header(server: Server) -> None:
    answer = server.ask("POST", CHAT, _body(server, CHAT), _RESUMABLE | {"X-Resumable": "perhaps"})
    judge.check_error(answer, 400)


def without_stream(server: Server) -> None:
    body = json.loads(_body(server, CHAT)) | {"stream": False}
    judge.check_error(server.ask("POST", CHAT, json.dumps(body).encode(), _RESUMABLE), 400)


def bad_position(server: Server) -> None:
    _, stream = _resumable(server)
    for last in ("nonsense", f"{'0' * 38}:1", f"{stream}:x", f"{stream}:-2"):
        judge.check_error(_again(server, stream, last), 400)
