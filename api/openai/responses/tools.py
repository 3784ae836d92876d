"""The tool fields of a response request: `tools`, `tool_choice` and `parallel_tool_calls`.

Functions, functions in namespaces and custom tools all become functions of `common.protocol.ToolUse`; `ToolNames` says what each of
them is to the client, for the rendering. Built-in tools are skipped and named, or refused if the model would have to use one.
https://platform.openai.com/docs/guides/function-calling. Must not know models.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

import msgspec

from api.openai.fields.custom_tools import InputFormat, custom_function
from api.openai.fields.functions import MAX_TOOLS, FunctionDefinition, FunctionName, checked_function
from api.openai.responses.typed import Ignored, missing, name_unknown_keys, typed
from common.errors import RequestError, invalid
from common.protocol import ToolUse

_MAX_NAME_CHARACTERS = 64
_NAME_SEPARATOR = "__"
_UNSAFE_CHARACTERS = re.compile(r"[^a-zA-Z0-9_-]")
_DIGEST_CHARACTERS = 8

_BUILT_IN = "it is a built-in tool of another server; functions and custom tools are supported"


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True, rename={"is_async": "async"}):
    """A function; `strict` enforces its schema. Fields typed `Any` are ignored, and named if they ask for something."""

    type: str
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: Any = None
    defer_loading: Any = None
    allowed_callers: Any = None
    is_async: Any = None


class CustomTool(msgspec.Struct, frozen=True, kw_only=True, rename={"is_async": "async"}):
    """A tool whose input is plain text."""

    type: str
    name: FunctionName
    description: str | None = None
    format: InputFormat | None = None
    defer_loading: Any = None
    allowed_callers: Any = None
    is_async: Any = None


class NamespaceTool(msgspec.Struct, frozen=True, kw_only=True):
    """Functions and custom tools with a common prefix."""

    type: str
    name: str
    tools: list[Any]
    description: str | None = None


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The name of a function as chat completions have it."""

    name: str | None = None


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that may be called, in the `tools` of `allowed_tools`."""

    type: str
    name: str | None = None
    namespace: str | None = None
    function: NamedFunction | None = None


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """All forms of it as an object; `tools` and `mode` belong to `allowed_tools`."""

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: str | None = None
    tools: list[Any] | None = None
    function: NamedFunction | None = None


class CalledTool(NamedTuple):
    """What a function of the model is to the client."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


class ParsedTools(NamedTuple):
    """The tools of a request.

    Attributes:
        use: For the worker; None if nothing can be called.
        called: By the function's name; without those that are the client's functions as they are.
    """

    use: ToolUse | None
    called: dict[str, CalledTool]


