"""`response_format`: the grammar of a request, and those that are refused before anything is queued."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from typing import Any

import pytest

from api.openai.chat import response_format
from api.openai.chat.response_format import JsonSchema, ResponseFormat
from common.errors import RequestError

IMPOSSIBLE: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}


def refused(answer: str | None) -> str | None:
    """The parameter that a check names, or None."""
    try:
        asyncio.run(response_format.check(answer))
    except RequestError as error:
        return error.param
    return None


def test_text_has_no_grammar() -> None:
    """No format, or `text`: no grammar."""
    assert response_format.grammar_of(None) is None
    assert response_format.grammar_of(ResponseFormat("text")) is None


def test_formats_are_grammars() -> None:
    """Any object, or a schema's; a format without a schema is any object."""
    any_object = response_format.grammar_of(ResponseFormat("json_object"))
    assert any_object == response_format.grammar_of(ResponseFormat("json_schema", JsonSchema("a")))
    number = response_format.grammar_of(
        ResponseFormat("json_schema", JsonSchema("a", {"type": "number"}, strict=True))
    )
    assert number not in (None, any_object)
    assert refused(any_object) is refused(number) is None


def test_an_unsatisfiable_schema_is_refused() -> None:
    """At once, with its path in the request."""
    impossible = response_format.grammar_of(ResponseFormat("json_schema", JsonSchema("a", IMPOSSIBLE)))
    assert refused(impossible) == "response_format.json_schema.schema"


def test_a_schema_that_is_too_large_is_refused_before_a_grammar_is_made() -> None:
    """It is named in the refusal, and none of it is cached."""

    def refuse(prefix: str) -> None:
        for i in range(10):
            schema = {"type": "object", "description": prefix + f"{i}" * 1_000_000}
            with pytest.raises(RequestError) as refused:
                response_format.grammar_of(ResponseFormat("json_schema", JsonSchema("a", schema)))
            assert refused.value.param == "response_format.json_schema.schema"
            assert "longer than 131072 bytes" in str(refused.value)

    refuse("warm-up")
    tracemalloc.start()
    try:
        refuse("measured")
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()
