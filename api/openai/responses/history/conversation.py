"""The items of a conversation as the messages that chat templates expect.

The thoughts, the text and the calls of one turn are items of their own, and become one message of the assistant. Items of
built-in tools that say something about the conversation become calls and results; the others are skipped and named.
Used by `api.openai.responses.request`. Must not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from api.openai.fields.custom_tools import CUSTOM_INPUT
from api.openai.fields.functions import call_arguments
from api.openai.responses.history import builtin_items, contents
from api.openai.responses.history.item_types import (
    CallOutputItem,
    CustomCallItem,
    FunctionCallItem,
    MessageItem,
    ReasoningItem,
)
from api.openai.responses.thoughts import decode_thoughts
from api.openai.responses.tools import flat_name
from api.openai.responses.typed import Ignored, missing, name_unknown_keys, typed
from common.errors import invalid

Item = dict[str, Any]

_KINDS = frozenset(
    {
        "additional_tools",
        "custom_tool_call",
        "custom_tool_call_output",
        "function_call",
        "function_call_output",
        "item_reference",
        "message",
        "reasoning",
    }
)
"""The kinds of items that are not of built-in tools."""

_ADDITIONAL_TOOLS_KEYS = frozenset({"id", "role", "status", "tools", "type"})


def as_items(given: str | list[Any] | None, path: str) -> list[Item]:
    """The `input` of a request as a list of items.

    Raises:
        RequestError: 400; something in it is not an object.
    """
    if given is None:
        return []
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    for i, item in enumerate(given):
        if isinstance(item, str):
            raise invalid(f"`{path}[{i}]` must be an object, such as a message with a role.", f"{path}[{i}]")
        if not isinstance(item, dict):
            raise invalid(f"`{path}[{i}]` must be an object.", f"{path}[{i}]")
    return given


def kind_of(item: Mapping[str, Any], path: str) -> str:
    """The type of an item; messages and references may leave it out.

    Raises:
        RequestError: 400; it has none.
    """
    kind = item.get("type")
    if isinstance(kind, str):
        is_known = kind in _KINDS or kind in builtin_items.SKIPPED
        return "message" if not is_known and "role" in item and "content" in item else kind
    if kind is not None:
        raise invalid(f"`{path}.type` must be a string.", f"{path}.type")
    if "role" in item:
        return "message"
    if isinstance(item.get("id"), str):
        return "item_reference"
    raise missing(f"{path}.type", "it says what kind of item this is")


class Conversation:
    """Collects the messages of items.

    Attributes:
        messages: So far, in order.
        extra_tools: Definitions of tools in items of the type `additional_tools`, with their paths.
    """

    def __init__(self, ignored: Ignored) -> None:
        self.messages: list[dict[str, Any]] = []
        self.extra_tools: list[tuple[Any, str]] = []
        self._ignored = ignored
        self._called: dict[str, str] = {}  # function names by call id
        self._adders: dict[str, Callable[[Item, str], None]] = {
            "message": self._add_message,
            "reasoning": self._add_reasoning,
            "function_call": self._add_function_call,
            "function_call_output": self._add_output,
            "custom_tool_call": self._add_custom_call,
            "custom_tool_call_output": self._add_output,
        }

    def add_instructions(self, text: str) -> None:
        """The request's own instructions, which come first."""
        self.messages.append({"role": "system", "content": text})

    def add(self, item: Item, path: str) -> None:
        """The next item; references are resolved before.

        Raises:
            RequestError: 400, in `param` what is wrong.
        """
        kind = kind_of(item, path)
        add = self._adders.get(kind)
        if add is not None:
            add(item, path)
            return
        if kind == "additional_tools":
            name_unknown_keys(item, _ADDITIONAL_TOOLS_KEYS, path, self._ignored)
            tools = item.get("tools")
            if not isinstance(tools, list):
                raise invalid(f"`{path}.tools` must be a list of tools.", f"{path}.tools")
            self.extra_tools += [(tool, f"{path}.tools[{i}]") for i, tool in enumerate(tools)]
            return
        converted = builtin_items.convert(item, kind)
        if converted.is_skipped:
            self._ignored.add(path)
        else:
            name_unknown_keys(item, builtin_items.KNOWN_KEYS, path, self._ignored)
        for call in converted.calls:
            self._add_call(call.call_id, call.name, call.arguments)
        for result in converted.results:
            self._add_result(result.call_id, self._called.get(result.call_id), result.text)

    def _add_message(self, item: Item, path: str) -> None:
        message = typed(item, MessageItem, path, self._ignored)
        text = contents.text_of(message.content, f"{path}.content", self._ignored)
        if message.role == "assistant":
            turn = self._open_turn(is_free=lambda last: not last["content"] and "tool_calls" not in last)
            turn["content"] = text
            return
        # Templates know the role `system` only.
        role = "system" if message.role == "developer" else message.role
        self.messages.append({"role": role, "content": text})

    def _add_reasoning(self, item: Item, path: str) -> None:
        reasoning = typed(item, ReasoningItem, path, self._ignored)
        for name in ("summary", "content"):
            contents.name_unknown_keys_of_parts(getattr(reasoning, name), f"{path}.{name}", self._ignored)
        text = None
        if reasoning.encrypted_content:
            text = decode_thoughts(reasoning.encrypted_content)
            if text is None:
                self._ignored.add(f"{path}.encrypted_content")
        if text is None:
            name = "content" if reasoning.content else "summary"
            parts = getattr(reasoning, name)
            text = contents.text_of(parts, f"{path}.{name}", self._ignored, joint="\n\n")
        if text:
            turn = self._open_turn(is_free=lambda last: not last["content"] and "tool_calls" not in last)
            before = turn.get("reasoning_content")
            turn["reasoning_content"] = f"{before}\n\n{text}" if before else text

    def _add_function_call(self, item: Item, path: str) -> None:
        call = typed(item, FunctionCallItem, path, self._ignored)
        self._add_call(call.call_id or call.id, flat_name(call.namespace, call.name), call.arguments or "")

    def _add_custom_call(self, item: Item, path: str) -> None:
        call = typed(item, CustomCallItem, path, self._ignored)
        arguments = msgspec.json.encode({CUSTOM_INPUT: call.input or ""}).decode()
        self._add_call(call.call_id or call.id, flat_name(call.namespace, call.name), arguments)

    def _add_call(self, call_id: str | None, name: str, arguments: str) -> None:
        call_id = call_id or f"call_{len(self._called)}"
        self._called[call_id] = name
        turn = self._open_turn(is_free=lambda _last: True)
        function = {"name": name, "arguments": call_arguments(arguments)}
        turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})

    def _add_output(self, item: Item, path: str) -> None:
        output = typed(item, CallOutputItem, path, self._ignored)
        call_id, name = output.call_id, output.name and flat_name(output.namespace, output.name)
        if call_id is None:
            ids = [each for each, called in self._called.items() if name in (None, called)]
            if not ids:
                raise missing(f"{path}.call_id", "it is the id of the call that this is the output of")
            call_id = ids[-1]
        text = contents.output_text(output.output, f"{path}.output", self._ignored)
        self._add_result(call_id, name or self._called.get(call_id), text)

    def _add_result(self, call_id: str, name: str | None, text: str) -> None:
        message = {"role": "tool", "content": text, "tool_call_id": call_id}
        self.messages.append(message if name is None else message | {"name": name})

    def _open_turn(self, is_free: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The assistant's message that an item belongs to: the last message if it is one and `is_free`, else a new one."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "assistant" and is_free(last):
            return last
        turn: dict[str, Any] = {"role": "assistant", "content": ""}
        self.messages.append(turn)
        return turn
