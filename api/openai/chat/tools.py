"""The fields of a chat request that are about functions: `tools`, `tool_choice`, `parallel_tool_calls`, and their deprecated
predecessors `functions` and `function_call`.

Parsed and checked into the wire's `ToolUse`; used by `chat_request`. Knows the OpenAI API description and no model.
https://platform.openai.com/docs/guides/function-calling
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Protocol

import msgspec

from api.openai import request_fields as fields
from common.errors import RequestError, invalid
from common.protocol import ToolUse
from common.schema import function_schema

MAX_TOOLS = 128

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
"""Templates and grammars want to be told."""

FunctionName = Annotated[str, fields.whole("[a-zA-Z0-9_-]{1,64}")]


class FunctionDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """`custom` tools, whose input is no JSON, are not supported."""

    type: str
    function: FunctionDefinition | None = None


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class AllowedTool(msgspec.Struct, frozen=True):
    type: str
    function: NamedFunction | None = None


class AllowedTools(msgspec.Struct, frozen=True):
    """Some of the tools; the others are as if they were not there."""

    mode: str
    tools: list[AllowedTool]


class ToolChoice(msgspec.Struct, frozen=True):
    """`allowed_tools` holds what it is about in a field of that name."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class ToolFields(Protocol):
    """What is read of a request."""

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
    """What `tool_choice` and `function_call` come down to.

    Attributes:
        names: The functions that may be called.
        function: The one that has to be.
    """

    names: list[str]
    is_none: bool = False
    is_required: bool = False
    function: str | None = None


def tool_use(chat: ToolFields) -> ToolUse | None:
    """The functions that may be called; None if there are none, or none may be.

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
        # A named function is called once: a model that may not write anything else would go on calling it.
        is_parallel=chat.parallel_tool_calls is not False and choice.function is None,
    )


def uses_functions(chat: ToolFields) -> bool:
    """Whether the request has the deprecated `functions`, so that the answer has `function_call`."""
    return bool(chat.functions)


def _legacy_tool_use(chat: ToolFields, functions: list[FunctionDefinition]) -> ToolUse | None:
    for name in ("tools", "tool_choice", "parallel_tool_calls"):
        if getattr(chat, name) not in (None, []):
            raise invalid(f"`{name}` and the deprecated `functions` do not go together.", name)
    tools = _checked(functions, "functions", "")
    call = chat.function_call
    if isinstance(call, NamedFunction):
        _check_known(call.name, [function.name for function in functions], "function_call.name")
        return ToolUse(tools=tools, is_required=True, function=call.name, is_parallel=False)
    if call not in (None, "none", "auto"):
        raise invalid(
            "`function_call` must be `none`, `auto`, or an object with a function's name.", "function_call"
        )
    return None if call == "none" else ToolUse(tools=tools, is_parallel=False)


def _check_alone(chat: ToolFields) -> None:
    """Refuse what makes no sense without the functions that it is about.

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


def _definition(tool: Tool, place: str) -> FunctionDefinition:
    if tool.type != "function":
        raise invalid(
            f"`{place}.type` must be `function`; other tools are not supported.",
            f"{place}.type",
            "unsupported_parameter" if tool.type == "custom" else None,
        )
    if tool.function is None:
        raise invalid(f"`{place}.function` is missing.", f"{place}.function")
    return tool.function


def _checked(functions: list[FunctionDefinition], param: str, inside: str) -> list[dict[str, Any]]:
    """The functions as tools.

    Args:
        inside: Where a function is in an item of `param`.

    Raises:
        RequestError: 400; there are too many, two have the same name, arguments could not be an object, or those of a
            strict function are beyond what a grammar can say.
    """
    if len(functions) > MAX_TOOLS:
        raise invalid(f"`{param}` has {len(functions)} functions; at most {MAX_TOOLS} are allowed.", param)
    names = set()
    tools = []
    for i, function in enumerate(functions):
        place = f"{param}[{i}]{inside}"
        if function.name in names:
            raise invalid(f"`{param}` has two functions named `{function.name}`.", f"{place}.name")
        names.add(function.name)
        plain = _plain(function, f"{place}.parameters")
        if function.strict and (complaint := function_schema.refusal(plain)):
            raise invalid(f"`{place}.parameters` cannot be made sure of: {complaint}", f"{place}.parameters")
        tools.append({"type": "function", "function": plain})
    return tools


def _plain(function: FunctionDefinition, place: str) -> dict[str, Any]:
    """A definition as templates and grammars read it: parameters that were left out are none."""
    parameters = function.parameters or _NO_PARAMETERS
    if parameters.get("type", "object") != "object":
        raise invalid(f"`{place}` must be the schema of an object: `type` must be `object`.", place)
    if not isinstance(parameters.get("properties", {}), dict):
        raise invalid(f"`{place}.properties` must be an object.", f"{place}.properties")
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
    place = "tool_choice.allowed_tools"
    if allowed is None:
        raise invalid(f"`{place}` is missing.", place)
    if allowed.mode not in ("auto", "required"):
        raise invalid(f"`{place}.mode` must be `auto` or `required`.", f"{place}.mode")
    if not allowed.tools:
        raise invalid(f"`{place}.tools` must have at least one tool.", f"{place}.tools")
    chosen = []
    for i, tool in enumerate(allowed.tools):
        if tool.type != "function" or tool.function is None:
            raise invalid(f"`{place}.tools[{i}]` must name a function.", f"{place}.tools[{i}]")
        _check_known(tool.function.name, names, f"{place}.tools[{i}].function.name")
        chosen.append(tool.function.name)
    return _Choice(chosen, is_required=allowed.mode == "required")


def _check_known(name: str, names: Iterable[str], param: str) -> None:
    if name not in names:
        raise _unknown(name, param)


def _unknown(name: str, param: str) -> RequestError:
    return invalid(f"`{param}` is `{name[:64]}`, which none of the functions is named.", param)
