"""The items of a response's output while they are generated: messages, reasoning, calls of functions and of custom tools.

Each item writes its own events and knows its value, so that a stream and a complete response agree. Owned by
`api.openai.responses.output.writer`, which decides when an item begins and ends.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

from api.http import sse
from api.openai.custom_input import InputExtractor
from api.openai.responses.output.events import EventWriter
from api.openai.responses.thoughts import encode_thoughts
from api.openai.responses.tools import CalledTool

Status = Literal["in_progress", "completed", "incomplete"]
LogprobItems = list[dict[str, Any]]

_encode = msgspec.json.encode


class OutputItem(Protocol):
    """One item; it is open from `opening` to `closing`."""

    def opening(self) -> bytes:
        """The events of its beginning."""

    def closing(self, status: Status) -> bytes:
        """The events of its end."""

    def value(self, status: Status) -> dict[str, Any]:
        """The item so far."""


class _Item:
    """What all kinds share.

    Args:
        index: Of the item in the output.
    """

    def __init__(self, item_id: str, index: int, writer: EventWriter) -> None:
        self._writer = writer
        self._id = item_id
        self._index = index
        self._where = {"item_id": item_id, "output_index": index}

    def _added(self, item: dict[str, Any]) -> bytes:
        return self._writer.event("response.output_item.added", {"output_index": self._index, "item": item})

    def _done(self, item: dict[str, Any]) -> bytes:
        return self._writer.event("response.output_item.done", {"output_index": self._index, "item": item})

    def _event(self, event: str, /, **fields: Any) -> bytes:
        return self._writer.event(event, self._where | fields)


class Message(_Item):
    """The answer's text, one part."""

    def __init__(self, item_id: str, index: int, writer: EventWriter) -> None:
        super().__init__(item_id, index, writer)
        self._texts: list[str] = []
        self._logprobs: LogprobItems = []
        name = b"response.output_text.delta"
        self._before_number = b'event: %b\n%b{"type":"%b","sequence_number":' % (name, sse.DATA, name)
        where = b',"item_id":"%b","output_index":%d,"content_index":0' % (item_id.encode(), index)
        self._before_text = where + b',"logprobs":[],"delta":'
        self._end = b"}" + sse.END

    def opening(self) -> bytes:
        item = {
            "id": self._id,
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        return self._added(item) + self._event(
            "response.content_part.added", content_index=0, part=self._part("", [])
        )

    def text(self, text: str) -> bytes:
        """The next text, without log-probabilities: the usual case, once for each token."""
        self._texts.append(text)
        writer = self._writer
        number = writer.next_number
        writer.next_number = number + 1
        return self._before_number + b"%d" % number + self._before_text + _encode(text) + self._end

    def text_with_logprobs(self, text: str, items: LogprobItems) -> bytes:
        """The next text with the log-probabilities of its tokens."""
        self._texts.append(text)
        self._logprobs += items
        return self._event("response.output_text.delta", content_index=0, delta=text, logprobs=items)

    def closing(self, status: Status) -> bytes:
        text = "".join(self._texts)
        return (
            self._event("response.output_text.done", content_index=0, text=text, logprobs=self._logprobs)
            + self._event(
                "response.content_part.done", content_index=0, part=self._part(text, self._logprobs)
            )
            + self._done(self.value(status))
        )

    def value(self, status: Status) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [self._part("".join(self._texts), self._logprobs)],
        }

    def _part(self, text: str, logprobs: LogprobItems) -> dict[str, Any]:
        return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}


