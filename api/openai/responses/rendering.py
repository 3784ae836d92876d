"""A response as OpenAI writes it: the events of a stream, as bytes, or one object.

An `api.generation.front_end.Rendering`: a pure function of the request's record and its job's events.
https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from api.generation.front_end import AnswerEvent
from api.generation.request import AnswerRecord
from api.openai.responses import names
from api.openai.responses.options import DEFAULT_ECHO, ResponseOptions
from api.openai.responses.output.events import EventWriter, frame
from api.openai.responses.output.writer import Output
from common.errors import RequestError
from common.protocol import Finished, Usage

_encode = msgspec.json.encode

_CANCELLED = "cancelled"
_TOO_MANY_REQUESTS, _FIRST_SERVER_ERROR = 429, 500


class ResponseRendering:
    """See the module; one for each answer, which has one choice."""

    def __init__(self, record: AnswerRecord) -> None:
        options = msgspec.convert(record.options, ResponseOptions)
        self._head, self._tail = _constant_parts(record, options)
        self._is_background = options.is_background
        self._has_begun = not self._is_background
        self._writer = EventWriter()
        self._output = Output(record.job_ids[0], options, self._writer)

    def opening(self) -> bytes:
        """A response in the background is queued first; the first event of its job says that it is in progress."""
        if self._is_background:
            queued = self._object("queued")
            return self._event("response.created", queued) + self._event("response.queued", queued)
        begun = self._object("in_progress")
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def frames(self, index: int, events: list[AnswerEvent]) -> bytes:  # noqa: ARG002
        if self._has_begun or not events:
            return self._output.frames(events)
        self._has_begun = True
        begun = self._event("response.in_progress", self._object("in_progress"))
        return begun + self._output.frames(events)

    def closing(self, finished: list[Finished]) -> bytes:
        [end] = finished
        name = "incomplete" if end.finish_reason == "length" else "completed"
        return self._event(f"response.{name}", self._complete(end))

    def error(self, error: RequestError) -> bytes:
        return self._event("response.failed", self.failed_body(error))

    def keep_alive(self) -> bytes:
        """An event, since Codex counts a comment as silence; it repeats the last number, so that the others stay the same."""
        data = b'{"response":' + self._object("in_progress" if self._has_begun else "queued") + b"}"
        name = "response.in_progress" if self._has_begun else "response.queued"
        return frame(name, max(0, self._writer.next_number - 1), data)

    def add(self, index: int, events: list[AnswerEvent]) -> None:  # noqa: ARG002
        self._output.frames(events)

    def body(self, finished: list[Finished]) -> bytes:
        [end] = finished
        return self._complete(end)

    def output_items(self) -> list[dict[str, Any]]:
        """The output that `add` collected."""
        return self._output.items("incomplete")

    def unfinished_body(self, status: Literal["queued", "in_progress"]) -> bytes:
        """The response while it is not complete, with the output so far."""
        return self._object(status, output=self._output.items("in_progress"))

    def failed_body(self, error: RequestError) -> bytes:
        """The response after a failure or a cancellation, with the output so far."""
        output = self._output.items("incomplete")
        if error.code == _CANCELLED:
            return self._object("cancelled", output=output)
        return self._object("failed", output=output, error={"code": _code(error), "message": error.message})

    def _complete(self, end: Finished) -> bytes:
        is_cut = end.finish_reason == "length"
        return self._object(
            "incomplete" if is_cut else "completed",
            output=self._output.items("completed"),
            usage=usage_object(end.usage),
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
        )

    def _event(self, name: str, response: bytes) -> bytes:
        return self._writer.raw_event(name, b'{"response":' + response + b"}")

    def _object(
        self,
        status: str,
        *,
        output: list[dict[str, Any]] | None = None,
        usage: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
        incomplete_details: dict[str, Any] | None = None,
    ) -> bytes:
        changing = {
            "status": status,
            "error": error,
            "incomplete_details": incomplete_details,
            "output": output or [],
            "usage": usage,
        }
        return self._head + _encode(changing)[1:-1] + self._tail


def _constant_parts(record: AnswerRecord, options: ResponseOptions) -> tuple[bytes, bytes]:
    """What comes before and after the fields that change while a response is generated."""
    head = {
        "id": names.response_id(record.job_ids[0]),
        "object": "response",
        "created_at": record.created,
        "completed_at": None,
        "model": record.model,
    }
    used = {"temperature": record.temperature, "top_p": record.top_p, "store": record.is_stored}
    echo = DEFAULT_ECHO | used | options.echo
    return _encode(head)[:-1] + b",", b"," + _encode(echo)[1:]


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "input_tokens": usage.prompt_tokens,
        # OpenAI bills tokens that are written to its cache; workers do not count them.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _code(error: RequestError) -> str:
    """OpenAI's own code if there is one: Codex looks for `context_length_exceeded`."""
    if error.code is not None:
        return error.code
    if error.status == _TOO_MANY_REQUESTS:
        return "rate_limit_exceeded"
    return "server_error" if error.status >= _FIRST_SERVER_ERROR else "invalid_prompt"
