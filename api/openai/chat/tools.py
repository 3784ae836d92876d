"""The tool fields of a chat request: `tools`, `tool_choice`, `parallel_tool_calls`, and the deprecated `functions` and
`function_call`.

Parses them into `common.protocol.ToolUse`. Used by `api.openai.chat.request`. Must not know models.
https://platform.openai.com/docs/guides/function-calling
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Protocol

import msgspec

from api.http.json_body import full_match
from common.errors import RequestError, invalid
from common.protocol import ToolUse
from common.schema import function_schema, limits

MAX_TOOLS = 128

MAX_LEVELS = 200
"""Of a function's parameters; those of a strict function have `limits.MAX_LEVELS`."""

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function without parameters, for templates and grammars."""

FunctionName = Annotated[str, full_match("[a-zA-Z0-9_-]{1,64}")]


class FunctionDefinition(msgspec.Struct, frozen=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """`custom` tools, whose input is not JSON, are not supported."""

    type: str
    function: FunctionDefinition | None = None


class NamedFunction(msgspec.Struct, frozen=True):
    name: str


class AllowedTool(msgspec.Struct, frozen=True):
    type: str
    function: NamedFunction | None = None


class AllowedTools(msgspec.Struct, frozen=True):
    """A subset of the tools; the others are not offered to the model."""

    mode: str
    tools: list[AllowedTool]


class ToolChoice(msgspec.Struct, frozen=True):
    """`allowed_tools` has its definition in the field of that name."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class ToolFields(Protocol):
    """The fields of a request that are used here."""

    @property
    def tools(self) -> list[Tool] | None: ...
    @property
    def tool_choice(self) -> str | ToolChoice | None: ...
    @property
    def parallel_tool_calls(self) -> bool | None: ...
    @property
    def functions(self) -> list[FunctionDefinition] | None: ...
    @property
    def function_call(self) -> str | NamedFunction | None: ...


class _Choice(msgspec.Struct, frozen=True):
    """The normalized `tool_choice` or `function_call`.

    Attributes:
        names: The functions that may be called.
        function: The one that must be called.
    """

    names: list[str]
    is_none: bool = False
    is_required: bool = False
    function: str | None = None


