"""A legacy completion as OpenAI writes it: the chunks of a stream, as bytes, or one object.

An `api.generation.front_end.Rendering`: a pure function of the request's record and its jobs' events.
https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import statistics
from typing import Any

import msgspec

from api.generation.front_end import AnswerEvent
from api.generation.request import AnswerRecord
from api.http import sse
from api.openai.answer import Answer
from api.openai.errors import error_frame
from api.openai.logprobs import Item, LogprobAligner, echoed_items, legacy_arrays
from common.errors import RequestError
from common.protocol import Delta, Echo, Finished

_encode = msgspec.json.encode

_NO_MORE = b',"logprobs":null,"finish_reason":null'
"""What follows the text of a chunk with neither log-probabilities nor an end."""


class CompletionRendering:
    """See the module; one for each answer."""

    def __init__(self, record: AnswerRecord) -> None:
        self._answer = Answer(record, "cmpl-", "text_completion")
        self._n = record.n
        self._best_of = record.best_of
        self._choices = [_Choice(index, self._answer) for index in range(len(record.job_ids))]

    def opening(self) -> bytes:
        """Nothing: chunks have text only."""
        return b""

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
        choices: list[dict[str, Any]] = []
        for first in range(0, len(self._choices), self._best_of):
            candidates = self._choices[first : first + self._best_of]
            if self._best_of > self._n:
                # OpenAI: the best is the one with the highest log probability per token.
                candidates = sorted(candidates, key=lambda choice: -choice.mean_logprob)[: self._n]
            for choice in candidates:
                choices.append(choice.complete(len(choices), finished[choice.index]))
        return self._answer.body("text_completion", choices, finished)


class _Choice:
    """One choice's chunks, or its text so far."""

    def __init__(self, index: int, answer: Answer) -> None:
        self.index = index
        self._aligner = LogprobAligner() if answer.options.with_logprobs else None
        self._num_characters = 0  # of the items so far
        self._texts: list[str] = []
        self._items: list[Item] = []
        self._logprobs: list[float] = []
        self._before, self._end = answer.chunk_parts(b'{"index":%d,"text":' % index, b"}")
        self._after = _NO_MORE + self._end
        self._usage = answer.running_usage()

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, if log-probabilities were reported."""
        return statistics.fmean(self._logprobs) if self._logprobs else 0.0

    def frames(self, events: list[AnswerEvent]) -> bytes:
        frames = []
        for event in events:
            if self._usage is not None:
                self._usage.observe(event)
                self._end = self._usage.chunk_end()
                self._after = _NO_MORE + self._end
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
        return self._before + rest + _encode(reason) + self._end

    def _arrays(self, items: list[Item]) -> dict[str, list[Any]] | None:
        if not items:
            return None
        arrays = legacy_arrays(items, self._num_characters)
        self._num_characters += sum(len(item.text) for item in items)
        return arrays

    def _echoed(self, echo: Echo) -> list[Item]:
        return echoed_items(echo) if self._aligner is not None else []

    def add(self, events: list[AnswerEvent]) -> None:
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

    def complete(self, index: int, finished: Finished) -> dict[str, Any]:
        if self._aligner is not None:
            self._items += self._aligner.finish()
        return {
            "index": index,
            "text": "".join(self._texts),
            "logprobs": legacy_arrays(self._items, 0) if self._aligner is not None else None,
            "finish_reason": finished.finish_reason,
        }
