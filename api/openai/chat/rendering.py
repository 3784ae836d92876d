"""A chat completion as OpenAI writes it: the chunks of a stream, as bytes, or one object.

An `api.generation.front_end.Rendering`: a pure function of the request's record and its jobs' events.
https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.generation.front_end import AnswerEvent
from api.generation.request import AnswerRecord
from api.http import sse
from api.openai.answer import Answer
from api.openai.chat.tool_rendering import ToolRendering
from api.openai.errors import error_frame
from api.openai.logprobs import LogprobAligner, chat_items
from common.errors import RequestError
from common.protocol import Delta, Finished, Reasoning

_encode = msgspec.json.encode

_NO_MORE = b'},"logprobs":null,"finish_reason":null'
"""What follows the delta of a chunk with neither log-probabilities nor an end."""


class ChatRendering:
    """See the module; one for each answer."""

    def __init__(self, record: AnswerRecord) -> None:
        self._answer = Answer(record, "chatcmpl-", "chat.completion.chunk")
        self._choices = [_Choice(index, self._answer) for index in range(len(record.job_ids))]

    def opening(self) -> bytes:
        """The first chunk of each choice: it has the role, the others do not."""
        return b"".join(choice.opening() for choice in self._choices)

    def frames(self, index: int, events: list[AnswerEvent]) -> bytes:
        return self._choices[index].frames(events)

    def closing(self, finished: list[Finished]) -> bytes:
        return self._answer.closing(finished)

    def error(self, error: RequestError) -> bytes:
        return error_frame(error)

    def keep_alive(self) -> bytes:
        return sse.KEEP_ALIVE

    def add(self, index: int, events: list[AnswerEvent]) -> None:
        self._choices[index].add(events)

    def body(self, finished: list[Finished]) -> bytes:
        choices = [choice.complete(end) for choice, end in zip(self._choices, finished, strict=True)]
        return self._answer.body("chat.completion", choices, finished)


class _Choice:
    """One choice's chunks, or its text so far."""

    def __init__(self, index: int, answer: Answer) -> None:
        self._index = index
        self._aligner = LogprobAligner() if answer.options.with_logprobs else None
        options = answer.options
        self._tools = ToolRendering(
            f"{answer.id}/{index}",
            as_function_call=options.as_function_call,
            hides_reasoning=options.hides_reasoning,
            custom_tools=options.custom_tools,
        )
        self._usage = answer.running_usage()
        self._texts: list[str] = []
        self._items: list[dict[str, Any]] = []
        self._before, self._end = answer.chunk_parts(b'{"index":%d,"delta":{' % index, b"}")
        self._after = _NO_MORE + self._end

    def opening(self) -> bytes:
        return self._before + b'"role":"assistant","content":"","refusal":null' + self._after

    def frames(self, events: list[AnswerEvent]) -> bytes:
        frames = []
        before, aligner, usage = self._before + b'"content":', self._aligner, self._usage
        for event in events:
            if usage is not None:
                usage.observe(event)
                self._end = usage.chunk_end()
                self._after = _NO_MORE + self._end
            if isinstance(event, Delta):
                if event.pieces:
                    frames.append(self._delta_with_pieces(event, aligner))
                elif aligner is not None:
                    frames.append(self._delta_with_logprobs(event, aligner))
                elif event.text:
                    frames.append(before + _encode(event.text) + self._after)
            elif isinstance(event, Finished):
                frames.append(self._last(event))
        return b"".join(frames)

    def _delta_with_pieces(self, delta: Delta, aligner: LogprobAligner | None) -> bytes:
        """Reasoning comes before content, calls come after it."""
        items = chat_items(aligner.take(delta)) if aligner is not None else []
        content = self._chunk({"content": delta.text}, items, None) if delta.text or items else b""
        before, after = b"", b""
        for piece in self._tools.shown(delta.pieces):
            chunks = b"".join(self._chunk(part, [], None) for part in self._tools.deltas(piece))
            if isinstance(piece, Reasoning):
                before += chunks
            else:
                after += chunks
        return before + content + after

    def _delta_with_logprobs(self, delta: Delta, aligner: LogprobAligner) -> bytes:
        items = chat_items(aligner.take(delta))
        if not (delta.text or items):
            return b""
        return self._chunk({"content": delta.text}, items, None)

    def _last(self, finished: Finished) -> bytes:
        items = chat_items(self._aligner.finish()) if self._aligner is not None else []
        frames = self._chunk({"content": ""}, items, None) if items else b""
        frames += b"".join(self._chunk(part, [], None) for part in self._tools.last_deltas())
        return frames + self._chunk({}, [], self._tools.reason(finished.finish_reason))

    def _chunk(self, delta: dict[str, Any], items: list[dict[str, Any]], reason: str | None) -> bytes:
        logprobs = {"content": items, "refusal": None} if items else None
        rest = _encode(delta)[1:-1] + b'},"logprobs":' + _encode(logprobs) + b',"finish_reason":'
        return self._before + rest + _encode(reason) + self._end

    def add(self, events: list[AnswerEvent]) -> None:
        for event in events:
            if isinstance(event, Delta):
                self._texts.append(event.text)
                for piece in event.pieces:
                    self._tools.add(piece)
                if self._aligner is not None:
                    self._items += chat_items(self._aligner.take(event))

    def complete(self, finished: Finished) -> dict[str, Any]:
        if self._aligner is not None:
            self._items += chat_items(self._aligner.finish())
        return {
            "index": self._index,
            "message": self._tools.message("".join(self._texts)),
            "logprobs": {"content": self._items, "refusal": None} if self._aligner is not None else None,
            "finish_reason": self._tools.reason(finished.finish_reason),
        }
