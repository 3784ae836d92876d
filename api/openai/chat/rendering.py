"""A chat completion as OpenAI says it: chunks of a stream as ready bytes, or one object.

Fed by a generation with events of each choice, in order; knows nothing of where they come from.
https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.openai.answer import DONE, Answer, total_usage, usage_object
from api.openai.chat.tool_rendering import ToolRendering
from api.openai.logprobs import LogprobAligner, chat_items
from common.protocol import Delta, Event, Finished, Reasoning

_encode = msgspec.json.encode


class ChatRendering:
    """See the module; one for each answer.

    Args:
        num_choices: At least 1.
        with_logprobs: Whether the client asked for them.
        include_usage: Whether a stream ends with the counts.
        answers_functions: Whether a call is told in the deprecated form, as `function_call`.
    """

    def __init__(
        self,
        answer: Answer,
        num_choices: int = 1,
        *,
        with_logprobs: bool,
        include_usage: bool,
        answers_functions: bool = False,
    ) -> None:
        self._answer = answer
        self._include_usage = include_usage
        head = answer.head("chat.completion.chunk")
        self._no_choice = b"data: " + head + b',"choices":[],"usage":'
        usage = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._choices = [
            _Choice(
                index,
                head,
                usage,
                LogprobAligner() if with_logprobs else None,
                ToolRendering(f"{answer.id}/{index}", answers_functions=answers_functions),
            )
            for index in range(num_choices)
        ]

    def opening(self) -> bytes:
        """The first chunks: each choice's role, and nothing else has it."""
        return b"".join(choice.opening() for choice in self._choices)

    def frames(self, index: int, events: list[Event]) -> bytes:
        """What a client gets for `events` of a choice; may be empty. None of them is `Failed`."""
        return self._choices[index].frames(events)

    def closing(self, finished: list[Finished]) -> bytes:
        """The counts, where they are asked for, and the end of the stream."""
        if not self._include_usage:
            return DONE
        usage = total_usage(finished, len(self._choices))
        return self._no_choice + _encode(usage_object(usage)) + b"}\n\n" + DONE

    def add(self, index: int, events: list[Event]) -> None:
        """Keep what `events` of a choice say."""
        self._choices[index].add(events)

    def body(self, finished: list[Finished]) -> bytes:
        """The whole answer as one object."""
        choices = [choice.whole(end) for choice, end in zip(self._choices, finished, strict=True)]
        usage = total_usage(finished, len(self._choices))
        tail = _encode({"choices": choices, "usage": usage_object(usage)})
        return self._answer.head("chat.completion") + b"," + tail[1:]


class _Choice:
    """One choice's chunks, or its text so far.

    Args:
        head: What each chunk begins with.
        usage: What it ends with.
    """

    def __init__(
        self, index: int, head: bytes, usage: bytes, aligner: LogprobAligner | None, tools: ToolRendering
    ) -> None:
        self._index = index
        self._aligner = aligner
        self._tools = tools
        self._texts: list[str] = []
        self._items: list[dict[str, Any]] = []
        self._before = b"data: " + head + b',"choices":[{"index":%d,"delta":{' % index
        self._after = b'},"logprobs":null,"finish_reason":null}]' + usage
        self._usage = usage

    # -- a stream ---------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        return self._before + b'"role":"assistant","content":"","refusal":null' + self._after

    def frames(self, events: list[Event]) -> bytes:
        frames = []
        before, after, aligner = self._before + b'"content":', self._after, self._aligner
        for event in events:
            if isinstance(event, Delta):
                if event.pieces:
                    frames.append(self._delta_with_pieces(event, aligner))
                elif aligner is not None:
                    frames.append(self._delta_with_logprobs(event, aligner))
                elif event.text:
                    frames.append(before + _encode(event.text) + after)
            elif isinstance(event, Finished):
                frames.append(self._last(event))
        return b"".join(frames)

    def _delta_with_pieces(self, delta: Delta, aligner: LogprobAligner | None) -> bytes:
        """Thoughts come before content, calls behind it."""
        items = chat_items(aligner.take(delta)) if aligner is not None else []
        content = self._chunk({"content": delta.text}, items, None) if delta.text or items else b""
        before, after = b"", b""
        for piece in delta.pieces:
            chunk = self._chunk(self._tools.delta(piece), [], None)
            if isinstance(piece, Reasoning):
                before += chunk
            else:
                after += chunk
        return before + content + after

    def _delta_with_logprobs(self, delta: Delta, aligner: LogprobAligner) -> bytes:
        items = chat_items(aligner.take(delta))
        if not (delta.text or items):
            return b""
        return self._chunk({"content": delta.text}, items, None)

    def _last(self, finished: Finished) -> bytes:
        items = chat_items(self._aligner.finish()) if self._aligner is not None else []
        frames = self._chunk({"content": ""}, items, None) if items else b""
        return frames + self._chunk({}, [], self._tools.reason(finished.finish_reason))

    def _chunk(self, delta: dict[str, Any], items: list[dict[str, Any]], reason: str | None) -> bytes:
        rest = _encode(delta)[1:-1] + b'},"logprobs":' + _encode(_logprobs(items)) + b',"finish_reason":'
        return self._before + rest + _encode(reason) + b"}]" + self._usage

    # -- a whole answer ---------------------------------------------------------------------------------------------

    def add(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Delta):
                self._texts.append(event.text)
                for piece in event.pieces:
                    self._tools.add(piece)
                if self._aligner is not None:
                    self._items += chat_items(self._aligner.take(event))

    def whole(self, finished: Finished) -> dict[str, Any]:
        if self._aligner is not None:
            self._items += chat_items(self._aligner.finish())
        return {
            "index": self._index,
            "message": self._tools.message("".join(self._texts)),
            "logprobs": {"content": self._items, "refusal": None} if self._aligner is not None else None,
            "finish_reason": self._tools.reason(finished.finish_reason),
        }


def _logprobs(items: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"content": items, "refusal": None} if items else None
