"""Grammars of function calls: one or several, forced or not, next to text or to JSON."""

from __future__ import annotations

from typing import Any

import pytest

from common.protocol import ToolUse
from common.schema import grammar
from tests.unit.common.schema.matching import accepts

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get", "parameters": CITY}},
    {"type": "function", "function": {"name": "get-all_2"}},
]
GET = '{"name": "get", "arguments": {"city": "Paris"}}'
ALL = '{"name":"get-all_2","arguments":{}}'


@pytest.mark.parametrize(
    "answer",
    [
        "Hello.",
        "",
        "2 < 3 and <tool_cal",
        f"<tool_call>{GET}</tool_call>",
        f"<tool_call>\n{GET}\n</tool_call>",
        f"<tool_call>{ALL}</tool_call>\n<tool_call>\n{GET}\n</tool_call>",
        f"Let me look.\n<tool_call>{GET}</tool_call>",
    ],
)
def test_text_or_calls(answer: str) -> None:
    """If no call is required: text, calls, or text and then calls."""
    text = grammar.for_tool_calls(ToolUse(tools=TOOLS))
    assert grammar.check(text) is None
    assert accepts(text, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>",
        "<tool_call> I shall call",
        f"<tool_call>{GET}",
        f"<tool_call>{GET}</tool_call> and text",
        "text <tool_call> text",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get-all_2", "arguments": {"city": "Paris"}}</tool_call>',
    ],
)
def test_a_marker_begins_a_call(answer: str) -> None:
    """After the begin marker, only a complete call of a known function with valid arguments is accepted."""
    assert not accepts(grammar.for_tool_calls(ToolUse(tools=TOOLS)), answer)


def test_required_call() -> None:
    """If a call is required, text is refused."""
    text = grammar.for_tool_calls(ToolUse(tools=TOOLS, is_required=True))
    assert grammar.check(text) is None
    assert accepts(text, f"<tool_call>{GET}</tool_call><tool_call>{ALL}</tool_call>")
    assert not accepts(text, "Hello.")
    assert not accepts(text, "")


def test_named_function() -> None:
    """If a function is named, only that one may be called."""
    text = grammar.for_tool_calls(ToolUse(tools=TOOLS, function="get-all_2"))
    assert accepts(text, f"<tool_call>{ALL}</tool_call>")
    assert not accepts(text, f"<tool_call>{ALL}</tool_call><tool_call>{ALL}</tool_call>")
    assert not accepts(text, f"<tool_call>{GET}</tool_call>")
    assert not accepts(text, "Hello.")


@pytest.mark.parametrize("is_required", [False, True])
def test_the_number_of_calls_is_bounded(is_required: bool) -> None:
    """Many calls may follow each other, but a model that repeats one comes to an end."""
    text = grammar.for_tool_calls(ToolUse(tools=TOOLS, is_required=is_required))
    assert accepts(text, f"<tool_call>{ALL}</tool_call>" * 16)
    assert not accepts(text, f"<tool_call>{ALL}</tool_call>" * 17)


def test_not_parallel() -> None:
    """Without parallel calls, the answer ends after one call."""
    text = grammar.for_tool_calls(ToolUse(tools=TOOLS, is_parallel=False))
    assert accepts(text, f"<tool_call>{GET}</tool_call>")
    assert not accepts(text, f"<tool_call>{GET}</tool_call><tool_call>{ALL}</tool_call>")


def test_calls_or_json() -> None:
    """With a response format and tools: calls, or the format, but no free text."""
    answer = grammar.for_json_schema({"type": "array", "items": {"type": "integer"}})
    text = grammar.for_tool_calls(ToolUse(tools=TOOLS), answer=answer)
    assert grammar.check(text) is None
    assert accepts(text, "[1, 2]")
    assert accepts(text, f"<tool_call>{GET}</tool_call>")
    assert not accepts(text, "Hello.")
    assert not accepts(text, "{}")


def test_references_stay_within_their_function() -> None:
    """Each function's schema is a separate document: the same name under $defs has another meaning in each."""

    def tool(name: str, kind: str) -> dict[str, Any]:
        schema = {
            "type": "object",
            "properties": {"v": {"$ref": "#/$defs/V"}},
            "required": ["v"],
            "$defs": {"V": {"type": kind}},
        }
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    text = grammar.for_tool_calls(
        ToolUse(tools=[tool("a", "integer"), tool("b", "boolean")], is_required=True)
    )
    assert accepts(text, '<tool_call>{"name": "b", "arguments": {"v": true}}</tool_call>')
    assert not accepts(text, '<tool_call>{"name": "a", "arguments": {"v": true}}</tool_call>')


def test_arguments_are_an_object() -> None:
    """Parameters without a type mean an object."""
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}},
        }
    ]
    text = grammar.for_tool_calls(ToolUse(tools=tools, is_required=True))
    assert accepts(text, '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')
    assert not accepts(text, '<tool_call>{"name": "f", "arguments": 1}</tool_call>')


def test_tools_schemas_are_checked() -> None:
    """A function whose parameters no value matches is refused like any other schema."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/nowhere"}}}]
    assert "#/nowhere" in (grammar.check(grammar.for_tool_calls(ToolUse(tools=tools))) or "")
