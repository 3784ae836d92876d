"""The protocols that the load generator can speak: the path and body of a request, and what a frame of its stream says.

Used by `bench.load.streams`. Decodes only what is measured, since the generator's CPU time is taken from the pool's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec


class Frame(NamedTuple):
    """What a frame says.

    Attributes:
        text: Of the answer; may be empty.
        finish_reason: Why the answer ended, in the protocol's words.
        completion_tokens: The server's count; 0 if the frame has none.
        error: Set if the stream has failed.
        is_last: Whether the stream is complete with this frame.
    """

    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int = 0
    error: str | None = None
    is_last: bool = False


@dataclass(frozen=True)
class Protocol:
    """A generating endpoint with streams.

    Attributes:
        path: Such as ``/v1/chat/completions``.
        body: The fields of a request for a prompt and a number of tokens.
        read: The data of a frame, without its ``data: ``, to what it says.
    """

    path: str
    body: Callable[[str, int], dict[str, Any]]
    read: Callable[[bytes], Frame]


class _ChatDelta(msgspec.Struct, frozen=True, gc=False):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True, gc=False):
    delta: _ChatDelta = _ChatDelta()
    text: str = ""  # of a completion
    finish_reason: str | None = None


class _ChatUsage(msgspec.Struct, frozen=True, gc=False):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct, frozen=True, gc=False):
    choices: list[_Choice] = []
    usage: _ChatUsage | None = None
    error: dict[str, Any] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


def _chat_body(prompt: str, max_tokens: int) -> dict[str, Any]:
    """Also of a message: they have the same fields."""
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}


def _completion_body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens}


def _read_chat(data: bytes) -> Frame:
    """Also of a completion."""
    if data == b"[DONE]":
        return Frame(is_last=True)
    chunk = _decode_chunk(data)
    if chunk.error is not None:
        return Frame(error=f"error frame: {chunk.error}")
    text, reason = "", None
    for choice in chunk.choices:
        text += choice.delta.content or choice.text
        reason = choice.finish_reason or reason
    return Frame(text, reason, 0 if chunk.usage is None else chunk.usage.completion_tokens)


class _OutputUsage(msgspec.Struct, frozen=True, gc=False):
    output_tokens: int = 0


class _Response(msgspec.Struct, frozen=True, gc=False):
    status: str = ""
    usage: _OutputUsage | None = None


class _ResponseEvent(msgspec.Struct, frozen=True, gc=False):
    type: str
    delta: str = ""
    response: _Response | None = None


_decode_response_event = msgspec.json.Decoder(_ResponseEvent).decode


def _responses_body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"input": prompt, "max_output_tokens": max_tokens, "store": False}


def _read_responses(data: bytes) -> Frame:
    event = _decode_response_event(data)
    if event.type == "response.output_text.delta":
        return Frame(event.delta)
    if event.type in ("response.completed", "response.incomplete") and event.response is not None:
        usage = event.response.usage
        num_tokens = 0 if usage is None else usage.output_tokens
        return Frame("", event.response.status, num_tokens, is_last=True)
    if event.type in ("response.failed", "error"):
        return Frame(error=f"error frame: {data[:300]!r}")
    return Frame()


class _MessageDelta(msgspec.Struct, frozen=True, gc=False):
    text: str = ""
    stop_reason: str | None = None


class _MessageEvent(msgspec.Struct, frozen=True, gc=False):
    type: str
    delta: _MessageDelta = _MessageDelta()
    usage: _OutputUsage = _OutputUsage()


_decode_message_event = msgspec.json.Decoder(_MessageEvent).decode


def _read_messages(data: bytes) -> Frame:
    event = _decode_message_event(data)
    if event.type == "error":
        return Frame(error=f"error frame: {data[:300]!r}")
    return Frame(
        event.delta.text,
        event.delta.stop_reason,
        event.usage.output_tokens,
        is_last=event.type == "message_stop",
    )


CHAT = Protocol("/v1/chat/completions", _chat_body, _read_chat)
COMPLETIONS = Protocol("/v1/completions", _completion_body, _read_chat)

PROTOCOLS = {
    "chat": CHAT,
    "completions": COMPLETIONS,
    "responses": Protocol("/v1/responses", _responses_body, _read_responses),
    "messages": Protocol("/v1/messages", _chat_body, _read_messages),
}
"""By the name that commands take."""
