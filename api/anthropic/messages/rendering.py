"""A message as Anthropic writes it: the events of a stream, as bytes, or one object.

An `api.generation.front_end.Rendering`: a pure function of the request's record and its job's events. A request has one job, since
Anthropic's has one answer. https://platform.claude.com/docs/en/build-with-claude/streaming
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.anthropic.errors import error_frame
from api.anthropic.messages.answer_blocks import CompleteBlocks, StreamBlocks
from api.anthropic.messages.thinking import Display
from api.generation.front_end import AnswerEvent
from api.generation.request import AnswerRecord
from api.http import sse
from common.errors import RequestError
from common.protocol import Delta, Finished, Started, Usage

_encode = msgspec.json.encode

PING = sse.frame(b'{"type":"ping"}', event="ping")
_MESSAGE_STOP = sse.frame(b'{"type":"message_stop"}', event="message_stop")

_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use"}


class MessageOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a rendering needs to know of the request (`AnswerRecord.options`). New fields have defaults.

    Attributes:
        max_tokens: As the client set it.
        thinking: How the answer shows thoughts.
    """

    max_tokens: int | None = None
    thinking: Display = "hidden"


class MessageRendering:
    """See the module; one for each answer."""

    def __init__(self, record: AnswerRecord) -> None:
        self._record = record
        self._id = f"msg_{record.job_ids[0]}"
        self._options = msgspec.convert(record.options, MessageOptions)
        self._is_started = False
        self._stream = StreamBlocks(self._id, self._options.thinking)
        self._complete = CompleteBlocks(self._id, self._options.thinking)

    def opening(self) -> bytes:
        """Nothing: the first event has the prompt's token count."""
        return b""

    def frames(self, _index: int, events: list[AnswerEvent]) -> bytes:
        frames = []
        for event in events:
            if isinstance(event, Delta):
                if not self._is_started:  # of an older worker
                    frames.append(self._start(Usage(0, 0)))
                frames.append(self._stream.add(event))
            elif isinstance(event, Started):
                if not self._is_started:
                    frames.append(self._start(Usage(event.prompt_tokens, 0, event.cached_tokens)))
            elif isinstance(event, Finished):
                if not self._is_started:
                    frames.append(self._start(event.usage))
                frames += [self._stream.end(), self._message_delta(event)]
        return b"".join(frames)

    def _start(self, usage: Usage) -> bytes:
        self._is_started = True
        return (
            sse.frame(
                _encode({"type": "message_start", "message": self._message([], None, usage)}),
                event="message_start",
            )
            + PING
        )

    def _message_delta(self, finished: Finished) -> bytes:
        delta = {**self._stop(finished), "stop_details": None, "container": None}
        usage = _usage(finished.usage)
        counts = {name: usage[name] for name in _CUMULATIVE}
        return sse.frame(
            _encode({"type": "message_delta", "delta": delta, "usage": counts}), event="message_delta"
        )

    def closing(self, finished: list[Finished]) -> bytes:  # noqa: ARG002
        return _MESSAGE_STOP

    def error(self, error: RequestError) -> bytes:
        return error_frame(error)

    def keep_alive(self) -> bytes:
        return PING

    def add(self, _index: int, events: list[AnswerEvent]) -> None:
        for event in events:
            if isinstance(event, Delta):
                self._complete.add(event)

    def body(self, finished: list[Finished]) -> bytes:
        [end] = finished
        return _encode(self._message(self._complete.blocks(), end, end.usage))

    def _message(
        self, content: list[dict[str, Any]], finished: Finished | None, usage: Usage
    ) -> dict[str, Any]:
        stop = {"stop_reason": None, "stop_sequence": None} if finished is None else self._stop(finished)
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._record.model,
            "content": content,
            **stop,
            "stop_details": None,
            "container": None,
            "usage": _usage(usage),
        }

    def _stop(self, finished: Finished) -> dict[str, str | None]:
        """Why the answer ended. Fewer tokens than the client allowed: the model's context is full."""
        reason = _STOP_REASONS.get(finished.finish_reason, "max_tokens")
        limit = self._options.max_tokens
        if reason == "max_tokens" and (limit is None or finished.usage.completion_tokens < limit):
            reason = "model_context_window_exceeded"
        if reason == "end_turn" and finished.stop_string is not None:
            reason = "stop_sequence"
        sequence = finished.stop_string if reason == "stop_sequence" else None
        return {"stop_reason": reason, "stop_sequence": sequence}


_CUMULATIVE = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "output_tokens_details",
    "server_tool_use",
)
"""The counts that `message_delta` repeats."""


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic's usage: `input_tokens` are those that were not cached. Nothing is charged for filling the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    }
