"""The items of a conversation as clients send them, and the parts of their contents.

Used by `api.openai.responses.history.conversation`, which makes messages of them. Fields typed `Any` have no effect here: clients send back
what they got. https://platform.openai.com/docs/api-reference/responses/create#responses-create-input
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["user", "assistant", "system", "developer"]


class Part(msgspec.Struct, frozen=True):
    """One part of a content; only text is served."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None
    image_url: Any = None
    file_id: Any = None
    file_data: Any = None
    file_url: Any = None
    filename: Any = None
    detail: Any = None
    input_audio: Any = None
    prompt_cache_breakpoint: Any = None


class MessageItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message; its type may be left out."""

    role: Role
    content: Any = None
    type: str | None = None
    id: str | None = None
    status: Any = None
    phase: Any = None


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True):
    """A model's earlier thoughts, in up to three forms."""

    type: str
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: Any = None


class FunctionCallItem(msgspec.Struct, frozen=True, kw_only=True):
    """An earlier call of a function."""

    type: str
    name: str
    call_id: str | None = None
    arguments: str | None = None
    namespace: str | None = None
    id: str | None = None
    status: Any = None
    caller: Any = None


class CustomCallItem(msgspec.Struct, frozen=True, kw_only=True):
    """An earlier call of a custom tool."""

    type: str
    name: str
    call_id: str | None = None
    input: str | None = None
    namespace: str | None = None
    id: str | None = None
    status: Any = None
    caller: Any = None


class CallOutputItem(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a call, of either kind."""

    type: str
    call_id: str | None = None
    output: Any = None
    name: str | None = None
    namespace: str | None = None
    id: str | None = None
    status: Any = None
    caller: Any = None
