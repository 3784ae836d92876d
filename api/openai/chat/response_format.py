"""`response_format` as a grammar, and the check of grammars before anything is queued.

https://platform.openai.com/docs/guides/structured-outputs. Used by the parser of chats; a worker constrains the answer to it.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.http.json_body import full_match
from common.errors import RequestError, invalid
from common.schema import grammar, limits


class JsonSchema(msgspec.Struct, frozen=True):
    """A schema with its name; without a schema, any JSON object.

    `strict` has no effect, since every answer validates; `description` has none either, since the model is not shown the
    format.
    """

    name: Annotated[str, full_match("[a-zA-Z0-9_-]{1,64}")]
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Wanted = Annotated[
    ResponseFormat,
    Meta(
        extra_json_schema={
            "if": {"properties": {"type": {"const": "json_schema"}}},
            "then": {"properties": {"json_schema": {"type": "object"}}, "required": ["json_schema"]},
        }
    ),
]
"""As a JSON Schema describes it."""


def grammar_of(response_format: ResponseFormat | None) -> str | None:
    """The grammar of the answer's text; None: any text.

    Raises:
        RequestError: 400.
    """
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return grammar.for_json_object()
    if response_format.json_schema is None:
        raise invalid(
            "`response_format.json_schema` is missing; it must have a name and a schema.",
            "response_format.json_schema",
        )
    schema = response_format.json_schema.schema
    if schema is None:
        return grammar.for_json_object()
    if complaint := limits.size_refusal(schema):
        raise _unsupported(complaint)
    return grammar.for_json_schema(schema)


async def check(answer: str | None) -> None:
    """Compile what a worker is going to compile, on another thread: some schemas take tens of milliseconds.

    Args:
        answer: The result of `grammar_of`.

    Raises:
        RequestError: 400; it cannot be compiled, or no text can match it.
    """
    if answer is not None and (complaint := await asyncio.to_thread(grammar.check, answer)):
        raise _unsupported(complaint)


def _unsupported(complaint: str) -> RequestError:
    return invalid(
        f"`response_format.json_schema.schema` is not supported: {complaint}",
        "response_format.json_schema.schema",
    )
