"""Functions, calls and results as plain messages, for models whose chat template does not know them.

The functions become a system message that says how to call them; calls and results that were made before become text in
the same form. That form is the one of Hermes and Qwen models, `common.schema.grammar`'s and `worker.text.tool_calls`'s. Pure.
"""

from __future__ import annotations

import json
from typing import Any

from common.protocol import ToolUse
from common.schema.grammar import CALL_BEGIN, CALL_END
from worker.text.chat_template import Messages


def add_tool_instructions(messages: Messages, tool_use: ToolUse, *, renders_system: bool) -> Messages:
    """Messages that tell of the functions: in the system message, or in the first user's where there can be none."""
    text = instructions(tool_use)
    if messages and messages[0]["role"] == "system":
        text = f"{messages[0].get('content') or ''}\n\n{text}".strip()
        messages = messages[1:]
    if renders_system or not messages or messages[0]["role"] != "user":
        return [{"role": "system" if renders_system else "user", "content": text}, *messages]
    first = messages[0]
    return [first | {"content": f"{text}\n\n{first.get('content') or ''}"}, *messages[1:]]


def instructions(tool_use: ToolUse) -> str:
    """What functions there are and how to call one, for a model."""
    functions = [_described(tool["function"]) for tool in tool_use.tools]
    if tool_use.function is not None:
        when = f"Call the function {tool_use.function} now, and write nothing else."
    elif tool_use.is_required:
        when = "Call a function now, and write nothing else."
    else:
        when = "If no function is needed, answer in plain text."
    several = (
        "Several calls may follow each other." if tool_use.is_parallel else "Make no more than one call."
    )
    return "\n".join(
        [
            "You can call functions. Each of these lines describes one:",
            *functions,
            "To call a function, write its name and its arguments as JSON, in this form:",
            f'{CALL_BEGIN}{{"name": "the function\'s name", "arguments": {{"an argument": "its value"}}}}{CALL_END}',
            f"{several} What a function returns is told to you between <tool_response> and </tool_response>.",
            when,
        ]
    )


def _described(function: dict[str, Any]) -> str:
    known = {key: function[key] for key in ("name", "description", "parameters") if key in function}
    return json.dumps(known, ensure_ascii=False)


def render_as_text(messages: Messages) -> Messages:
    """Calls and results as text; results are a user's message, as in Qwen's template.

    Neighbors are put together: templates refuse two messages of a user in a row.
    """
    words: Messages = []
    is_after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        new = _in_words(message)
        if words and (is_result or is_after_result) and words[-1]["role"] == new["role"] == "user":
            words[-1] = words[-1] | {"content": f"{words[-1]['content']}\n{new['content']}"}
        else:
            words.append(new)
        is_after_result = is_result
    return words


def _in_words(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [_call_in_words(call["function"]) for call in message["tool_calls"]]
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return others | {"content": "\n".join([content, *calls] if content else calls)}


def _call_in_words(function: dict[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{CALL_BEGIN}{json.dumps(call, ensure_ascii=False)}{CALL_END}"
