"""What a model's chat template knows of functions, found out by rendering a few messages with it.

Done once, when the model is loaded; `worker.text.prompts` goes by it. Templates differ, and none says what it leaves out: a call
or a result that it does not know is an error in some, and silently lost in others.
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
_UNIVERSAL_CALL = re.compile(
    r'<tool_call>\s*\{"name": ?"probe_call", ?"arguments": ?\{"probe_key": ?"probe_value"\}\}\s*</tool_call>'
)
_SHORT_ID_CHARACTERS = 9


class CallStyle(Enum):
    """How a template takes calls that were made before, and their results."""

    OBJECTS = "arguments are an object"
    STRINGS = "arguments are JSON text"  # as DeepSeek's, which puts them behind a string
    SHORT_IDS = "ids are nine letters or digits"  # as Mistral's, which raises otherwise


@dataclass(frozen=True, slots=True)
class TemplateSupport:
    """See the module.

    Attributes:
        renders_tools: Whether the model is told of the functions that it is given.
        calls: None: calls and results are not what the template knows.
        renders_system: Whether it takes a system message.
        is_universal: Whether it writes calls in the form that `worker.text.tool_messages` asks for.
    """

    renders_tools: bool = False
    calls: CallStyle | None = None
    renders_system: bool = True
    is_universal: bool = False


def probe_template(tokenizer: Any) -> TemplateSupport:
    """Find out about a tokenizer's template.

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
    renders_tools = _TOOL in _rendered(tokenizer, [hello], tools=[tool])
    given = {"tools": [tool]} if renders_tools else {}
    call = {"id": "call_0", "type": "function", "function": _CALL}
    history: Messages = [
        hello,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _RESULT, "tool_call_id": "call_0", "name": _CALL["name"]},
    ]
    known = ("probe_call", "probe_key", "probe_value", _RESULT)
    texts = {
        style: _rendered(tokenizer, convert_tool_messages(history, style), **given) for style in CallStyle
    }
    calls = next((style for style, text in texts.items() if all(word in text for word in known)), None)
    system = _rendered(tokenizer, [{"role": "system", "content": _SYSTEM}, hello])
    return TemplateSupport(
        renders_tools,
        calls,
        _SYSTEM in system,
        calls is not None and _UNIVERSAL_CALL.search(texts[calls]) is not None,
    )


def _rendered(tokenizer: Any, messages: Messages, **arguments: Any) -> str:
    """The text; empty where the template refuses."""
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
        )
    except Exception:  # noqa: BLE001 (templates raise whatever they trip over)
        return ""


def convert_tool_messages(messages: Messages, style: CallStyle) -> Messages:
    """Messages with calls and results as a template takes them."""
    if style is CallStyle.OBJECTS:
        return messages
    if style is CallStyle.STRINGS:
        return _with_calls(messages, _with_text_arguments, lambda call_id: call_id)
    return _with_calls(messages, lambda call: call | {"id": _short_id(call.get("id", ""))}, _short_id)


def _with_calls(
    messages: Messages,
    change_call: Callable[[dict[str, Any]], dict[str, Any]],
    change_id: Callable[[str], str],
) -> Messages:
    changed = []
    for message in messages:
        new = dict(message)
        if message.get("tool_calls"):
            new["tool_calls"] = [change_call(call) for call in message["tool_calls"]]
        if message.get("tool_call_id"):
            new["tool_call_id"] = change_id(message["tool_call_id"])
        changed.append(new)
    return changed


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]  # a text where they are no JSON object
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": text}}


def _short_id(call_id: str) -> str:
    if len(call_id) == _SHORT_ID_CHARACTERS and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT_ID_CHARACTERS]
