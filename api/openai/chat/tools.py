"""The tool fields of a chat request: `tools`, `tool_choice`, `parallel_tool_calls`, and the deprecated `functions` and
`function_call`.

Parses them into `common.protocol.ToolUse`. Used by `api.openai.chat.request`. Must not know models.
https://platform.openai.com/docs/guides/function-calling
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import msgspec

from api.openai.fields.custom_tools import InputFormat, custom_function
from api.openai.fields.functions import MAX_TOOLS, FunctionDefinition, FunctionName, checked_function
from common.errors import RequestError, invalid
from common.protocol import ToolUse


class CustomDefinition(msgspec.Struct, frozen=True):
    """A tool whose input is plain text."""

    name: FunctionName
    description: str | None = None
    format: InputFormat | None = None


class Tool(msgspec.Struct, frozen=True):
    """A function, a custom tool, or a built-in tool, which is not supported.

    The definition may also stand in the tool itself, as in OpenAI's Responses API and Anthropic's API.
    """

    type: str | None = None
    function: FunctionDefinition | None = None
    custom: CustomDefinition | None = None
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    format: InputFormat | None = None


class NamedFunction(msgspec.Struct, frozen=True):
    name: str


class AllowedTool(msgspec.Struct, frozen=True):
    type: str | None = None
    function: NamedFunction | None = None
    custom: NamedFunction | None = None
    name: str | None = None


class AllowedTools(msgspec.Struct, frozen=True):
    """A subset of the tools; the others are not offered to the model."""

    mode: str
    tools: list[AllowedTool]


class ToolChoice(msgspec.Struct, frozen=True):
    """`allowed_tools` has its definition in the field of that name.

    Other types: `auto`, `none`, `required` and `any` as objects, and Anthropic's `tool`; a `name` next to the type is that of the function.
    """

    type: str | None = None
    function: NamedFunction | None = None
    custom: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None
    name: str | None = None


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


def tool_use(chat: ToolFields, ignored: list[str]) -> ToolUse | None:
    """The functions that may be called; None if there are none or calls are not allowed.

    Args:
        ignored: The paths of tools that are left out are added to it.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    if chat.functions:
        return _legacy_tool_use(chat, chat.functions, ignored)
    if chat.function_call not in (None, "none", "auto"):
        raise invalid("`function_call` is only allowed with `functions`.", "function_call")
    choice = _normalized(chat.tool_choice)
    if not chat.tools:
        if choice not in ("none", "auto"):
            raise invalid("`tool_choice` is only allowed with `tools`.", "tool_choice")
        return None
    definitions = _definitions(chat.tools, ignored)
    tools = _checked(definitions, "tools", ignored)
    chosen = _choice(choice, [definition.name for _, definition in definitions])
    if chosen.is_none:
        return None
    return ToolUse(
        tools=[tool for tool in tools if tool["function"]["name"] in chosen.names],
        is_required=chosen.is_required,
        function=chosen.function,
        # A named function is called once: otherwise a model that may write nothing else would repeat the call.
        is_parallel=chat.parallel_tool_calls is not False and chosen.function is None,
    )


def custom_names(chat: ToolFields) -> list[str]:
    """The names of the custom tools, for the rendering. The request was checked by `tool_use`."""
    definitions = _definitions(chat.tools or [], [])
    names = (each.name for _, each in definitions if isinstance(each, CustomDefinition))
    return list(dict.fromkeys(names))


def uses_functions(chat: ToolFields) -> bool:
    """Whether the request has the deprecated `functions`, so that the answer has `function_call`."""
    return bool(chat.functions)


def _legacy_tool_use(
    chat: ToolFields, functions: list[FunctionDefinition], ignored: list[str]
) -> ToolUse | None:
    if chat.tools:
        raise invalid("`tools` cannot be combined with the deprecated `functions`.", "tools")
    if chat.tool_choice not in (None, "none", "auto"):
        raise invalid("`tool_choice` cannot be combined with the deprecated `functions`.", "tool_choice")
    if chat.parallel_tool_calls:
        ignored.append("parallel_tool_calls")  # the deprecated form of an answer has one call
    definitions: _Definitions = [(f"functions[{i}]", function) for i, function in enumerate(functions)]
    tools = _checked(definitions, "functions", ignored)
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


_Definitions = list[tuple[str, FunctionDefinition | CustomDefinition]]
"""Functions and custom tools, with their paths in the request."""


_Definition = TypeVar("_Definition", FunctionDefinition, CustomDefinition)


