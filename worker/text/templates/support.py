"""Detects what a model's chat template supports, by rendering a few messages with it: tools, tool calls, contents as parts.

`answer_format.detect_format` calls `probe_template` once, when the model is loaded; `renderer` and `answer_format` use the result. Templates
do not declare what they support: an unsupported call or tool result is an error in some, and silently dropped by others. What depends
on the conversation's shape, `planner` finds out. Independent of MLX.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Messages = list[dict[str, Any]]

_HELLO = "Hello."
_TOOL = "probe_tool"
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "A function.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}
_CALL = {"name": "probe_call", "arguments": {"probe_key": "probe_value"}}
_RESULT = "probe_result"
_DEFAULT_ARGUMENTS: tuple[Mapping[str, Any], ...] = (
    {},
    {"tools": []},  # Command R+ and Hermes iterate over it
    {"functions": "[]", "datetime": "unknown"},  # Firefunction appends them to a string
)
"""Of templates that raise without them."""
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
        uses_hermes_calls: Whether it renders calls in the Hermes format, as `worker.text.templates.tool_messages` does.
        needs_content_parts: Whether it renders contents only if they are lists of parts.
        literal_text: What it writes itself: its source, or what it rendered for the probes.
        default_arguments: Arguments without which it raises.
    """

    renders_tools: bool = False
    tool_message_style: ToolMessageStyle | None = None
    uses_hermes_calls: bool = False
    needs_content_parts: bool = False
    literal_text: str = ""
    default_arguments: Mapping[str, Any] = field(default_factory=dict)


def probe_template(tokenizer: Any) -> TemplateSupport:
    """Render messages with a tokenizer's template and see what comes out.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
    """
    if not tokenizer.has_chat_template:
        return TemplateSupport()
    hello = {"role": "user", "content": _HELLO}
    defaults = next((d for d in _DEFAULT_ARGUMENTS if _render(tokenizer, [hello], **d)), {})
    needs_parts = _HELLO not in _render(tokenizer, [hello], **defaults) and _HELLO in _render(
        tokenizer, with_content_parts([hello]), **defaults
    )

    def render(messages: Messages, **arguments: Any) -> str:
        messages = with_content_parts(messages) if needs_parts else messages
        return _render(tokenizer, messages, **{**defaults, **arguments})

    with_tool = render([hello], tools=[PROBE_TOOL])
    renders_tools = _TOOL in with_tool
    arguments = {"tools": [PROBE_TOOL]} if renders_tools else {}
    call = {"id": "call_0", "type": "function", "function": _CALL}
    history: Messages = [
        hello,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _RESULT, "tool_call_id": "call_0", "name": _CALL["name"]},
    ]
    expected = ("probe_call", "probe_key", "probe_value", _RESULT)
    texts = {style: render(_in_style(history, style), **arguments) for style in ToolMessageStyle}
    call_style = next(
        (style for style, text in texts.items() if all(word in text for word in expected)), None
    )
    source = tokenizer.chat_template
    return TemplateSupport(
        renders_tools,
        call_style,
        call_style is not None and _HERMES_CALL.search(texts[call_style]) is not None,
        needs_parts,
        source if isinstance(source, str) else "\n".join([with_tool, *texts.values()]),
        defaults,
    )


def _render(tokenizer: Any, messages: Messages, **arguments: Any) -> str:
    """The rendered text; empty if the template raises."""
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
        )
    except Exception:  # noqa: BLE001 (templates raise any exception)
        return ""


def _in_style(messages: Messages, style: ToolMessageStyle) -> Messages:
    if style is ToolMessageStyle.STRINGS:
        return with_text_arguments(messages)
    return with_short_ids(messages) if style is ToolMessageStyle.SHORT_IDS else messages


def with_content_parts(messages: Messages) -> Messages:
    """Convert contents to lists of parts."""
    return [m | {"content": [{"type": "text", "text": m.get("content") or ""}]} for m in messages]


def with_text_arguments(messages: Messages) -> Messages:
    """Convert the arguments of calls to JSON text."""
    return [
        m | {"tool_calls": [_with_text_arguments(call) for call in m["tool_calls"]]}
        if m.get("tool_calls")
        else m
        for m in messages
    ]


def with_short_ids(messages: Messages) -> Messages:
    """Convert the ids of calls and results to nine letters or digits."""
    converted = []
    for message in messages:
        new = dict(message)
        if message.get("tool_calls"):
            new["tool_calls"] = [
                call | {"id": _short_id(call.get("id") or "")} for call in message["tool_calls"]
            ]
        if message.get("tool_call_id"):
            new["tool_call_id"] = _short_id(message["tool_call_id"])
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
