"""The messages of a chat request, as the chat template reads them.

Checked here: who may say what. Calls that were made before have their arguments as objects where they are some, as
templates like them (mlx_lm.server 0.32 does the same). Used by `chat_request`; knows the OpenAI API description and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.openai import request_fields as fields
from common.errors import invalid


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; only text can be read."""

    type: str
    text: str | None = None
    refusal: str | None = None


_READABLE = Meta(
    extra_json_schema={
        "anyOf": [
            {
                "properties": {"type": {"const": kind}, kind: {"type": "string"}},
                "required": ["type", kind],
            }
            for kind in ("text", "refusal")
        ]
    }
)


class FunctionCall(msgspec.Struct, frozen=True):
    """A call that was made; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    type: str
    function: FunctionCall | None = None


_OF_FUNCTION = Meta(
    extra_json_schema={
        "properties": {"type": {"const": "function"}, "function": {"type": "object"}},
        "required": ["function"],
    }
)


class Message(msgspec.Struct, frozen=True):
    """One message; other keys that clients send back with an answer ask for nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Annotated[ContentPart, _READABLE]] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Annotated[ToolCall, _OF_FUNCTION]] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    audio: Any = None


_OTHER_PARTS = ("image_url", "input_audio", "file", "audio", "video_url", "image")


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as the chat template reads them.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    called: dict[str, str] = {}  # function names by call
    return [_plain(message, f"messages[{i}]", called) for i, message in enumerate(messages)]


def _plain(message: Message, place: str, called: dict[str, str]) -> dict[str, Any]:
    if message.audio is not None:
        raise fields.unsupported(f"{place}.audio")
    if message.role == "assistant":
        return _assistant(message, place, called)
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise invalid(f"Only an assistant's message can have `{name}`.", f"{place}.{name}")
    if message.role in ("tool", "function"):
        return _result(message, place, called)
    # The developer's messages are what a model knows as the system's.
    role = "system" if message.role == "developer" else message.role
    return _named({"role": role, "content": _text(message.content, f"{place}.content")}, message.name)


def _named(said: dict[str, Any], name: str | None) -> dict[str, Any]:
    return said if name is None else said | {"name": name}


def _assistant(message: Message, place: str, called: dict[str, str]) -> dict[str, Any]:
    """An answer of a model: text, calls or both, and perhaps what it thought."""
    calls = [
        _call(call, f"{place}.tool_calls[{i}]", called) for i, call in enumerate(message.tool_calls or [])
    ]
    if message.function_call is not None:  # the deprecated form, which has no id
        call = ToolCall(f"call_{len(called)}", "function", message.function_call)
        calls.append(_call(call, place, called, "function_call"))
    if message.content is None and (calls or message.refusal is not None):
        text = message.refusal or ""
    else:
        text = _text(message.content, f"{place}.content", refusals=True)
    said = _named({"role": "assistant", "content": text}, message.name)
    if message.reasoning_content:
        said["reasoning_content"] = message.reasoning_content
    if calls:
        said["tool_calls"] = calls
    return said


def _call(call: ToolCall, place: str, called: dict[str, str], inside: str = "function") -> dict[str, Any]:
    if call.type != "function":
        raise invalid(f"`{place}.type` must be `function`.", f"{place}.type")
    if call.function is None:
        raise invalid(f"`{place}.{inside}` is missing.", f"{place}.{inside}")
    called[call.id] = call.function.name
    function = {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments(text: str) -> Mapping[str, Any] | str:
    """A function without parameters is called with nothing by some models. What is no object, since the answer was cut
    for example, stays the text that it was: an answer can be sent back as it came.
    """
    try:
        return msgspec.json.decode(text, type=dict[str, Any]) if text.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        return text


def _result(message: Message, place: str, called: dict[str, str]) -> dict[str, Any]:
    """What a function returned. Templates that ask for its name, which OpenAI's message does not have, get it."""
    content = _text(message.content, f"{place}.content")
    name: str | None
    if message.role == "function":
        if message.name is None:
            raise invalid(f"`{place}.name` must be the name of the function.", f"{place}.name")
        ids = [call_id for call_id, name in called.items() if name == message.name]
        call_id, name = (ids or [f"call_{len(called)}"])[-1], message.name
    elif message.tool_call_id is None:
        raise invalid(
            f"`{place}.tool_call_id` must say which call this is the result of.", f"{place}.tool_call_id"
        )
    else:
        call_id, name = message.tool_call_id, message.name or called.get(message.tool_call_id)
    return _named({"role": "tool", "content": content, "tool_call_id": call_id}, name)


def _text(content: str | list[ContentPart] | None, place: str, *, refusals: bool = False) -> str:
    if isinstance(content, str):
        return content
    if not content:
        raise invalid(f"`{place}` must be a string, or a list of at least one part.", place)
    return "".join(_part(part, f"{place}[{i}]", refusals=refusals) for i, part in enumerate(content))


def _part(part: ContentPart, place: str, *, refusals: bool) -> str:
    for kind, text in (("text", part.text), ("refusal", part.refusal)):
        if part.type == kind and (refusals or kind == "text"):
            if text is None:
                raise invalid(f"`{place}.{kind}` must be a string.", f"{place}.{kind}")
            return text
    if part.type == "refusal":
        raise invalid("Only an assistant's message can have a refusal.", f"{place}.type")
    if part.type in _OTHER_PARTS:
        raise invalid(
            f"The models here read text only; a part of the type `{part.type}` is not supported.",
            f"{place}.type",
            "unsupported_content",
        )
    raise invalid(f"`{place}.type` must be `text`.", f"{place}.type")