def _definitions(tools: list[Tool], ignored: list[str]) -> _Definitions:
    """The functions and custom tools. Tools of other types are left out, but a request with only such tools is refused."""
    definitions: _Definitions = []
    others = []
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if tool.type == "custom":
            if tool.custom is None:
                definitions.append((path, _flat(tool, path, CustomDefinition, "custom")))
            else:
                definitions.append((f"{path}.custom", tool.custom))
        elif tool.type not in (None, "", "function"):
            others.append((path, str(tool.type)))
        elif tool.function is not None:
            definitions.append((f"{path}.function", tool.function))
        else:
            definitions.append((path, _flat(tool, path, FunctionDefinition, "function")))
    if others and not definitions:
        path, kind = others[0]
        raise invalid(
            f"`{path}.type` is `{kind[:64]}`; only tools of the types `function` and `custom` are supported.",
            f"{path}.type",
            "unsupported_parameter",
        )
    ignored += [path for path, _ in others]
    return definitions


def _flat(tool: Tool, path: str, kind: type[_Definition], field: str) -> _Definition:
    """A definition whose fields stand in the tool itself, instead of in the `field` of its type."""
    if tool.name is None:
        raise invalid(f"`{path}.{field}` is missing.", f"{path}.{field}")
    fields = {name: getattr(tool, name) for name in kind.__struct_fields__}
    try:
        return msgspec.convert(fields, kind, from_attributes=True)
    except msgspec.ValidationError:
        raise invalid(f"`{path}.name` is not the name of a function.", f"{path}.name") from None


def _checked(definitions: _Definitions, param: str, ignored: list[str]) -> list[dict[str, Any]]:
    """The functions as tools; a function that is given twice counts once.

    Raises:
        RequestError: 400; there are too many, two different ones have the same name, parameters are not an object's schema or are
            nested too deeply, or those of a strict function cannot be expressed as a grammar.
    """
    if len(definitions) > MAX_TOOLS:
        raise invalid(f"`{param}` has {len(definitions)} functions; at most {MAX_TOOLS} are allowed.", param)
    by_name: dict[str, dict[str, Any]] = {}
    for path, given in definitions:
        if isinstance(given, CustomDefinition):
            plain = custom_function(
                given.name, given.description, given.format, f"{path}.format", ignored.append
            )
        else:
            plain = checked_function(given, path)
        if plain != by_name.setdefault(given.name, plain):
            raise invalid(f"`{param}` has two functions named `{given.name}`.", f"{path}.name")
    return [{"type": "function", "function": plain} for plain in by_name.values()]


def _normalized(given: str | ToolChoice | None) -> str | ToolChoice:
    """As a string, if it is one of those that name no function."""
    kind = given.type if isinstance(given, ToolChoice) else given
    if kind in (None, "auto") and not (
        isinstance(given, ToolChoice) and (given.function or given.custom or given.name)
    ):
        return "auto"
    if kind in ("required", "any"):  # `any` is Anthropic's and Mistral's
        return "required"
    return "none" if kind == "none" else given or "auto"


def _choice(given: str | ToolChoice, names: list[str]) -> _Choice:
    """The functions that `tool_choice` allows.

    Args:
        given: As `_normalized` returns it.

    Raises:
        RequestError: 400.
    """
    if isinstance(given, str):
        if given not in ("none", "auto", "required"):
            raise invalid(
                "`tool_choice` must be `none`, `auto`, `required`, or an object that names a function.",
                "tool_choice",
            )
        return _Choice(names, is_none=given == "none", is_required=given == "required")
    if given.type == "allowed_tools":
        return _allowed(given.allowed_tools, names)
    if given.type not in (None, "function", "tool", "custom"):
        raise invalid(
            "`tool_choice.type` must be `function`, `custom` or `allowed_tools`.", "tool_choice.type"
        )
    if given.function is not None:
        name, path = given.function.name, "tool_choice.function.name"
    elif given.custom is not None:
        name, path = given.custom.name, "tool_choice.custom.name"
    elif given.name is not None:
        name, path = given.name, "tool_choice.name"
    else:
        raise invalid("`tool_choice.function` is missing.", "tool_choice.function")
    _check_known(name, names, path)
    return _Choice(names, is_required=True, function=name)


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
        kind = "custom" if tool.type == "custom" else "function"
        named = tool.function or tool.custom
        name = tool.name if named is None else named.name
        if tool.type not in (None, "function", "custom") or name is None:
            raise invalid(f"`{path}.tools[{i}]` must name a function or a custom tool.", f"{path}.tools[{i}]")
        _check_known(name, names, f"{path}.tools[{i}].{kind}.name")
        chosen.append(name)
    return _Choice(chosen, is_required=allowed.mode == "required")


def _check_known(name: str, names: Iterable[str], param: str) -> None:
    if name not in names:
        raise _unknown(name, param)


def _unknown(name: str, param: str) -> RequestError:
    return invalid(f"`{param}` is `{name[:64]}`, which is not the name of any of the tools.", param)