def tool_use(chat: ToolFields) -> ToolUse | None:
    """The functions that may be called; None if there are none or calls are not allowed.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    if chat.functions:
        return _legacy_tool_use(chat, chat.functions)
    _check_alone(chat)
    if not chat.tools:
        return None
    definitions = [_definition(tool, f"tools[{i}]") for i, tool in enumerate(chat.tools)]
    tools = _checked(definitions, "tools", ".function")
    choice = _choice(chat.tool_choice, [function.name for function in definitions])
    if choice.is_none:
        return None
    return ToolUse(
        tools=[tool for tool in tools if tool["function"]["name"] in choice.names],
        is_required=choice.is_required,
        function=choice.function,
        # A named function is called once: otherwise a model that may write nothing else would repeat the call.
        is_parallel=chat.parallel_tool_calls is not False and choice.function is None,
    )


def uses_functions(chat: ToolFields) -> bool:
    """Whether the request has the deprecated `functions`, so that the answer has `function_call`."""
    return bool(chat.functions)


def _legacy_tool_use(chat: ToolFields, functions: list[FunctionDefinition]) -> ToolUse | None:
    for name in ("tools", "tool_choice", "parallel_tool_calls"):
        if getattr(chat, name) not in (None, []):
            raise invalid(f"`{name}` cannot be combined with the deprecated `functions`.", name)
    tools = _checked(functions, "functions", "")
    call = chat.function_call
    if isinstance(call, NamedFunction):
        _check_known(call.name, [function.name for function in functions], "function_call.name")
        return ToolUse(tools=tools, is_required=True, function=call.name, is_parallel=False)
    if call not in (None, "none", "auto"):
        raise invalid(
            "`function_call` must be `none`, `auto`, or an object with the name of a function.",
            "function_call",
        )
    return None if call == "none" else ToolUse(tools=tools, is_parallel=False)


def _check_alone(chat: ToolFields) -> None:
    """Refuse fields that require `tools` or `functions`.

    Raises:
        RequestError: 400.
    """
    if chat.function_call not in (None, "none", "auto"):
        raise invalid("`function_call` is only allowed with `functions`.", "function_call")
    if chat.tools:
        return
    if chat.tool_choice not in (None, "none", "auto"):
        raise invalid("`tool_choice` is only allowed with `tools`.", "tool_choice")
    if chat.parallel_tool_calls is not None:
        raise invalid("`parallel_tool_calls` is only allowed with `tools`.", "parallel_tool_calls")


def _definition(tool: Tool, path: str) -> FunctionDefinition:
    if tool.type != "function":
        raise invalid(
            f"`{path}.type` must be `function`; other tools are not supported.",
            f"{path}.type",
            "unsupported_parameter" if tool.type == "custom" else None,
        )
    if tool.function is None:
        raise invalid(f"`{path}.function` is missing.", f"{path}.function")
    return tool.function


def _checked(functions: list[FunctionDefinition], param: str, inside: str) -> list[dict[str, Any]]:
    """The functions as tools.

    Args:
        inside: The path of the function in an item of `param`.

    Raises:
        RequestError: 400; there are too many, two have the same name, parameters are not an object's schema or are nested
            too deeply, or those of a strict function cannot be expressed as a grammar.
    """
    if len(functions) > MAX_TOOLS:
        raise invalid(f"`{param}` has {len(functions)} functions; at most {MAX_TOOLS} are allowed.", param)
    names = set()
    tools = []
    for i, function in enumerate(functions):
        path = f"{param}[{i}]{inside}"
        if function.name in names:
            raise invalid(f"`{param}` has two functions named `{function.name}`.", f"{path}.name")
        names.add(function.name)
        plain = _plain(function, f"{path}.parameters")
        if function.strict and (complaint := function_schema.refusal(plain)):
            raise invalid(
                f"`{path}.parameters` is not supported with `strict`: {complaint}", f"{path}.parameters"
            )
        tools.append({"type": "function", "function": plain})
    return tools


def _plain(function: FunctionDefinition, path: str) -> dict[str, Any]:
    """A definition in the form that templates and grammars expect; missing parameters become an empty object's schema."""
    parameters = function.parameters or _NO_PARAMETERS
    if parameters.get("type", "object") != "object":
        raise invalid(f"`{path}` must be a schema of an object: its `type` must be `object`.", path)
    if limits.is_deeper(parameters, MAX_LEVELS):
        raise invalid(f"`{path}` has more than {MAX_LEVELS} levels.", path)
    if not isinstance(parameters.get("properties", {}), dict):
        raise invalid(f"`{path}.properties` must be an object.", f"{path}.properties")
    plain: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        plain["description"] = function.description
    plain["parameters"] = parameters
    if function.strict is not None:
        plain["strict"] = function.strict
    return plain


def _choice(given: str | ToolChoice | None, names: list[str]) -> _Choice:
    if given is None or isinstance(given, str):
        if given not in (None, "none", "auto", "required"):
            raise invalid(
                "`tool_choice` must be `none`, `auto`, `required`, or an object that names a function.",
                "tool_choice",
            )
        return _Choice(names, is_none=given == "none", is_required=given == "required")
    if given.type == "allowed_tools":
        return _allowed(given.allowed_tools, names)
    if given.type != "function":
        raise invalid("`tool_choice.type` must be `function` or `allowed_tools`.", "tool_choice.type")
    if given.function is None:
        raise invalid("`tool_choice.function` is missing.", "tool_choice.function")
    _check_known(given.function.name, names, "tool_choice.function.name")
    return _Choice(names, is_required=True, function=given.function.name)


def _allowed(allowed: AllowedTools | None, names: list[str]) -> _Choice:
    path = "tool_choice.allowed_tools"
    if allowed is None:
        raise invalid(f"`{path}` is missing.", path)
    if allowed.mode not in ("auto", "required"):
        raise invalid(f"`{path}.mode` must be `auto` or `required`.", f"{path}.mode")
    if not allowed.tools:
        raise invalid(f"`{path}.tools` must have at least one tool.", f"{path}.tools")
    chosen = []
    for i, tool in enumerate(allowed.tools):
        if tool.type != "function" or tool.function is None:
            raise invalid(f"`{path}.tools[{i}]` must name a function.", f"{path}.tools[{i}]")
        _check_known(tool.function.name, names, f"{path}.tools[{i}].function.name")
        chosen.append(tool.function.name)
    return _Choice(chosen, is_required=allowed.mode == "required")


def _check_known(name: str, names: Iterable[str], param: str) -> None:
    if name not in names:
        raise _unknown(name, param)


def _unknown(name: str, param: str) -> RequestError:
    return invalid(f"`{param}` is `{name[:64]}`, which is not the name of any of the functions.", param)
