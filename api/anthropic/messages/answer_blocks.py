"""The content blocks of an answer: the events of a stream, or the list of a complete message.

Used by `api.anthropic.messages.rendering`. A block begins where the kind of output changes, and at each call. Ids and signatures are derived
from the message's id, so that any process renders the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from api.anthropic.messages import signature
from api.anthropic.messages.thinking import Display
from api.generation.front_end import call_id
from api.http import sse
from common.protocol import Delta, Reasoning, ToolArguments, ToolCall

_encode = msgspec.json.encode

Part = str | Reasoning | ToolCall | ToolArguments


def _parts(delta: Delta, display: Display) -> Iterator[Part]:
    """What a token released, in order: reasoning comes before text, calls come after it."""
    if display != "hidden":
        yield from (piece for piece in delta.pieces if isinstance(piece, Reasoning))
    if delta.text:
        yield delta.text
    for piece in delta.pieces:
        if not isinstance(piece, Reasoning):
            yield piece


def _signature(message_id: str, index: int, thoughts: str, display: Display) -> str:
    """Of the block of this index."""
    if display == "omitted":
        return signature.of_omitted(thoughts)
    return signature.of_shown(f"{message_id}/{index}/{thoughts}")


def _tool_use(message_id: str, call: ToolCall, arguments: str) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": call_id("toolu_", message_id, call.index),
        "name": call.name,
        "input": _input(arguments),
        "caller": {"type": "direct"},
    }


def _input(arguments: str) -> dict[str, Any]:
    """The arguments as an object. Those of a call that was cut are not JSON: they are wrapped as Anthropic's documentation of
    fine-grained tool streaming has it.
    """
    if not arguments:
        return {}
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {"INVALID_JSON": arguments}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def _thinking(text: str, signed: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": signed}


class StreamBlocks:
    """The events of an answer's blocks."""

    def __init__(self, message_id: str, display: Display) -> None:
        self._message_id = message_id
        self._display = display
        self._index = -1  # of the open block, or of the last one
        self._open: type[Part] | None = None  # of what the open block is made
        self._thoughts: list[str] = []  # of the open block
        self._before, self._after = b"", b"}}" + sse.END

    def add(self, delta: Delta) -> bytes:
        """The events of one token; may be empty."""
        if not delta.pieces and (self._open is str or not delta.text):  # the usual case
            return self._before + _encode(delta.text) + self._after if delta.text else b""
        return b"".join(self._part(part) for part in _parts(delta, self._display))

    def end(self) -> bytes:
        """The events after the last token."""
        return self._close()

    def _part(self, part: Part) -> bytes:
        match part:
            case str():
                begin = b"" if self._open is str else self._begin(str, _text(""), "text_delta", "text")
                return begin + self._delta(part)
            case Reasoning(text):
                begin = b""
                if self._open is not Reasoning:
                    begin = self._begin(Reasoning, _thinking("", ""), "thinking_delta", "thinking")
                self._thoughts.append(text)
                return begin if self._display == "omitted" else begin + self._delta(text)
            case ToolCall():
                block = _tool_use(self._message_id, part, "")
                return self._begin(ToolCall, block, "input_json_delta", "partial_json")
            case ToolArguments(_, text):  # of the call that began last
                return self._delta(text) if text else b""

    def _begin(self, kind: type[Part], block: dict[str, Any], delta_type: str, key: str) -> bytes:
        """Open a block, and prepare the bytes around what its deltas add."""
        closing = self._close()
        self._index += 1
        self._open = kind
        head = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%s","%s":'
        data = head % (self._index, delta_type.encode(), key.encode())
        self._before = b"event: content_block_delta\n" + sse.DATA + data
        return closing + self._event(
            {"type": "content_block_start", "index": self._index, "content_block": block}
        )

    def _delta(self, text: str) -> bytes:
        return self._before + _encode(text) + self._after

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open is Reasoning:
            value = _signature(self._message_id, self._index, "".join(self._thoughts), self._display)
            delta = {"type": "signature_delta", "signature": value}
            signed = self._event({"type": "content_block_delta", "index": self._index, "delta": delta})
        self._open, self._thoughts = None, []
        return signed + self._event({"type": "content_block_stop", "index": self._index})

    @staticmethod
    def _event(data: dict[str, Any]) -> bytes:
        return sse.frame(_encode(data), event=data["type"])


class CompleteBlocks:
    """The blocks of a complete message."""

    def __init__(self, message_id: str, display: Display) -> None:
        self._message_id = message_id
        self._display = display
        self._blocks: list[tuple[str | Reasoning | ToolCall, list[str]]] = []  # its first part, its texts

    def add(self, delta: Delta) -> None:
        """Collect one token."""
        for part in _parts(delta, self._display):
            match part:
                case ToolCall():
                    self._blocks.append((part, []))
                case ToolArguments(_, text):
                    self._blocks[-1][1].append(text)
                case str() | Reasoning():
                    text = part if isinstance(part, str) else part.text
                    if self._blocks and type(self._blocks[-1][0]) is type(part):
                        self._blocks[-1][1].append(text)
                    else:
                        self._blocks.append((part, [text]))

    def blocks(self) -> list[dict[str, Any]]:
        """All of them, in order."""
        return [self._block(i, first, "".join(texts)) for i, (first, texts) in enumerate(self._blocks)]

    def _block(self, index: int, first: str | Reasoning | ToolCall, text: str) -> dict[str, Any]:
        if isinstance(first, ToolCall):
            return _tool_use(self._message_id, first, text)
        if isinstance(first, str):
            return _text(text)
        signed = _signature(self._message_id, index, text, self._display)
        return _thinking("" if self._display == "omitted" else text, signed)
