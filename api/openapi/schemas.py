"""The schemas of all requests and answers, from their types, and from the tables of what the checks refuse."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from api import about, health
from api.anthropic import description as anthropic
from api.openai import models
from api.openai.chat import request as chat_request
from api.openai.errors import ErrorBody
from api.openai.responses import description as stored
from api.openai.tokenize import request as tokenize_request
from api.openai.tokenize.resources import DetokenizeResponse, TokenizeResponse
from api.openapi.components import REF, Json
from api.openapi.generating import GENERATING
from common.settings import Settings

_NOT_SUPPORTED = "Part of OpenAI's API and not supported yet: only values without an effect are accepted."

TOKENIZE_BODIES = (tokenize_request.TokenizeTextBody, tokenize_request.TokenizeChatBody)
_OTHER_TYPES = (
    *stored.TYPES,
    *TOKENIZE_BODIES,
    tokenize_request.DetokenizeBody,
    TokenizeResponse,
    DetokenizeResponse,
    models.ModelList,
    models.ModelObject,
    health.Alive,
    health.Unready,
    health.HealthReport,
    about.About,
    ErrorBody,
)


_NOT_BOTH_ENDS: Json = {
    "not": {
        "properties": {"add_generation_prompt": {"const": True}, "continue_final_message": {"const": True}},
        "required": ["add_generation_prompt", "continue_final_message"],
    }
}


def schemas(settings: Settings) -> Json:
    types = [t for endpoint in GENERATING for t in (endpoint.body, endpoint.completed, endpoint.chunk)]
    _, schemas = msgspec.json.schema_components([*types, *_OTHER_TYPES], ref_template=REF)
    chat = (tokenize_request.TokenizeChatBody, chat_request.NEUTRAL, chat_request.ONLY_WITH)
    bodies = [(endpoint.body, endpoint.neutral, endpoint.only_with) for endpoint in GENERATING]
    for body, neutral, only_with in [*bodies, chat]:
        schema = schemas[body.__name__]
        for name, values in neutral.items():
            schema["properties"][name] = _neutral(schema["properties"][name], values)
        if only_with:
            schema["allOf"] = [_only_with(name, other) for name, other in only_with.items()]
    schemas["TokenizeChatBody"]["allOf"].append(_NOT_BOTH_ENDS)
    schemas["TokenizeTextBody"]["properties"]["messages"] = False
    schemas["TokenizeChatBody"]["properties"]["prompt"] = False
    for body in (
        *(each for each, _, _ in [*bodies, chat]),
        tokenize_request.TokenizeTextBody,
        tokenize_request.DetokenizeBody,
    ):
        if settings.strict_parameters:
            schemas[body.__name__]["additionalProperties"] = False
    for schema in schemas.values():
        if schema.get("required") == []:
            del schema["required"]
    schemas |= anthropic.schemas(is_strict=settings.strict_parameters)
    _use_ecma_patterns(schemas)
    return schemas


def _use_ecma_patterns(schema: Any) -> None:
    r"""JSON Schema's expressions end with `$`; Python's with `\Z`, which is an error for clients in JavaScript."""
    if isinstance(schema, dict) and isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = re.sub(r"\\Z$", "$", pattern)
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _use_ecma_patterns(value)


def _neutral(schema: Json, values: tuple[Any, ...]) -> Json:
    """A field with only the values without an effect."""
    plain = [msgspec.to_builtins(value) for value in values]
    objects = [value for value in plain if isinstance(value, dict)]
    if not objects:
        return {"description": _NOT_SUPPORTED, "enum": [*plain, None], "default": None}
    # Objects may have unknown fields.
    consts = [
        {"properties": {key: {"const": value} for key, value in fields.items()}, "required": list(fields)}
        for fields in objects
    ]
    return schema | {"description": _NOT_SUPPORTED, "allOf": [{"anyOf": [{"type": "null"}, *consts]}]}


def _only_with(name: str, other: str) -> Json:
    """`name` may ask for something only if `other` is true."""
    return {
        "anyOf": [
            {"properties": {name: {"enum": [None, 0]}}},
            {"properties": {other: {"enum": [True, 1]}}, "required": [other]},
        ]
    }
