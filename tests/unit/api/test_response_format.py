"""What an answer has to be: the grammar of a request, and which are refused before anything is queued."""

from __future__ import annotations

import asyncio
from typing import Any

from api.openai.chat import response_format
from api.openai.chat.response_format import JsonSchema, ResponseFormat
from common.errors import RequestError

IMPOSSIBLE: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}


def refused(answer: str | None) -> str | None:
    """The parameter that a check names, None where it finds nothing."""
    try:
        asyncio.run(response_format.check(answer))
    except RequestError as error:
        return error.param
    return None


def test_text_is_free() -> None:
    """No format, or `text`: no grammar."""
    assert response_format.grammar_of(None) is None
    assert response_format.grammar_of(ResponseFormat("text")) is None


def test_formats_are_grammars() -> None:
    """An object, or what a schema says; a format without a schema is any object."""
    any_object = response_format.grammar_of(ResponseFormat("json_object"))
    assert any_object == response_format.grammar_of(ResponseFormat("json_schema", JsonSchema("a")))
    number = response_format.grammar_of(
        ResponseFormat("json_schema", JsonSchema("a", {"type": "number"}, strict=True))
    )
    assert number not in (None, any_object)
    assert refused(any_object) is refused(number) is None


def test_what_nothing_can_match_is_refused() -> None:
    """At once, and by its place in the request."""
    impossible = response_format.grammar_of(ResponseFormat("json_schema", JsonSchema("a", IMPOSSIBLE)))
    assert refused(impossible) == "response_format.json_schema.schema"
