"""A legacy completion as OpenAI says it: chunks of a stream as ready bytes, or one object.

Fed by a generation with events, in order; knows nothing of where they come from.
https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.answer import DONE, Answer, usage_object
from api.logprobs import Item, LogprobAligner, legacy_arrays
from common.protocol import Delta, Event, Finished

_encode = msgspec.json.encode


class CompletionRendering:
    """See the module; one for each answer.

    Args:
        with_logprobs: Whether the client asked for them.
        include_usage: Whether a stream ends with the counts.
    """

    def __init__(self, answer: Answer, *, with_logprobs: bool, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage
        self._aligner = LogprobAligner() if with_logprobs else None
        self._num_characters = 0  # of the items so far
        self._texts: list[str] = []
        self._items: list[Item] = []
        head = answer.head("text_completion")
        self._before = b"data: " + head + b',"choices":[{"index":0,"text":'
        self._no_choice = b"data: " + head + b',"choices":[],"usage":'
        self._usage = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._after = b',"logprobs":null,"finish_reason":null}]' + self._usage

    # -- a stream ---------------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """Nothing: all is said with the text."""
        return b""

    def frames(self, events: list[Event]) -> bytes:
        """What a client gets for `events`; may be empty. None of them is `Failed`."""
        frames = []
        for event in events:
            if isinstance(event, Delta):
                if self._aligner is not None:
                    items = self._aligner.take(event)
                    if event.text or items:
                        frames.append(self._chunk(event.text, items, None))
                elif event.text:
                    frames.append(self._before + _encode(event.text) + self._after)
            elif isinstance(event, Finished):
                frames.append(self._closing(event))
        return b"".join(frames)

    def _closing(self, finished: Finished) -> bytes:
        items = self._aligner.finish() if self._aligner is not None else []
        frames = self._chunk("", items, finished.finish_reason)
        if self._include_usage:
            frames += self._no_choice + _encode(usage_object(finished.usage)) + b"}\n\n"
        return frames + DONE

    def _chunk(self, text: str, items: list[Item], reason: str | None) -> bytes:
        rest = _encode(text) + b',"logprobs":' + _encode(self._arrays(items)) + b',"finish_reason":'
        return self._before + rest + _encode(reason) + b"}]" + self._usage

    def _arrays(self, items: list[Item]) -> dict[str, list[Any]] | None:
        if not items:
            return None
        arrays = legacy_arrays(items, self._num_characters)
        self._num_characters += sum(len(item.text) for item in items)
        return arrays

    # -- a whole answer ---------------------------------------------------------------------------------------------

    def add(self, events: list[Event]) -> None:
        """Keep what `events` say."""
        for event in events:
            if isinstance(event, Delta):
                self._texts.append(event.text)
                if self._aligner is not None:
                    self._items += self._aligner.take(event)

    def body(self, finished: Finished) -> bytes:
        """The whole answer as one object."""
        if self._aligner is not None:
            self._items += self._aligner.finish()
        choice = {
            "index": 0,
            "text": "".join(self._texts),
            "logprobs": legacy_arrays(self._items, 0) if self._aligner is not None else None,
            "finish_reason": finished.finish_reason,
        }
        tail = _encode({"choices": [choice], "usage": usage_object(finished.usage)})
        return self._answer.head("text_completion") + b"," + tail[1:]
