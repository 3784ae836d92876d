"""`text.format`, which says what the answer's text must match, as a grammar.

https://platform.openai.com/docs/guides/structured-outputs. Used by `api.openai.responses.request`; grammars are checked as those
of chats are.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from api.openai.fields import response_format
from common.errors import invalid

SCHEMA_FIELD = "text.format.schema"


class TextFormat(msgspec.Struct, frozen=True):
    """`strict` has no effect, since every answer validates; `description` has none either, since the model is not shown the format."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, frozen=True):
    """The field `text`."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


def grammar_of(text_format: TextFormat | None) -> str | None:
    """The grammar of the answer's text; None: any text.

    Raises:
        RequestError: 400.
    """
    if text_format is None or text_format.type == "text":
        return None
    if text_format.type == "json_schema" and text_format.schema is None:
        raise invalid(f"`{SCHEMA_FIELD}` is missing; it must be a JSON Schema.", SCHEMA_FIELD)
    return response_format.for_schema(text_format.schema, SCHEMA_FIELD).text