class ReasoningOutput(_Item):
    """The model's thoughts, as text, or as a summary if the client asked for one: never both, which clients would show twice.

    Args:
        is_summary: Whether they are given as a summary.
        is_encoded: Whether the item has them in `encrypted_content` too.
    """

    def __init__(
        self, item_id: str, index: int, writer: EventWriter, *, is_summary: bool, is_encoded: bool
    ) -> None:
        super().__init__(item_id, index, writer)
        self._texts: list[str] = []
        self._is_summary = is_summary
        self._is_encoded = is_encoded
        self._part_kind = "summary_text" if is_summary else "reasoning_text"
        self._at = {"summary_index": 0} if is_summary else {"content_index": 0}
        self._part_event = "response.reasoning_summary_part" if is_summary else "response.content_part"
        self._text_event = f"response.reasoning_{'summary_' if is_summary else ''}text"

    def opening(self) -> bytes:
        item: dict[str, Any] = {"id": self._id, "type": "reasoning", "status": "in_progress", "summary": []}
        if not self._is_summary:
            item["content"] = []
        return self._added(item) + self._event(f"{self._part_event}.added", **self._at, part=self._part(""))

    def text(self, text: str) -> bytes:
        self._texts.append(text)
        return self._event(f"{self._text_event}.delta", **self._at, delta=text)

    def closing(self, status: Status) -> bytes:
        text = "".join(self._texts)
        return (
            self._event(f"{self._text_event}.done", **self._at, text=text)
            + self._event(f"{self._part_event}.done", **self._at, part=self._part(text))
            + self._done(self.value(status))
        )

    def value(self, status: Status) -> dict[str, Any]:
        text = "".join(self._texts)
        parts = [self._part(text)]
        item: dict[str, Any] = {"id": self._id, "type": "reasoning", "status": status}
        item |= {"summary": parts} if self._is_summary else {"summary": [], "content": parts}
        if self._is_encoded:
            item["encrypted_content"] = encode_thoughts(text)
        return item

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": self._part_kind, "text": text}


class _Call(_Item):
    """What calls of functions and of custom tools share."""

    def __init__(
        self, item_id: str, index: int, writer: EventWriter, *, call_id: str, called: CalledTool
    ) -> None:
        super().__init__(item_id, index, writer)
        self._call_id = call_id
        self._called = called

    def _of_namespace(self, item: dict[str, Any]) -> dict[str, Any]:
        return item if self._called.namespace is None else item | {"namespace": self._called.namespace}


class FunctionCall(_Call):
    """A call of one of the client's functions."""

    def __init__(
        self, item_id: str, index: int, writer: EventWriter, *, call_id: str, called: CalledTool
    ) -> None:
        super().__init__(item_id, index, writer, call_id=call_id, called=called)
        self._texts: list[str] = []

    def opening(self) -> bytes:
        return self._added(self.value("in_progress"))

    def arguments(self, text: str) -> bytes:
        """The next part of the arguments."""
        self._texts.append(text)
        return self._event("response.function_call_arguments.delta", delta=text)

    def closing(self, status: Status) -> bytes:
        done = self._event(
            "response.function_call_arguments.done", name=self._called.name, arguments="".join(self._texts)
        )
        return done + self._done(self.value(status))

    def value(self, status: Status) -> dict[str, Any]:
        item = {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._called.name,
            "arguments": "".join(self._texts),
        }
        return self._of_namespace(item)


class CustomCall(_Call):
    """A call of a custom tool: its input is a string in the arguments of a function."""

    def __init__(
        self, item_id: str, index: int, writer: EventWriter, *, call_id: str, called: CalledTool
    ) -> None:
        super().__init__(item_id, index, writer, call_id=call_id, called=called)
        self._input = InputExtractor()

    def opening(self) -> bytes:
        return self._added(self._item("in_progress", ""))

    def arguments(self, text: str) -> bytes:
        """The next part of the function's arguments."""
        return self._delta(self._input.feed(text))

    def closing(self, status: Status) -> bytes:
        rest = self._delta(self._input.finish())
        text = self._input.text
        done = self._event("response.custom_tool_call_input.done", input=text)
        return rest + done + self._done(self._item(status, text))

    def value(self, status: Status) -> dict[str, Any]:
        return self._item(status, self._input.text)

    def _delta(self, text: str) -> bytes:
        return self._event("response.custom_tool_call_input.delta", delta=text) if text else b""

    def _item(self, status: Status, text: str) -> dict[str, Any]:
        item = {
            "id": self._id,
            "type": "custom_tool_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._called.name,
            "input": text,
        }
        return self._of_namespace(item)
