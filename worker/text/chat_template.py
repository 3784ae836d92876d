"""Detects what a model's chat template supports, by rendering a few messages with it: tools, tool calls, a system message.

`answer_format.detect_format` calls `probe_template` once, when the model is loaded; `prompts` and `answer_format` use the result. Templates
do not declare what they support: an unsupported call or tool result is an error in some, and silently dropped by
others. Independent of MLX.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

Messages = list[dict[str, Any]]

_TOOL = "probe_tool"
_SYSTEM = "probe_system"
_CALL = {"name": "probe_call", "arguments": {"probe_key": "probe_value"}}
_RESULT = "probe_result"
_HERMES_CALL = re.compile(
    r'<tool_call>\s*\{"name": ?"probe_call", ?"arguments": ?\{"probe_key": ?"probe_value"\}\}\s*</tool_call>'
)
_SHORT_ID_CHARACTERS = 9


class ToolMessageStyle(Enum):
    """How a template expects earlier calls and their results."""

    OBJECTS = "arguments are an object"
    STRINGS = "arguments are JSON text"  # DeepSeek's template appends them to a string
    SHORT_IDS = "ids are nine letters or digits"  # Mistral's template raises otherwise


@dataclass(frozen=True, slots=True)
class TemplateSupport:
    """What a chat template supports.

    Attributes:
        renders_tools: Whether it describes the tools to the model.
        tool_message_style: How it expects earlier calls and results; None: it does not support them.
        renders_system: Whether it renders a system message.
        uses_hermes_calls: Whether it renders calls in the Hermes format, as `worker.text.tool_messages` does.
    """

    renders_tools: bool = False
    tool_message_style: ToolMessageStyle | None = None
    renders_system: bool = True
    uses_hermes_calls: bool = False


def probe_template(tokenizer: Any) -> TemplateSupport:
    """Render messages with a tokenizer's template and see what comes out.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
    """
    if not tokenizer.has_chat_template:
        return TemplateSupport()
    hello = {"role": "user", "content": "Hello."}
    tool = {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "A function.",
            "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
        },
    }
    renders_tools = _TOOL in _render(tokenizer, [hello], tools=[tool])
    arguments = {"tools": [tool]} if renders_tools else {}
    call = {"id": "call_0", "type": "function", "function": _CALL}
    history: Messages = [
        hello,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _RESULT, "tool_call_id": "call_0", "name": _CALL["name"]},
    ]
    expected = ("probe_call", "probe_key", "probe_value", _RESULT)
    texts = {
        style: _render(tokenizer, convert_tool_messages(history, style), **arguments)
        for style in ToolMessageStyle
    }
    call_style = next(
        (style for style, text in texts.items() if all(word in text for word in expected)), None
    )
    system = _render(tokenizer, [{"role": "system", "content": _SYSTEM}, hello])
    return TemplateSupport(
        renders_tools,
        call_style,
        _SYSTEM in system,
        call_style is not None and _HERMES_CALL.search(texts[call_style]) is not None,
    )


def _render(tokenizer: Any, messages: Messages, **arguments: Any) -> str:
    """The rendered text; empty if the template raises."""
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
        )
    except Exception:  # noqa: BLE001 (templates raise any exception)
        return ""


def convert_tool_messages(messages: Messages, style: ToolMessageStyle) -> Messages:
    """Convert the calls and results in OpenAI's messages to the style that a template expects."""
    if style is ToolMessageStyle.OBJECTS:
        return messages
    if style is ToolMessageStyle.STRINGS:
        return _map_calls(messages, _with_text_arguments, lambda call_id: call_id)
    return _map_calls(messages, lambda call: call | {"id": _short_id(call.get("id", ""))}, _short_id)


def _map_calls(
    messages: Messages,
    convert_call: Callable[[dict[str, Any]], dict[str, Any]],
    convert_id: Callable[[str], str],
) -> Messages:
    converted = []
    for message in messages:
        new = dict(message)
        if message.get("tool_calls"):
            new["tool_calls"] = [convert_call(call) for call in message["tool_calls"]]
        if message.get("tool_call_id"):
            new["tool_call_id"] = convert_id(message["tool_call_id"])
        converted.append(new)
    return converted


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]  # a string if they are not a JSON object
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": text}}


def _short_id(call_id: str) -> str:
    if len(call_id) == _SHORT_ID_CHARACTERS and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT_ID_CHARACTERS]
