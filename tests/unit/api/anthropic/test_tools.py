"""`tools` and `tool_choice`: functions for the model, and tools that this server does not run."""

from __future__ import annotations

from typing import Any

import pytest

from common.protocol import ToolUse
from tests.unit.api.anthropic.test_request import refusal, request

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
F = {"name": "f", "description": "F.", "input_schema": SCHEMA}
G = {"name": "g", "input_schema": SCHEMA, "type": "custom", "cache_control": {"type": "ephemeral"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}


def functions(use: ToolUse | None) -> list[Any]:
    assert use is not None
    return [tool["function"] for tool in use.tools]


def test_tools_become_functions() -> None:
    """With name, description and schema; `type` may be absent; `cache_control` has no effect."""
    found = request(tools=[F, G])
    assert functions(found.tool_use) == [
        {"name": "f", "description": "F.", "parameters": SCHEMA},
        {"name": "g", "parameters": SCHEMA},
    ]
    assert found.tool_use is not None
    assert (found.tool_use.is_required, found.tool_use.function, found.tool_use.is_parallel) == (
        False,
        None,
        True,
    )
    assert found.ignored == []


@pytest.mark.parametrize("schema", [None, {}, {"properties": None}, {"type": None, "required": None}])
def test_a_tool_without_input(schema: Any) -> None:
    """Null means absent; what is left is a closed object."""
    [function] = functions(request(tools=[{"name": "f", "input_schema": schema}]).tool_use)
    assert function["parameters"] == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (False, None, True)),
        ({"type": "auto"}, (False, None, True)),
        ("any", (True, None, True)),
        ({"type": "any"}, (True, None, True)),
        ({"type": "any", "disable_parallel_tool_use": True}, (True, None, False)),
        ({"type": "auto", "disable_parallel_tool_use": True}, (False, None, False)),
        ({"type": "tool", "name": "g"}, (True, "g", False)),
    ],
)
def test_tool_choice(choice: Any, expected: Any) -> None:
    """Whether a call is required, of which tool, and whether there may be several."""
    use = request(tools=[F, G], tool_choice=choice).tool_use
    assert use is not None
    assert (use.is_required, use.function, use.is_parallel) == expected


def test_no_tools() -> None:
    """`none` offers none of them; without tools, only a choice that forces one is refused."""
    assert request(tools=[F], tool_choice={"type": "none"}).tool_use is None
    for tools in (None, []):
        assert request(tools=tools, tool_choice={"type": "auto"}).tool_use is None
        assert refusal(tools=tools, tool_choice={"type": "any"}).param == "tool_choice"
    assert refusal(tools=[F], tool_choice={"type": "tool", "name": "x"}).param == "tool_choice.name"
    assert refusal(tools=[F], tool_choice={"type": "tool"}).param == "tool_choice.name"
    assert refusal(tools=[F], tool_choice={"type": "required"}).param == "tool_choice.type"


def test_tools_of_anthropic_servers() -> None:
    """Skipped and named next to others; refused if nothing else is offered, or if one of them is forced."""
    found = request(tools=[SEARCH, F])
    assert [function["name"] for function in functions(found.tool_use)] == ["f"]
    assert set(found.ignored) == {"tools[0]", "tools[0].max_uses"}
    assert refusal(tools=[SEARCH]).param == "tools[0].type"
    assert "web_search_20250305" in refusal(tools=[SEARCH]).message
    assert (
        refusal(tools=[F, SEARCH], tool_choice={"type": "tool", "name": "web_search"}).param
        == "tools[1].type"
    )
    assert request(tools=[SEARCH], tool_choice={"type": "none"}).tool_use is None


def test_tools_that_the_client_runs() -> None:
    """The shell and the editor are named by type only; they get the schema that this type has."""
    tools = [{"type": "bash_20250124", "name": "bash"}, {"type": "text_editor_20250728", "name": "edit"}]
    shell, editor = functions(request(tools=tools).tool_use)
    assert shell["name"] == "bash"
    assert set(shell["parameters"]["properties"]) == {"command", "restart"}
    assert editor["name"] == "edit"
    assert editor["parameters"]["properties"]["command"]["enum"] == [
        "view",
        "create",
        "str_replace",
        "insert",
    ]


def test_mcp_servers() -> None:
    """Named next to tools, refused without: this server calls no others."""
    servers = [{"type": "url", "url": "https://mcp.example", "name": "m"}]
    assert request(tools=[F], mcp_servers=servers).ignored == ["mcp_servers"]
    assert refusal(mcp_servers=servers).param == "mcp_servers"
    assert request(mcp_servers=[]).ignored == []


def test_other_fields_of_a_tool() -> None:
    """Examples are part of the description; what has no effect is named, but not what is always so."""
    tool = F | {
        "input_examples": [{"a": "x"}],
        "defer_loading": True,
        "allowed_callers": ["code_execution_20250825"],
        "eager_input_streaming": True,
    }
    found = request(tools=[tool])
    assert functions(found.tool_use)[0]["description"] == 'F.\nExample input: {"a":"x"}'
    assert found.ignored == ["tools[0].defer_loading", "tools[0].allowed_callers"]


@pytest.mark.parametrize(
    ("tool", "where"),
    [
        ({"input_schema": SCHEMA}, "name"),
        ({"name": "a b", "input_schema": SCHEMA}, "name"),
        ({"name": "", "input_schema": SCHEMA}, "name"),
        ({"name": "f", "input_schema": {"type": "string"}}, "input_schema.type"),
        ({"name": "f", "input_schema": {"properties": []}}, "input_schema.properties"),
        (
            {"name": "f", "strict": True, "input_schema": {"properties": {"a": {"$ref": "https://x"}}}},
            "input_schema",
        ),
    ],
)
def test_wrong_tools(tool: Any, where: str) -> None:
    """A 400 that names the field."""
    assert refusal(tools=[tool]).param == f"tools[0].{where}"


def test_names() -> None:
    """Those of agents may be long and have dots; two different tools cannot have the same, but one may be there twice."""
    name = "mcp__server.example:8080__" + "x" * 100
    assert functions(request(tools=[F | {"name": name}]).tool_use)[0]["name"] == name
    assert len(functions(request(tools=[F, F]).tool_use)) == 1
    assert refusal(tools=[F, F | {"description": "Other."}]).param == "tools[1].name"
    assert refusal(tools=[F | {"name": f"f{i}"} for i in range(513)]).param == "tools"
