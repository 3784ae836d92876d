"""What an answer has to be: the grammar of a request, and which are refused before anything is queued."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api import response_format
from api.model_directory import ServedModel
from api.response_format import JsonSchema, ResponseFormat
from common.errors import RequestError
from common.protocol import ToolUse

MODEL = ServedModel("m", 0, 1000, 100, 1, 1, "")
CALLING = ServedModel("m", 0, 1000, 100, 1, 1, "", has_own_calls=True)
IMPOSSIBLE: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}


def tools(parameters: dict[str, Any], **function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters, **function}}]


def refused(answer: str | None, use: ToolUse | None, model: ServedModel = MODEL) -> str | None:
    """The parameter that a check names, None where it finds nothing."""
    try:
        asyncio.run(response_format.check(answer, use, model))
    except RequestError as error:
        assert error.status == 400
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
    assert refused(any_object, None) is refused(number, None) is None


def test_what_nothing_can_match_is_refused() -> None:
    """In the answer's format, and in a function's parameters where the answer is held to them."""
    impossible = response_format.grammar_of(ResponseFormat("json_schema", JsonSchema("a", IMPOSSIBLE)))
    assert refused(impossible, None) == "response_format.json_schema.schema"
    for use in (
        ToolUse(tools=tools(IMPOSSIBLE), is_required=True),
        ToolUse(tools=tools(IMPOSSIBLE), function="f"),
        ToolUse(tools=tools(IMPOSSIBLE, strict=True)),
    ):
        assert refused(None, use, CALLING) == "tools"


@pytest.mark.parametrize(("model", "param"), [(CALLING, None), (MODEL, "tools")])
def test_a_model_that_calls_as_it_likes_is_held_to_nothing(model: ServedModel, param: str | None) -> None:
    """Only one without a format of its own needs the grammar of calls that are not required."""
    assert refused(None, ToolUse(tools=tools(IMPOSSIBLE)), model) == param
