"""`tools` and `tool_choice`, as `common.protocol.ToolUse`.

Tools that Anthropic's servers run are skipped and named, unless nothing else is offered or one of them is forced. Used by
`api.anthropic.messages.request`. Must not know models. https://platform.claude.com/docs/en/agents-and-tools/tool-use/overview
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from api.anthropic.messages.blocks import Skipped
from api.anthropic.messages.client_tools import known_tool
from common.errors import RequestError, invalid
from common.protocol import ToolUse
from common.schema import function_schema, limits

MAX_TOOLS = 512
"""Claude Code sends those of all its MCP servers."""

MAX_LEVELS = 200
"""Of an input schema; those of a strict tool have `limits.MAX_LEVELS`."""

_NAME = re.compile(r"[a-zA-Z0-9_.:/@-]{1,256}")
"""Anthropic allows letters, digits, dashes and underscores, and 128 characters; agents generate such names from those of servers."""

_NO_INPUT = {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of the client's, or one that Anthropic defines, which `type` names with its version.

    `cache_control` has no effect, as in blocks, nor has `eager_input_streaming`: inputs are always sent while they are generated.
    """

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """`auto`, `any`, `tool` with a name, or `none`."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


def tool_use(tools: list[Tool] | None, given: str | ToolChoice | None, skipped: Skipped) -> ToolUse | None:
    """The tools that may be called; None if there are none or calls are not allowed.

    Args:
        skipped: Gets the paths of what is not served.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    choice = ToolChoice(type=given) if isinstance(given, str) else given or ToolChoice(type="auto")
    if choice.type not in ("auto", "any", "tool", "none"):
        raise invalid("`tool_choice.type` must be `auto`, `any`, `tool` or `none`.", "tool_choice.type")
    functions = _functions(tools or [], skipped)
    is_forced = choice.type in ("any", "tool")
    if not functions:
        if tools and choice.type != "none":
            raise _unavailable(tools[0], "tools[0].type")
        if is_forced:
            raise invalid("`tool_choice` is only allowed with `tools`.", "tool_choice")
        return None
    if choice.type == "none":
        return None
    name = _forced_name(choice, functions, tools or []) if choice.type == "tool" else None
    return ToolUse(
        tools=[{"type": "function", "function": function} for function in functions.values()],
        is_required=is_forced,
        function=name,
        # A named tool is called once: otherwise a model that may write nothing else would repeat the call.
        is_parallel=not choice.disable_parallel_tool_use and name is None,
    )


def _forced_name(choice: ToolChoice, functions: dict[str, dict[str, Any]], tools: list[Tool]) -> str:
    if choice.name in functions:
        return choice.name
    for i, tool in enumerate(tools):
        if tool.name == choice.name and tool.name is not None:
            raise _unavailable(tool, f"tools[{i}].type")
    raise invalid(
        f"`tool_choice.name` must be the name of one of the tools, not `{(choice.name or '')[:64]}`.",
        "tool_choice.name",
    )


def _unavailable(tool: Tool, path: str) -> RequestError:
    return invalid(
        f"`{path}`: tools of type `{(tool.type or '')[:64]}` are run by Anthropic's servers and not available here; "
        "only tools with an `input_schema` are.",
        path,
        "unsupported_tool",
    )


def _functions(tools: list[Tool], skipped: Skipped) -> dict[str, dict[str, Any]]:
    """The tools that can be served as functions, by name.

    Raises:
        RequestError: 400.
    """
    if len(tools) > MAX_TOOLS:
        raise invalid(f"`tools` has {len(tools)} tools; at most {MAX_TOOLS} are allowed.", "tools")
    functions: dict[str, dict[str, Any]] = {}
    for i, given in enumerate(tools):
        path = f"tools[{i}]"
        tool = given
        if given.type not in (None, "custom") and given.input_schema is None:
            known = known_tool(given.type, given.name)
            if known is None:
                skipped.add(path)
                continue
            tool = msgspec.structs.replace(given, **known)
        function = _function(tool, path, skipped)
        if functions.get(function["name"], function) != function:
            raise invalid(f"`tools` has two tools named `{function['name']}`.", f"{path}.name")
        functions[function["name"]] = function
    return functions


def _function(tool: Tool, path: str, skipped: Skipped) -> dict[str, Any]:
    """A tool in the form that templates and grammars expect.

    Raises:
        RequestError: 400; its name or its schema is wrong, or a strict tool's schema cannot be expressed as a grammar.
    """
    if tool.name is None or not _NAME.fullmatch(tool.name):
        raise invalid(
            f"`{path}.name` must have 1 to 256 letters, digits or characters of `_-.:/@`.",
            f"{path}.name",
        )
    if tool.defer_loading:  # it is loaded now: nothing here could load it later
        skipped.add(f"{path}.defer_loading")
    if tool.allowed_callers is not None and "direct" not in tool.allowed_callers:
        skipped.add(f"{path}.allowed_callers")
    function: dict[str, Any] = {"name": tool.name}
    examples = [msgspec.json.encode(example).decode() for example in tool.input_examples or []]
    lines = [tool.description or "", *(f"Example input: {example}" for example in examples)]
    if tool.description is not None or examples:
        function["description"] = "\n".join(line for line in lines if line)
    function["parameters"] = _parameters(tool.input_schema, f"{path}.input_schema")
    if tool.strict is not None:
        function["strict"] = tool.strict
    if tool.strict and (complaint := function_schema.refusal(function)):
        raise invalid(
            f"`{path}.input_schema` is not supported with `strict`: {complaint}", f"{path}.input_schema"
        )
    return function


def _parameters(schema: dict[str, Any] | None, path: str) -> dict[str, Any]:
    """A schema of an object; null means that a keyword is absent."""
    schema = {
        key: value
        for key, value in (schema or {}).items()
        if value is not None or key not in ("properties", "required", "type")
    }
    if not schema:
        return _NO_INPUT
    if schema.get("type", "object") != "object":
        raise invalid(f"`{path}` must be a schema of an object: its `type` must be `object`.", f"{path}.type")
    if limits.is_deeper(schema, MAX_LEVELS):
        raise invalid(f"`{path}` has more than {MAX_LEVELS} levels.", path)
    if not isinstance(schema.get("properties", {}), dict):
        raise invalid(f"`{path}.properties` must be an object.", f"{path}.properties")
    return {"type": "object"} | schema
