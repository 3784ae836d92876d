"""Chat streams: frames, chunks, and equality with the non-streamed answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conformance import judge, probes
from tests.conformance.server import CHAT, LEGACY, Answer, Server, require


def _stream(server: Server, **fields: Any) -> Answer:
    return server.once(CHAT, **{"max_tokens": 5, "stream": True} | fields)


def content_type(server: Server) -> None:
    judge.check_header(_stream(server), "content-type", "^text/event-stream")


def request_id(server: Server) -> None:
    judge.check_header(_stream(server), "x-request-id", ".")


def frames(server: Server) -> None:
    """Comments between frames are allowed, and a line with an id in each (WHATWG, server-sent events)."""
    answer = _stream(server)
    require(answer.chunks, "there are no chunks")
    require(answer.body.endswith(b"\n\n"), "the last frame does not end in an empty line")
    for text in answer.body.removesuffix(b"\n\n").split(b"\n\n"):
        frame = text.partition(b"\n")[2] if text.startswith(b"id: ") else text
        require(frame.startswith((b"data: ", b": ")) and b"\n" not in frame, f"a frame is {frame[:40]!r}")


def done_once(server: Server) -> None:
    found = _stream(server).frames
    require(found and found[-1] == "[DONE]", f"the last frame is {found[-1:]}")
    require(found.count("[DONE]") == 1, "[DONE] comes more than once")


def one_of(server: Server, name: str) -> None:
    """The field is the same in all chunks and has the expected value."""
    values = {chunk.get(name) for chunk in _stream(server, stream_options={"include_usage": True}).chunks}
    require(len(values) == 1, f"they have {len(values)} different values of {name}")
    value = values.pop()
    right: dict[str, Callable[[], bool]] = {
        "id": lambda: value.startswith("chatcmpl-"),
        "created": lambda: type(value) is int,
        "model": lambda: value == server.model,
        "system_fingerprint": lambda: isinstance(value, str),
        "object": lambda: value == "chat.completion.chunk",
    }
    require(value is not None and right[name](), f"{name} is {value!r}")


def role_first(server: Server) -> None:
    deltas = [choice["delta"] for chunk in _stream(server).chunks for choice in chunk["choices"]]
    require(deltas[0].get("role") == "assistant", f"the first delta is {deltas[0]}")
    require(not deltas[0].get("content"), "the first delta has text")
    require(not any(delta.get("role") for delta in deltas[1:]), "the role comes more than once")


def finish_last(server: Server) -> None:
    chunks = [chunk for chunk in _stream(server).chunks if chunk["choices"]]
    last = chunks[-1]["choices"][0]
    require(last["finish_reason"] == "length", f"the last finish_reason is {last['finish_reason']!r}")
    require(not any(last["delta"].values()), f"the last delta is {last['delta']}")
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        require(
            "finish_reason" in choice and choice["finish_reason"] is None, "finish_reason is not null before"
        )


def in_pieces(server: Server) -> None:
    answer = _stream(server, **probes.biased(next(iter(probes.letters(server)))))
    require(len(answer.texts()) > 2, f"5 tokens arrived in {len(answer.texts())} pieces")


def whole_characters(server: Server) -> None:
    plain, stream = server.both(LEGACY, **probes.emoji(server))
    pieces = stream.texts()
    require("".join(pieces) == plain.text(), f"the stream is {''.join(pieces)!r}, not {plain.text()!r}")
    require(not any("\ufffd" in piece for piece in pieces), "a piece has half a character")


def usage_last(server: Server, path: str) -> None:
    fields = {"max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = server.post(path, fields).chunks
    require(chunks[-1]["choices"] == [], "the last chunk has choices")
    usage = chunks[-1].get("usage")
    require(isinstance(usage, dict) and type(usage.get("total_tokens")) is int, f"the last usage is {usage}")
    require(usage["completion_tokens"] <= 3, f"usage is {usage}")
    require(
        all("usage" in c and c["usage"] is None for c in chunks[:-1]), "usage is not null in the other chunks"
    )
    require(all(chunk["choices"] for chunk in chunks[:-1]), "others have no choices")


def usage_equals_plain(server: Server) -> None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    plain = server.chat(max_tokens=5).json["usage"]
    stream = _stream(server, stream_options={"include_usage": True}).chunks[-1]["usage"]
    require([plain[n] for n in names] == [stream[n] for n in names], f"{stream} is not {plain}")


def no_usage(server: Server, fields: dict[str, Any]) -> None:
    chunks = _stream(server, **fields).chunks
    require(not any(chunk.get("usage") for chunk in chunks), "there is a usage")
    require(all(chunk["choices"] for chunk in chunks), "there is a chunk without choices")


def equals_plain(server: Server, path: str, fields: dict[str, Any], num_choices: int = 1) -> None:
    plain, stream = server.once(path, **fields), server.post(path, fields | {"stream": True})
    for index in range(num_choices):
        text = "".join(stream.texts(index))
        require(text == plain.text(index), f"choice {index}: {text[:40]!r} is not {plain.text(index)[:40]!r}")
    indices = {choice["index"] for chunk in stream.chunks for choice in chunk["choices"]}
    require(indices == set(range(num_choices)), f"the indices are {sorted(indices)}")


def each_choice_ends(server: Server) -> None:
    chunks = _stream(server, n=3, temperature=1, max_tokens=4).chunks
    for index in range(3):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        require(
            [bool(c["delta"].get("role")) for c in mine].count(True) == 1, f"choice {index}: not one role"
        )
        ends = [c["finish_reason"] for c in mine if c["finish_reason"]]
        require(len(ends) == 1, f"choice {index} has the finish_reasons {ends}")
        require(mine[-1]["finish_reason"], f"choice {index} continues after its end")


def refused_before(server: Server) -> None:
    for fields in ({"top_p": 7}, {"logit_bias": {"99999999": 1}}):
        judge.check_error(server.post(CHAT, fields | {"stream": True}), 400, param=next(iter(fields)))
