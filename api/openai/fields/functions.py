"""Functions and arguments of calls, whichever field of a request they stand in, in the form that templates and grammars expect.

Used by the parsers of chats and of responses. Must not know models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from api.http.json_body import full_match
from common.errors import invalid
from common.schema import function_schema, limits

MAX_TOOLS = 512
"""OpenAI's limit is 128; agents with several MCP servers have more."""

MAX_LEVELS = 200
"""Of a function's parameters; those of a strict function have `limits.MAX_LEVELS`."""

MAX_ARGUMENT_LEVELS = 200
"""Of a call's arguments as an object; deeper ones stay text."""

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function without parameters, for templates and grammars."""

FunctionName = Annotated[str, full_match(r"[a-zA-Z0-9_.:/@-]{1,128}")]
"""OpenAI allows `[a-zA-Z0-9_-]{1,64}`; MCP clients send names such as `server.tool` and `server/tool`."""


class FunctionDefinition(msgspec.Struct, frozen=True):
    """`input_schema` is Anthropic's name of the parameters."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    input_schema: dict[str, Any] | None = None


def checked_function(function: FunctionDefinition, path: str) -> dict[str, Any]:
    """A function as templates and grammars expect it; missing parameters become an empty object's schema.

    Args:
        path: Of the function in the request.

    Raises:
        RequestError: 400; parameters are not an object's schema or are nested too deeply, or those of a strict function cannot be
            expressed as a grammar.
    """
    plain = _plain(function, f"{path}.parameters")
    if function.strict and (complaint := function_schema.refusal(plain)):
        raise invalid(
            f"`{path}.parameters` is not supported with `strict`: {complaint}", f"{path}.parameters"
        )
    return plain


def _plain(function: FunctionDefinition, path: str) -> dict[str, Any]:
    given = function.parameters or function.input_schema or {}
    if limits.is_deeper(given, MAX_LEVELS):
        raise invalid(f"`{path}` has more than {MAX_LEVELS} levels.", path)
    parameters = _without_nulls(given) or _NO_PARAMETERS
    if parameters.get("type", "object") != "object":
        raise invalid(f"`{path}` must be a schema of an object: its `type` must be `object`.", path)
    if not isinstance(parameters.get("properties", {}), dict):
        raise invalid(f"`{path}.properties` must be an object.", f"{path}.properties")
    plain: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        plain["description"] = function.description
    plain["parameters"] = parameters
    if function.strict is not None:
        plain["strict"] = function.strict
    return plain


_KEYWORDS_NOT_NULL = frozenset(
    (
        "$defs",
        "$schema",
        "additionalProperties",
        "anyOf",
        "description",
        "enum",
        "items",
        "properties",
        "required",
        "title",
        "type",
    )
)
"""Keywords of JSON Schema for which null is no value; serializers write it for what is absent."""


def _without_nulls(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without such keywords, at every level of properties, items and options. PHP's empty object, `[]`, is one for properties."""
    cleaned: dict[str, Any] = {}
    for key, value in schema.items():
        if value is None and key in _KEYWORDS_NOT_NULL:
            continue
        if key in ("properties", "$defs", "definitions"):
            cleaned[key] = _each_without_nulls(value)
        elif key == "items" and isinstance(value, dict):
            cleaned[key] = _without_nulls(value)
        elif key in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            cleaned[key] = [_without_nulls(each) if isinstance(each, dict) else each for each in value]
        else:
            cleaned[key] = value
    return cleaned


def _each_without_nulls(schemas: Any) -> Any:
    if schemas == []:
        return {}
    if not isinstance(schemas, dict):
        return schemas
    return {name: _without_nulls(each) if isinstance(each, dict) else each for name, each in schemas.items()}


def call_arguments(given: str | Mapping[str, Any]) -> Mapping[str, Any] | str:
    """Arguments as an object, as templates expect them (mlx_lm.server 0.32 does the same); some models call a function without
    parameters with an empty string. Text that is not a JSON object, such as that of a truncated call, is kept, as is one that is
    nested too deeply: any answer can be sent back unchanged.
    """
    if not isinstance(given, str):
        if limits.is_deeper(given, MAX_ARGUMENT_LEVELS):
            return msgspec.json.encode(given).decode()
        return given
    try:
        arguments = msgspec.json.decode(given, type=dict[str, Any]) if given.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        return given
    return given if limits.is_deeper(arguments, MAX_ARGUMENT_LEVELS) else arguments
