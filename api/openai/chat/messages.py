"""The messages of a chat request, in the form that chat templates expect.

Checks which role may have which fields. Arguments of earlier calls become objects if they are JSON objects, as templates
expect them (mlx_lm.server 0.32 does the same). Used by `api.openai.chat.request`. Must not know models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.openai import request_fields as fields
from common.errors import invalid
from common.schema import limits

MAX_ARGUMENT_LEVELS = 200
"""Of a call's arguments as an object; deeper ones stay text."""


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; only text is supported."""

    type: str
    text: str | None = None
    refusal: str | None = None


_SUPPORTED = Meta(
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
    """An earlier call; `arguments` is JSON."""

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
    """One message. Other fields, which clients send back with an answer, have no effect."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Annotated[ContentPart, _SUPPORTED]] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Annotated[ToolCall, _OF_FUNCTION]] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    audio: Any = None


_OTHER_PARTS = ("image_url", "input_audio", "file", "audio", "video_url", "image")


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates expect.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    called: dict[str, str] = {}  # function names by call id
    return [_plain(message, f"messages[{i}]", called) for i, message in enumerate(messages)]


def _plain(message: Message, path: str, called: dict[str, str]) -> dict[str, Any]:
    if message.audio is not None:
        raise fields.unsupported(f"{path}.audio")
    if message.role == "assistant":
        return _assistant(message, path, called)
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise invalid(f"Only an assistant message can have `{name}`.", f"{path}.{name}")
    if message.role in ("tool", "function"):
        return _result(message, path, called)
    # Templates know the role `system` only.
    role = "system" if message.role == "developer" else message.role
    return _named({"role": role, "content": _text(message.content, f"{path}.content")}, message.name)


def _named(said: dict[str, Any], name: str | None) -> dict[str, Any]:
    return said if name is None else said | {"name": name}


def _assistant(message: Message, path: str, called: dict[str, str]) -> dict[str, Any]:
    """A model's earlier answer: text, calls or both, and perhaps its reasoning."""
    calls = [
        _call(call, f"{path}.tool_calls[{i}]", called) for i, call in enumerate(message.tool_calls or [])
    ]
    if message.function_call is not None:  # the deprecated form, which has no id
        call = ToolCall(f"call_{len(called)}", "function", message.function_call)
        calls.append(_call(call, path, called, "function_call"))
    if message.content is None and (calls or message.refusal is not None):
        text = message.refusal or ""
    else:
        text = _text(message.content, f"{path}.content", refusals=True)
    said = _named({"role": "assistant", "content": text}, message.name)
    if message.reasoning_content:
        said["reasoning_content"] = message.reasoning_content
    if calls:
        said["tool_calls"] = calls
    return said


def _call(call: ToolCall, path: str, called: dict[str, str], inside: str = "function") -> dict[str, Any]:
    if call.type != "function":
        raise invalid(f"`{path}.type` must be `function`.", f"{path}.type")
    if call.function is None:
        raise invalid(f"`{path}.{inside}` is missing.", f"{path}.{inside}")
    called[call.id] = call.function.name
    function = {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments(text: str) -> Mapping[str, Any] | str:
    """Arguments as an object; some models call a function without parameters with an empty string. Text that is not a
    JSON object, such as that of a truncated call, is kept, as is one that is nested too deeply: any answer can be sent
    back unchanged.
    """
    try:
        arguments = msgspec.json.decode(text, type=dict[str, Any]) if text.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        return text
    return text if limits.is_deeper(arguments, MAX_ARGUMENT_LEVELS) else arguments


def _result(message: Message, path: str, called: dict[str, str]) -> dict[str, Any]:
    """A function's result, with the function's name, which some templates need and OpenAI's message lacks."""
    content = _text(message.content, f"{path}.content")
    name: str | None
    if message.role == "function":
        if message.name is None:
            raise invalid(f"`{path}.name` must be the name of the function.", f"{path}.name")
        ids = [call_id for call_id, name in called.items() if name == message.name]
        call_id, name = (ids or [f"call_{len(called)}"])[-1], message.name
    elif message.tool_call_id is None:
        raise invalid(
            f"`{path}.tool_call_id` must be the id of the call that this is the result of.",
            f"{path}.tool_call_id",
        )
    else:
        call_id, name = message.tool_call_id, message.name or called.get(message.tool_call_id)
    return _named({"role": "tool", "content": content, "tool_call_id": call_id}, name)


def _text(content: str | list[ContentPart] | None, path: str, *, refusals: bool = False) -> str:
    if isinstance(content, str):
        return content
    if not content:
        raise invalid(f"`{path}` must be a string, or a list of at least one part.", path)
    return "".join(_part(part, f"{path}[{i}]", refusals=refusals) for i, part in enumerate(content))


def _part(part: ContentPart, path: str, *, refusals: bool) -> str:
    for kind, text in (("text", part.text), ("refusal", part.refusal)):
        if part.type == kind and (refusals or kind == "text"):
            if text is None:
                raise invalid(f"`{path}.{kind}` must be a string.", f"{path}.{kind}")
            return text
    if part.type == "refusal":
        raise invalid("Only an assistant message can have a refusal.", f"{path}.type")
    if part.type in _OTHER_PARTS:
        raise invalid(
            f"Only text is supported, not content parts of type `{part.type}`.",
            f"{path}.type",
            "unsupported_content",
        )
    raise invalid(f"`{path}.type` must be `text`.", f"{path}.type")
