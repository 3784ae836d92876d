"""The messages of a chat request, in the form that chat templates expect.

A conversation is sent again with every turn, so whatever an earlier answer or a client's own bookkeeping may look like is accepted
if its meaning is clear: missing contents are empty texts, missing ids of calls are made up, results without an id belong to the
calls before them in order. Used by `api.openai.chat.request`. Must not know models.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.openai.fields import body as fields
from api.openai.fields.custom_tools import CUSTOM_INPUT
from api.openai.fields.functions import call_arguments
from common.errors import RequestError, invalid

_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; only texts are supported: OpenAI's `text`, `input_text`, `output_text` and `refusal`, and
    the `thinking` and `reasoning` of earlier answers. A part with a text may lack its type.
    """

    type: str | None = None
    text: str | None = None
    refusal: str | None = None
    thinking: str | list[Any] | None = None
    reasoning: str | None = None


_SUPPORTED_KINDS = Meta(
    extra_json_schema={
        "allOf": [  # next to the `anyOf` of the union
            {
                "anyOf": [
                    {"type": "string"},
                    {
                        "properties": {"type": {"enum": [*_TEXT_PARTS, "refusal", *_REASONING_PARTS]}},
                        "required": ["type"],
                    },
                    {
                        "properties": {"type": {"type": "null"}, "text": {"type": "string"}},
                        "required": ["text"],
                    },
                ]
            }
        ]
    }
)


class FunctionCall(msgspec.Struct, frozen=True):
    """An earlier call; `arguments` is JSON, or the object itself."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CustomCall(msgspec.Struct, frozen=True):
    """An earlier call of a tool whose input is any text."""

    name: str
    input: str = ""


class ToolCall(msgspec.Struct, frozen=True):
    """`index` is a stream's; some clients keep it."""

    id: str | None = None
    type: str | None = None
    function: FunctionCall | None = None
    custom: CustomCall | None = None
    index: Any = None


_HAS_FUNCTION = Meta(
    extra_json_schema={
        "anyOf": [
            {
                "properties": {"type": {"enum": ["function", "", None]}, "function": {"type": "object"}},
                "required": ["function"],
            },
            {
                "properties": {"type": {"const": "custom"}, "custom": {"type": "object"}},
                "required": ["type", "custom"],
            },
        ]
    }
)


class Message(msgspec.Struct, frozen=True):
    """One message. `annotations` are part of OpenAI's answers and have no effect.

    `reasoning_content`, `reasoning` and `thinking` are one field under the names that DeepSeek, OpenRouter and Ollama gave it. `prefix`
    is DeepSeek's and Mistral's mark of a last message that is to be continued, `partial` is Moonshot's.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Annotated[ContentPart | str, _SUPPORTED_KINDS]] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    tool_calls: list[Annotated[ToolCall, _HAS_FUNCTION]] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    annotations: Any = None
    audio: Any = None
    prefix: bool | None = None
    partial: bool | None = None


_OTHER_PARTS = (
    "audio",
    "document",
    "file",
    "image",
    "image_url",
    "input_audio",
    "input_file",
    "input_image",
    "video",
    "video_url",
)


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates expect.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    calls = _Calls()
    return [_plain(message, f"messages[{i}]", calls) for i, message in enumerate(messages)]


class _Calls:
    """The calls so far, by id.

    Attributes:
        names: Of the functions.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self._open: set[str] = set()
        self._in_order: defaultdict[str | None, deque[str]] = defaultdict(deque)  # by name, and all of them

    def add(self, call_id: str | None, name: str) -> str:
        """Add a call.

        Returns:
            Its id, which is made up if the client has none.
        """
        call_id = call_id or self._new_id()
        self.names[call_id] = name
        self._open.add(call_id)
        for key in (name, None):
            self._in_order[key].append(call_id)
        return call_id

    def answer(self, given_id: str | None, name: str | None) -> str:
        """Match a result to its call.

        Args:
            given_id: None: the first call without a result that has this name, if one is given.

        Returns:
            The call's id, or a new one if there is no such call.
        """
        call_id = given_id or self._first_open(name) or self._new_id()
        self._open.discard(call_id)
        return call_id

    def _first_open(self, name: str | None) -> str | None:
        calls = self._in_order.get(name, deque())
        while calls and calls[0] not in self._open:
            calls.popleft()
        return calls[0] if calls else None

    def _new_id(self) -> str:
        numbers = itertools.count(len(self.names))
        return next(call_id for number in numbers if (call_id := f"call_{number}") not in self.names)


