"""`POST /v1/chat/completions`: the body, parsed once into a typed and checked value.

https://platform.openai.com/docs/api-reference/chat/create; what is not supported is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api import request_fields as fields
from api.generation_request import GenerationRequest
from common.errors import invalid
from common.protocol import ChatPrompt


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; only text can be read."""

    type: str
    text: str | None = None


_TEXT_PART = Meta(
    extra_json_schema={
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
)
_HAS_CONTENT = Meta(
    extra_json_schema={
        "anyOf": [
            {
                "properties": {"content": {"type": ["string", "array"], "minItems": 1}},
                "required": ["content"],
            },
            {
                "properties": {
                    "role": {"const": "assistant"},
                    "tool_calls": {"type": "array", "minItems": 1},
                },
                "required": ["tool_calls"],
            },
        ]
    }
)
"""What `_message` checks, as far as a schema can say it."""


class Message(msgspec.Struct, frozen=True):
    """One message; other keys that clients send back with an answer ask for nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Annotated[ContentPart, _TEXT_PART]] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None


class ChatBody(fields.Body, frozen=True, kw_only=True):
    """The fields of OpenAI's description, and `role_mapping` of mlx_lm.server."""

    messages: Annotated[list[Annotated[Message, _HAS_CONTENT]], Meta(min_length=1)]
    role_mapping: dict[str, str] | None = None
    max_completion_tokens: fields.TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: fields.ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    store: bool | None = None
    parallel_tool_calls: bool | None = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **fields.NEUTRAL,
    "response_format": (fields.ResponseFormat("text"),),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "store": (False,),
}

ONLY_WITH: Mapping[str, str] = {**fields.ONLY_WITH, "top_logprobs": "logprobs"}

_RESPONSE_FORMATS = ("text", "json_object", "json_schema")
_OTHER_PARTS = ("image_url", "input_audio", "file", "refusal", "audio", "video_url", "image")

_decoder = msgspec.json.Decoder(ChatBody)


def parse(body: bytes) -> GenerationRequest:
    """Read and check a request.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    chat, ignored = fields.decode(body, _decoder)
    if chat.response_format is not None and chat.response_format.type not in _RESPONSE_FORMATS:
        raise invalid(
            f"`response_format.type` must be one of {', '.join(_RESPONSE_FORMATS)}.", "response_format.type"
        )
    fields.check_neutral(chat, NEUTRAL)
    fields.check_only_with(chat, ONLY_WITH)
    return GenerationRequest(
        model=chat.model,
        prompt=ChatPrompt(
            [_message(m, f"messages[{i}]") for i, m in enumerate(chat.messages)], chat.role_mapping
        ),
        max_tokens=_max_tokens(chat),
        stop=fields.stops(chat),
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        sampling=fields.sampling(chat),
        stream=bool(chat.stream),
        include_usage=chat.stream_options is not None and bool(chat.stream_options.include_usage),
        service_tier="default" if chat.service_tier is not None else None,
        ignored=ignored,
    )


def _max_tokens(chat: ChatBody) -> int | None:
    both = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(both) > 1:
        raise invalid(
            "`max_tokens` and `max_completion_tokens` say different things; give one of them.",
            "max_completion_tokens",
        )
    return both.pop() if both else None


def _message(message: Message, place: str) -> dict[str, Any]:
    """A message as the chat template reads it."""
    if message.tool_calls:
        raise fields.unsupported(f"{place}.tool_calls")
    if message.function_call is not None:
        raise fields.unsupported(f"{place}.function_call")
    if message.audio is not None:
        raise fields.unsupported(f"{place}.audio")
    if message.role in ("tool", "function"):
        raise invalid(
            f"Messages of the role `{message.role}` are not supported yet.",
            f"{place}.role",
            "unsupported_parameter",
        )
    # The developer's messages are what a model knows as the system's.
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message.content, f"{place}.content")}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _text(content: str | list[ContentPart] | None, place: str) -> str:
    if isinstance(content, str):
        return content
    if not content:
        raise invalid(f"`{place}` must be a string, or a list of at least one part.", place)
    return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: ContentPart, place: str) -> str:
    if part.type == "text":
        if part.text is None:
            raise invalid(f"`{place}.text` must be a string.", f"{place}.text")
        return part.text
    if part.type in _OTHER_PARTS:
        raise invalid(
            f"The models here read text only; a part of the type `{part.type}` is not supported.",
            f"{place}.type",
            "unsupported_content",
        )
    raise invalid(f"`{place}.type` must be `text`.", f"{place}.type")
