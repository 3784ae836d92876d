"""Tools, calls and results as plain messages, for models whose chat template does not support them. Pure.

The tools become a system message that describes them and explains how to call them; earlier calls and results become text in the
same format: that of Hermes and Qwen models, which `common.schema.grammar` enforces and `worker.text.tool_calls` parses.
"""

from __future__ import annotations

import json
from typing import Any

from common.protocol import ToolUse
from common.schema.grammar import CALL_BEGIN, CALL_END
from worker.text.templates.support import Messages

MARKERS = (CALL_BEGIN, CALL_END, "<tool_response>", "</tool_response>")
"""Of calls and results as text."""


def add_tool_instructions(messages: Messages, tool_use: ToolUse) -> Messages:
    """Add the description of the tools to the system message at the beginning, or as one."""
    text = instructions(tool_use)
    if messages and messages[0]["role"] == "system":
        text = f"{messages[0].get('content') or ''}\n\n{text}".strip()
        messages = messages[1:]
    return [{"role": "system", "content": text}, *messages]


def instructions(tool_use: ToolUse) -> str:
    """The text that describes the tools to the model and explains how to call one."""
    functions = [_describe(tool["function"]) for tool in tool_use.tools]
    if tool_use.function is not None:
        when = f"Call the function {tool_use.function} now, and write nothing else."
    elif tool_use.is_required:
        when = "Call a function now, and write nothing else."
    else:
        when = "If no function is needed, answer in plain text."
    several = (
        "Several calls may follow each other."
        if tool_use.is_parallel and tool_use.function is None
        else "Make no more than one call."
    )
    return "\n".join(
        [
            "You can call functions. Each of these lines describes one:",
            *functions,
            "To call a function, write its name and its arguments as JSON, in this form:",
            # No example of arguments: small models copy it.
            f'{CALL_BEGIN}{{"name": <its name>, "arguments": <an object that matches its parameters>}}{CALL_END}',
            f"{several} What a function returns is told to you between <tool_response> and </tool_response>.",
            when,
        ]
    )


def _describe(function: dict[str, Any]) -> str:
    fields = {key: function[key] for key in ("name", "description", "parameters") if key in function}
    return json.dumps(fields, ensure_ascii=False)


def render_as_text(messages: Messages) -> Messages:
    """Render calls and results as text; a result becomes a user message, as in Qwen's template.

    Consecutive user messages are joined: some templates refuse two in a row.
    """
    turns: list[Messages] = []
    is_after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        new = _render_message(message)
        if turns and (is_result or is_after_result) and turns[-1][-1]["role"] == new["role"] == "user":
            turns[-1].append(new)
        else:
            turns.append([new])
        is_after_result = is_result
    return [
        turn[0] if len(turn) == 1 else turn[0] | {"content": "\n".join(str(m["content"]) for m in turn)}
        for turn in turns
    ]


def _render_message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [_render_call(call["function"]) for call in message["tool_calls"]]
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return others | {"content": "\n".join([content, *calls] if content else calls)}


def _render_call(function: dict[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{CALL_BEGIN}{json.dumps(call, ensure_ascii=False)}{CALL_END}"