def flat_name(namespace: str | None, name: str) -> str:
    """The name of a namespace's function for the model, in the form that Codex uses where there are no namespaces."""
    if not namespace:
        return name
    flat = f"{namespace.rstrip('_')}{_NAME_SEPARATOR}{name.lstrip('_')}"
    safe = _UNSAFE_CHARACTERS.sub("_", flat)
    if safe == flat and len(flat) <= _MAX_NAME_CHARACTERS:
        return flat
    digest = hashlib.sha256(flat.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    return f"{safe[: _MAX_NAME_CHARACTERS - _DIGEST_CHARACTERS - 1]}_{digest}"


def parse_tools(
    given: list[tuple[Any, str]],
    choice: str | dict[str, Any] | None,
    *,
    is_parallel: bool,
    ignored: Ignored,
) -> ParsedTools:
    """The tools that may be called.

    Args:
        given: Definitions with their paths.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    offered = _Offered(ignored)
    for tool, path in given:
        offered.add(tool, path)
    if len(offered.functions) > MAX_TOOLS:
        raise invalid(
            f"`tools` has {len(offered.functions)} functions; at most {MAX_TOOLS} are allowed.", "tools"
        )
    chosen = _choose(choice, offered, ignored)
    if chosen is None:
        return ParsedTools(None, {})
    functions = [function for name, function in offered.functions.items() if name in chosen.names]
    if not functions:
        return ParsedTools(None, {})
    use = ToolUse(
        tools=[{"type": "function", "function": function} for function in functions],
        is_required=chosen.is_required,
        function=chosen.function,
        # A named function is called once: otherwise a model that may write nothing else would repeat the call.
        is_parallel=is_parallel and chosen.function is None,
    )
    return ParsedTools(use, offered.called)


class _Offered:
    """The tools of a request by the names that the model knows.

    Attributes:
        functions: As templates and grammars expect them.
        called: As in `ParsedTools`.
        skipped: Types of the built-in tools, by path.
    """

    def __init__(self, ignored: Ignored) -> None:
        self.functions: dict[str, dict[str, Any]] = {}
        self.called: dict[str, CalledTool] = {}
        self.skipped: dict[str, str] = {}
        self._ignored = ignored

    def add(self, tool: Any, path: str, namespace: NamespaceTool | None = None) -> None:
        if not isinstance(tool, dict):
            raise invalid(f"`{path}` must be an object.", path)
        kind = tool.get("type")
        if not isinstance(kind, str):
            raise missing(f"{path}.type", "it must be `function`, `custom` or `namespace`")
        if kind == "function":
            self._add_function(tool, path, namespace)
        elif kind == "custom":
            self._add_custom(tool, path, namespace)
        elif kind == "namespace" and namespace is None:
            inner = typed(tool, NamespaceTool, path, self._ignored)
            for i, each in enumerate(inner.tools):
                self.add(each, f"{path}.tools[{i}]", inner)
        else:
            self.skipped[path] = kind
            self._ignored.add(path)

    def _add_function(self, tool: dict[str, Any], path: str, namespace: NamespaceTool | None) -> None:
        if isinstance(tool.get("function"), dict) and "name" not in tool:  # as chat completions have it
            name_unknown_keys(tool, ("type", "function"), path, self._ignored)
            tool, path = {"type": "function", **tool["function"]}, f"{path}.function"
        function = typed(tool, FunctionTool, path, self._ignored)
        self._note_ignored(function, path)
        if function.output_schema is not None:
            self._ignored.add(f"{path}.output_schema")
        definition = FunctionDefinition(
            function.name, function.description, function.parameters, function.strict
        )
        plain = checked_function(definition, path)
        self._put(
            plain, CalledTool(function.name, None if namespace is None else namespace.name), path, namespace
        )

    def _add_custom(self, tool: dict[str, Any], path: str, namespace: NamespaceTool | None) -> None:
        custom = typed(tool, CustomTool, path, self._ignored)
        self._note_ignored(custom, path)
        plain = custom_function(
            custom.name, custom.description, custom.format, f"{path}.format", self._ignored.add
        )
        self._put(
            plain,
            CalledTool(custom.name, None if namespace is None else namespace.name, is_custom=True),
            path,
            namespace,
        )

    def _note_ignored(self, tool: FunctionTool | CustomTool, path: str) -> None:
        """Name what cannot be honored: every tool is loaded, and called directly by the model, which waits for its result."""
        callers = tool.allowed_callers
        if callers is not None and not (isinstance(callers, list) and "direct" in callers):
            self._ignored.add(f"{path}.allowed_callers")
        if tool.defer_loading:
            self._ignored.add(f"{path}.defer_loading")
        if tool.is_async:
            self._ignored.add(f"{path}.async")

    def _put(
        self, plain: dict[str, Any], called: CalledTool, path: str, namespace: NamespaceTool | None
    ) -> None:
        name = plain["name"] = flat_name(called.namespace, called.name)
        if namespace is not None and namespace.description:
            own = plain.get("description")
            is_first = path.endswith(".tools[0]")  # repeated before each, it would cost many tokens
            if not own or is_first:
                plain["description"] = f"{namespace.description}\n\n{own}" if own else namespace.description
        if self.functions.setdefault(name, plain) != plain:  # one that is given twice counts once
            raise invalid(f"`tools` has two different functions named `{name}`.", f"{path}.name")
        if called != CalledTool(name):
            self.called[name] = called


class _Chosen(NamedTuple):
    """The normalized `tool_choice`."""

    names: list[str]
    is_required: bool = False
    function: str | None = None


def _choose(given: str | dict[str, Any] | None, offered: _Offered, ignored: Ignored) -> _Chosen | None:
    """The functions that may be called; None: none.

    Raises:
        RequestError: 400.
    """
    if isinstance(given, dict):
        choice = typed(given, ToolChoice, "tool_choice", ignored)
        if choice.type not in ("auto", "none", "required"):  # Cursor sends those as objects
            return _choose_named(choice, offered, ignored)
        given = choice.type
    if given == "none":
        return None
    if given not in (None, "auto", "required"):
        raise invalid(
            "`tool_choice` must be `none`, `auto`, `required`, or an object that names a tool.", "tool_choice"
        )
    if given == "required":
        _check_any(offered, "tool_choice")
    return _Chosen(list(offered.functions), is_required=given == "required")


def _choose_named(choice: ToolChoice, offered: _Offered, ignored: Ignored) -> _Chosen:
    if choice.type == "allowed_tools":
        return _allowed(choice, offered, ignored)
    if choice.type not in ("function", "custom"):
        raise invalid(
            f"`tool_choice` names `{choice.type[:64]}`: {_BUILT_IN}.",
            "tool_choice.type",
            "unsupported_parameter",
        )
    name = _find(choice, offered, "tool_choice")
    return _Chosen([name], is_required=True, function=name)


def _allowed(choice: ToolChoice, offered: _Offered, ignored: Ignored) -> _Chosen:
    if choice.mode not in ("auto", "required"):
        raise invalid("`tool_choice.mode` must be `auto` or `required`.", "tool_choice.mode")
    if not choice.tools:
        raise invalid("`tool_choice.tools` must have at least one tool.", "tool_choice.tools")
    names = []
    for i, tool in enumerate(choice.tools):
        path = f"tool_choice.tools[{i}]"
        if not isinstance(tool, dict):
            raise invalid(f"`{path}` must be an object.", path)
        if tool.get("type") in ("function", "custom"):
            names.append(_find(typed(tool, NamedTool, path, ignored), offered, path))
        else:
            ignored.add(path)
    if choice.mode == "required" and not names:
        raise _refused_built_in("tool_choice.tools[0]")
    return _Chosen(names, is_required=choice.mode == "required")


def _find(named: NamedTool | ToolChoice, offered: _Offered, path: str) -> str:
    """The model's name of the tool that the client names, alone or with its namespace."""
    name = named.name or (named.function.name if named.function else None)
    if name is None:
        raise missing(f"{path}.name", "it is the name of a tool")
    flat = flat_name(named.namespace, name)
    if flat in offered.functions:
        return flat
    found = [each for each, called in offered.called.items() if called.name == name and not named.namespace]
    if len(found) == 1:
        return found[0]
    raise invalid(
        f"`{path}.name` is `{name[:64]}`, which is not the name of any of the tools.", f"{path}.name"
    )


def _check_any(offered: _Offered, param: str) -> None:
    if offered.functions:
        return
    if offered.skipped:
        raise _refused_built_in(next(iter(offered.skipped)))
    raise invalid("`tool_choice` is only allowed with `tools`.", param)


def _refused_built_in(path: str) -> RequestError:
    return invalid(f"`{path}` cannot be required: {_BUILT_IN}.", f"{path}.type", "unsupported_parameter")
