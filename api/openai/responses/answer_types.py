"""The types of responses and of their streams' events, for the description (`api.openapi`); the renderings write them as bytes.

Tests keep both equal. https://platform.openai.com/docs/api-reference/responses/object
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from api.openai.answer_types import Count, TokenLogprobs, UnixSeconds

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Meta(max_length=0)]
    logprobs: list[TokenLogprobs]


class ThoughtText(msgspec.Struct, frozen=True, kw_only=True):
    """The text of the reasoning, or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thinks; `summary` has it if the request asked for a summary."""

    id: str
    status: ItemStatus
    summary: list[ThoughtText]
    content: list[ThoughtText] | UnsetType = UNSET
    encrypted_content: (
        Annotated[str, Meta(description="To be sent back by stateless clients.")] | UnsetType
    ) = UNSET


class OutputFunctionCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A function that the model calls."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: Annotated[str, Meta(description="A JSON object as text.")]
    namespace: str | UnsetType = UNSET


class OutputCustomCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="custom_tool_call"):
    """A custom tool that the model calls."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    input: str
    namespace: str | UnsetType = UNSET


AnyOutputItem = OutputMessage | OutputReasoning | OutputFunctionCall | OutputCustomCall


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: Count
    cache_write_tokens: Literal[0]


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: Count


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """A response; most of its fields repeat the request."""

    id: str
    object: Literal["response"]
    created_at: UnixSeconds
    completed_at: None
    model: Annotated[str, Meta(description="As the request named it.")]
    status: Status
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[AnyOutputItem]
    usage: ResponseUsage | None
    background: bool
    frequency_penalty: float
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Count
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; the last one has the complete response. Fields are present by type."""

    type: str
    sequence_number: Count
    response: ResponseObject | UnsetType = UNSET
    item: AnyOutputItem | UnsetType = UNSET
    part: dict[str, Any] | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    output_index: Count | UnsetType = UNSET
    content_index: Count | UnsetType = UNSET
    summary_index: Count | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET
    logprobs: list[TokenLogprobs] | UnsetType = UNSET