def _plain(message: Message, path: str, calls: _Calls) -> dict[str, Any]:
    if message.audio is not None:
        raise fields.unsupported(f"{path}.audio")
    if message.role == "assistant":
        return _assistant(message, path, calls)
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise invalid(f"Only an assistant message can have `{name}`.", f"{path}.{name}")
    text, _ = _texts(message.content, f"{path}.content")
    if message.role in ("tool", "function"):
        call_id = calls.answer(message.tool_call_id, message.name)
        # Some templates need the function's name, which OpenAI's message lacks.
        said = {"role": "tool", "content": text, "tool_call_id": call_id}
        return _named(said, message.name or calls.names.get(call_id))
    # Templates know the role `system` only.
    role = "system" if message.role == "developer" else message.role
    return _named({"role": role, "content": text}, message.name)


def _named(said: dict[str, Any], name: str | None) -> dict[str, Any]:
    return said if name is None else said | {"name": name}


def _assistant(message: Message, path: str, calls: _Calls) -> dict[str, Any]:
    """A model's earlier answer: text, calls or both, and perhaps its reasoning; or nothing of these."""
    made = [_call(call, f"{path}.tool_calls[{i}]", calls) for i, call in enumerate(message.tool_calls or [])]
    if message.function_call is not None:  # the deprecated form, which has no id
        made.append(_call_of_function(None, message.function_call, calls))
    text, thoughts = _texts(message.content, f"{path}.content")
    said = _named({"role": "assistant", "content": text or message.refusal or ""}, message.name)
    if reasoning := message.reasoning_content or message.reasoning or message.thinking or thoughts:
        said["reasoning_content"] = reasoning
    if made:
        said["tool_calls"] = made
    return said


def _call(call: ToolCall, path: str, calls: _Calls) -> dict[str, Any]:
    if call.type == "custom" and call.custom is not None:
        # A custom tool is offered to the model as a function with one argument.
        return _call_of_function(
            call.id, FunctionCall(call.custom.name, {CUSTOM_INPUT: call.custom.input}), calls
        )
    if call.type not in (None, "", "function"):
        raise invalid(f"`{path}.type` must be `function`.", f"{path}.type")
    if call.function is None:
        raise invalid(f"`{path}.function` is missing.", f"{path}.function")
    return _call_of_function(call.id, call.function, calls)


def _call_of_function(call_id: str | None, call: FunctionCall, calls: _Calls) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call_arguments(call.arguments or "")}
    return {"id": calls.add(call_id, call.name), "type": "function", "function": function}


def _texts(content: str | list[ContentPart | str] | None, path: str) -> tuple[str, str]:
    """The text of a content and that of its reasoning; both may be empty."""
    if content is None or isinstance(content, str):
        return content or "", ""
    texts: list[str] = []
    thoughts: list[str] = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif part.type in _REASONING_PARTS:
            thoughts.append(_thought(part))
        else:
            texts.append(_text(part, f"{path}[{i}]"))
    return "".join(texts), "".join(thoughts)


def _text(part: ContentPart, path: str) -> str:
    if part.type in _TEXT_PARTS or (part.type is None and part.text is not None):
        return part.text or ""
    if part.type == "refusal":
        return part.refusal or ""
    if part.type in _OTHER_PARTS:
        raise _unsupported(part.type, path)
    raise invalid(f"`{path}.type` must be `text`.", f"{path}.type")


def _thought(part: ContentPart) -> str:
    """`thinking` is a text (Anthropic) or a list of text parts (Mistral); `reasoning` has its text in either field."""
    if isinstance(part.thinking, list):
        texts = (each.get("text") if isinstance(each, dict) else each for each in part.thinking)
        return "".join(text for text in texts if isinstance(text, str))
    return part.thinking or part.reasoning or part.text or ""


def _unsupported(kind: str, path: str) -> RequestError:
    return invalid(
        f"Only text is supported, not content parts of type `{kind}`.", f"{path}.type", "unsupported_content"
    )
