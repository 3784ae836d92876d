"""A legacy completion as OpenAI says it: chunks of a stream as ready bytes, or one object.

Fed by a generation with events of each choice, in order; knows nothing of where they come from.
https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import statistics
from typing import Any

import msgspec

from api.openai.answer import DONE, Answer, total_usage, usage_object
from api.openai.logprobs import Item, LogprobAligner, echoed_items, legacy_arrays
from common.protocol import Delta, Echo, Event, Finished

_encode = msgspec.json.encode


class CompletionRendering:
    """See the module; one for each answer.

    Args:
        num_choices: Of all prompts together, those to choose from included; at least 1.
        n: How many of each prompt's choices are shown, the best ones.
        best_of: How many each prompt has.
        with_logprobs: Whether the client asked for them.
        include_usage: Whether a stream ends with the counts.
    """

    def __init__(
        self,
        answer: Answer,
        num_choices: int = 1,
        *,
        n: int = 1,
        best_of: int = 1,
        with_logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._answer = answer
        self._n = n
        self._best_of = best_of
        self._include_usage = include_usage
        head = answer.head("text_completion")
        self._no_choice = b"data: " + head + b',"choices":[],"usage":'
        usage = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._choices = [
            _Choice(index, head, usage, LogprobAligner() if with_logprobs else None)
            for index in range(num_choices)
        ]

    def opening(self) -> bytes:
        """Nothing: all is said with the text."""
        return b""

    def frames(self, index: int, events: list[Event]) -> bytes:
        """What a client gets for `events` of a choice; may be empty. None of them is `Failed`."""
        return self._choices[index].frames(events)

    def closing(self, finished: list[Finished]) -> bytes:
        """The counts, where they are asked for, and the end of the stream."""
        if not self._include_usage:
            return DONE
        usage = total_usage(finished, self._best_of)
        return self._no_choice + _encode(usage_object(usage)) + b"}\n\n" + DONE

    def add(self, index: int, events: list[Event]) -> None:
        """Keep what `events` of a choice say."""
        self._choices[index].add(events)

    def body(self, finished: list[Finished]) -> bytes:
        """The whole answer as one object."""
        choices: list[dict[str, Any]] = []
        for first in range(0, len(self._choices), self._best_of):
            rivals = self._choices[first : first + self._best_of]
            if self._best_of > self._n:
                # OpenAI: the best is the one with the highest log probability per token.
                rivals = sorted(rivals, key=lambda choice: -choice.mean_logprob)[: self._n]
            for choice in rivals:
                choices.append(choice.whole(len(choices), finished[choice.index]))
        usage = total_usage(finished, self._best_of)
        tail = _encode({"choices": choices, "usage": usage_object(usage)})
        return self._answer.head("text_completion") + b"," + tail[1:]


class _Choice:
    """One choice's chunks, or its text so far.

    Args:
        head: What each chunk begins with.
        usage: What it ends with.
    """

    def __init__(self, index: int, head: bytes, usage: bytes, aligner: LogprobAligner | None) -> None:
        self.index = index
        self._aligner = aligner
        self._num_characters = 0  # of the items so far
        self._texts: list[str] = []
        self._items: list[Item] = []
        self._logprobs: list[float] = []
        self._before = b"data: " + head + b',"choices":[{"index":%d,"text":' % index
        self._after = b',"logprobs":null,"finish_reason":null}]' + usage
        self._usage = usage

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, as far as they are known."""
        return statistics.fmean(self._logprobs) if self._logprobs else 0.0

    # -- a stream ---------------------------------------------------------------------------------------------------

    def frames(self, events: list[Event]) -> bytes:
        frames = []
        for event in events:
            if isinstance(event, Delta):
                if self._aligner is not None:
                    items = self._aligner.take(event)
                    if event.text or items:
                        frames.append(self._chunk(event.text, items, None))
                elif event.text:
                    frames.append(self._before + _encode(event.text) + self._after)
            elif isinstance(event, Echo):
                frames.append(self._chunk(event.text, self._echoed(event), None))
            elif isinstance(event, Finished):
                items = self._aligner.finish() if self._aligner is not None else []
                frames.append(self._chunk("", items, event.finish_reason))
        return b"".join(frames)

    def _chunk(self, text: str, items: list[Item], reason: str | None) -> bytes:
        rest = _encode(text) + b',"logprobs":' + _encode(self._arrays(items)) + b',"finish_reason":'
        return self._before + rest + _encode(reason) + b"}]" + self._usage

    def _arrays(self, items: list[Item]) -> dict[str, list[Any]] | None:
        if not items:
            return None
        arrays = legacy_arrays(items, self._num_characters)
        self._num_characters += sum(len(item.text) for item in items)
        return arrays

    def _echoed(self, echo: Echo) -> list[Item]:
        return echoed_items(echo) if self._aligner is not None else []

    # -- a whole answer ---------------------------------------------------------------------------------------------

    def add(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Delta):
                self._texts.append(event.text)
                if event.logprob is not None:
                    self._logprobs.append(event.logprob.logprob)
                if self._aligner is not None:
                    self._items += self._aligner.take(event)
            elif isinstance(event, Echo):
                self._texts.append(event.text)
                self._items += self._echoed(event)

    def whole(self, index: int, finished: Finished) -> dict[str, Any]:
        if self._aligner is not None:
            self._items += self._aligner.finish()
        return {
            "index": index,
            "text": "".join(self._texts),
            "logprobs": legacy_arrays(self._items, 0) if self._aligner is not None else None,
            "finish_reason": finished.finish_reason,
        }
