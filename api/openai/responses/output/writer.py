"""The output of a response: which item each event belongs to, and how the items begin and end.

Owned by `api.openai.responses.rendering`. Independent of how events are batched.
"""

from __future__ import annotations

from typing import Any

from api.generation.front_end import AnswerEvent, call_id
from api.openai.logprobs import LogprobAligner, chat_items
from api.openai.responses import names
from api.openai.responses.options import ResponseOptions
from api.openai.responses.output.events import EventWriter
from api.openai.responses.output.items import (
    CustomCall,
    FunctionCall,
    LogprobItems,
    Message,
    OutputItem,
    ReasoningOutput,
    Status,
)
from api.openai.responses.tools import CalledTool
from common.protocol import Delta, Finished, Piece, Reasoning, ToolArguments, ToolCall


class Output:
    """See the module.

    Args:
        job_id: What the ids are derived from.
    """

    def __init__(self, job_id: str, options: ResponseOptions, writer: EventWriter) -> None:
        self._job_id = job_id
        self._options = options
        self._writer = writer
        self._aligner = LogprobAligner() if options.with_logprobs else None
        self._called = {name: CalledTool(*called) for name, called in options.called.items()}
        self._complete: list[dict[str, Any]] = []
        self._open: OutputItem | None = None
        self._message: Message | None = None  # `_open`, if it is one

    def frames(self, events: list[AnswerEvent]) -> bytes:
        """The events of the next events of the answer."""
        frames = []
        for event in events:
            if isinstance(event, Delta):
                message = self._message
                if message is None or event.pieces or self._aligner is not None:
                    frames.append(self._delta(event))
                elif event.text:
                    frames.append(message.text(event.text))
            elif isinstance(event, Finished):
                frames.append(self._end(event))
        return b"".join(frames)

    def items(self, status: Status) -> list[dict[str, Any]]:
        """All items so far.

        Args:
            status: Of the item that is not complete, if there is one.
        """
        return self._complete if self._open is None else [*self._complete, self._open.value(status)]

    def _delta(self, delta: Delta) -> bytes:
        """Reasoning comes before text, calls come after it."""
        items = chat_items(self._aligner.take(delta)) if self._aligner is not None else []
        frames = [self._piece(piece) for piece in delta.pieces if isinstance(piece, Reasoning)]
        frames.append(self._text(delta.text, items))
        frames += [self._piece(piece) for piece in delta.pieces if not isinstance(piece, Reasoning)]
        return b"".join(frames)

    def _text(self, text: str, items: LogprobItems) -> bytes:
        if not text and not (items and self._message is not None):
            return b""
        frames = b""
        if self._message is None:
            frames = self._begin_message()
        assert self._message is not None
        if self._aligner is None:
            return frames + self._message.text(text)
        return frames + self._message.text_with_logprobs(text, items)

    def _begin_message(self) -> bytes:
        message = Message(self._next_id("message"), self._next_index(), self._writer)
        frames = self._begin(message)
        self._message = message
        return frames

    def _piece(self, piece: Piece) -> bytes:
        match piece:
            case Reasoning(text):
                frames = b""
                if not isinstance(self._open, ReasoningOutput):
                    frames = self._begin_reasoning()
                assert isinstance(self._open, ReasoningOutput)
                return frames + self._open.text(text)
            case ToolCall(index, name):
                return self._begin_call(index, name)
            case ToolArguments(_, text):  # those of a call come before the next call
                assert isinstance(self._open, (FunctionCall, CustomCall))
                return self._open.arguments(text)

    def _begin_reasoning(self) -> bytes:
        options = self._options
        item = ReasoningOutput(
            self._next_id("reasoning"),
            self._next_index(),
            self._writer,
            is_summary=options.is_summarized,
            is_encoded=options.is_encoded,
        )
        return self._begin(item)

    def _begin_call(self, index: int, name: str) -> bytes:
        called = self._called.get(name, CalledTool(name))
        kind, make = ("custom_tool_call", CustomCall) if called.is_custom else ("function_call", FunctionCall)
        item = make(
            self._next_id(kind),
            self._next_index(),
            self._writer,
            call_id=call_id("call_", self._job_id, index),
            called=called,
        )
        return self._begin(item)

    def _begin(self, item: OutputItem) -> bytes:
        frames = self._close("completed")
        self._open = item
        return frames + item.opening()

    def _close(self, status: Status) -> bytes:
        item = self._open
        if item is None:
            return b""
        frames = item.closing(status)
        self._complete.append(item.value(status))
        self._open = self._message = None
        return frames

    def _end(self, finished: Finished) -> bytes:
        frames = b""
        if self._aligner is not None:
            frames = self._text("", chat_items(self._aligner.finish()))
        is_cut = finished.finish_reason == "length"
        answers = ("message", "function_call", "custom_tool_call")
        if not is_cut and not any(item["type"] in answers for item in self.items("completed")):
            frames += self._begin_message()  # the model said nothing: an empty text
        return frames + self._close("incomplete" if is_cut else "completed")

    def _next_index(self) -> int:
        return len(self._complete) + (self._open is not None)

    def _next_id(self, kind: str) -> str:
        return names.output_id(self._job_id, kind, self._next_index())
