"""What all chunks and objects of an OpenAI answer have in common, for chat and legacy completions.

Used by the two renderings. An answer has one id, one time and one model, whatever form it has. Must not know where events
come from.
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.generation.front_end import AnswerEvent, total_usage
from api.generation.request import AnswerRecord
from api.http import sse
from common.protocol import Delta, Finished, Started, Usage


class AnswerOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a rendering needs to know of the request (`AnswerRecord.options`). New fields have defaults.

    Attributes:
        include_usage: Whether a stream ends with the token counts.
        service_tier: Only if the client asked for one.
        continuous_usage: Whether each chunk has the choice's token counts so far, as in vLLM.
        with_logprobs: Whether the client asked for log-probabilities.
        as_function_call: Whether a call is rendered in the deprecated form, as `function_call`.
        hides_reasoning: Whether the answer leaves the model's reasoning out.
        custom_tools: The functions that are custom tools to the client.
    """

    include_usage: bool = False
    service_tier: str | None = None
    with_logprobs: bool = False
    as_function_call: bool = False
    continuous_usage: bool = False
    hides_reasoning: bool = False
    custom_tools: list[str] = []


class Answer:
    """The common parts of one answer.

    Attributes:
        id: OpenAI's, such as ``chatcmpl-…``; it has the id of the request's first job.
    """

    def __init__(self, record: AnswerRecord, id_prefix: str, chunk_kind: str) -> None:
        self.id = id_prefix + record.job_ids[0]
        self.options = msgspec.convert(record.options, AnswerOptions)
        self._record = record
        self._chunk_head = sse.DATA + self._head(chunk_kind) + b',"choices":['
        self._chunk_tail = (b',"usage":null}' if self.options.include_usage else b"}") + sse.END

    def chunk_parts(self, start: bytes, end: bytes) -> tuple[bytes, bytes]:
        """What comes before and after the new part of each chunk of a choice.

        Args:
            start: Of the choice's object.
            end: The same.
        """
        return self._chunk_head + start, end + b"]" + self._chunk_tail

    def running_usage(self) -> RunningUsage | None:
        """A choice's; None: its chunks have no token counts."""
        return RunningUsage() if self.options.continuous_usage else None

    def closing(self, finished: list[Finished]) -> bytes:
        """The token counts, if they were asked for, and the end of the stream."""
        if not self.options.include_usage:
            return sse.DONE
        return self._chunk_head + b'],"usage":' + self._usage(finished) + b"}" + sse.END + sse.DONE

    def body(self, kind: str, choices: list[dict[str, Any]], finished: list[Finished]) -> bytes:
        """The complete answer as one object."""
        encoded = msgspec.json.encode(choices)
        return self._head(kind) + b',"choices":' + encoded + b',"usage":' + self._usage(finished) + b"}"

    def _head(self, kind: str) -> bytes:
        """The beginning of an object of `kind`, without its closing brace."""
        record = self._record
        fields: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": record.created,
            "model": record.model,
            "system_fingerprint": record.fingerprint,
        }
        if self.options.service_tier is not None:
            fields["service_tier"] = self.options.service_tier
        return msgspec.json.encode(fields)[:-1]

    def _usage(self, finished: list[Finished]) -> bytes:
        return msgspec.json.encode(usage_object(total_usage(finished, self._record.best_of)))


class RunningUsage:
    """The token counts of one choice so far, for each of its chunks. The prompt's is known once its `Started` has come."""

    def __init__(self) -> None:
        self._prompt_tokens: int | None = None
        self._completion_tokens = 0

    def observe(self, event: AnswerEvent) -> None:
        """Count the next event."""
        if isinstance(event, Started):
            self._prompt_tokens = event.prompt_tokens
        elif isinstance(event, Delta):
            self._completion_tokens += 1
        elif isinstance(event, Finished):
            self._prompt_tokens = event.usage.prompt_tokens
            self._completion_tokens = event.usage.completion_tokens

    def chunk_end(self) -> bytes:
        """The end of a chunk, from the end of its choice on."""
        if self._prompt_tokens is None:
            return b'}],"usage":null}' + sse.END
        prompt, completion = self._prompt_tokens, self._completion_tokens
        counts = b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}'
        return b'}],"usage":' + counts % (prompt, completion, prompt + completion) + b"}" + sse.END


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
