"""The types of answers, for the description (`api.openapi`); the renderings write the same objects directly as bytes.

Tests keep both equal: each answer and each chunk must be of one of these types, without a field that is not here.
https://platform.openai.com/docs/api-reference/chat/object
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from common.protocol import FinishReason

_REASONS = tuple(reason for reason in get_args(FinishReason) if reason != "cancelled")  # rendered as an error

Reason = Annotated[str, Meta(extra_json_schema={"enum": _REASONS})]
Count = Annotated[int, Meta(ge=0)]
UnixSeconds = Annotated[int, Meta(ge=0)]
Byte = Annotated[int, Meta(ge=0, le=255)]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: Annotated[Count, Meta(description="Prompt tokens that were cached.")]


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: Count


class UsageObject(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts."""

    prompt_tokens: Count
    completion_tokens: Annotated[Count, Meta(description="All generated tokens, of all choices.")]
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[Byte]


class TokenLogprobs(TopLogprob, frozen=True):
    """A sampled token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The tokens concatenate to the content, as text and as bytes."""

    content: list[TokenLogprobs] | None
    refusal: None


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: Annotated[str, Meta(description="A JSON object as text.")]


class CalledCustomTool(msgspec.Struct, frozen=True):
    name: str
    input: str


class MessageToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function or a custom tool that the model calls; it has the field of its type."""

    id: str
    type: Literal["function", "custom"]
    function: CalledFunction | UnsetType = UNSET
    custom: CalledCustomTool | UnsetType = UNSET


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The generated message."""

    role: Literal["assistant"]
    content: Annotated[str | None, Meta(description="Null if there are only tool calls.")]
    refusal: None
    tool_calls: list[MessageToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType | None = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: Count
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class AnswerHead(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that are the same in all chunks of an answer."""

    id: str
    created: UnixSeconds
    model: Annotated[str, Meta(description="As the request named it.")]
    system_fingerprint: str
    service_tier: str | UnsetType = UNSET


class ChatCompletion(AnswerHead, frozen=True, kw_only=True):
    """A complete answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageObject


class CalledFunctionDelta(msgspec.Struct, frozen=True):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class CalledCustomToolDelta(msgspec.Struct, frozen=True):
    name: str | UnsetType = UNSET
    input: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a call: first its id and name, then its arguments, or its input, in pieces."""

    index: Count
    id: str | UnsetType = UNSET
    type: Literal["function", "custom"] | UnsetType = UNSET
    function: CalledFunctionDelta | UnsetType = UNSET
    custom: CalledCustomToolDelta | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds; only the first chunk of a choice has the role."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType | None = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatCompletionChunk(AnswerHead, frozen=True, kw_only=True):
    """A chunk of a chat's stream; the one without choices has the usage."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageObject | UnsetType | None = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Four arrays of one length. The first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason


class CompletionChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None


class Completion(AnswerHead, frozen=True, kw_only=True):
    """A complete answer to a prompt."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageObject


class CompletionChunk(AnswerHead, frozen=True, kw_only=True):
    """A chunk of a completion's stream; the one without choices has the usage."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: UsageObject | UnsetType | None = UNSET
