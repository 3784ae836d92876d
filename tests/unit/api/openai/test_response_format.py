"""`response_format`: the grammar of a request, and those that are refused before anything is queued."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from typing import Any

import pytest

from api.openai.fields import response_format
from api.openai.fields.response_format import AnswerGrammar, FormatFields, ResponseFormat, StructuredOutputs
from common.errors import RequestError
from common.schema import grammar

IMPOSSIBLE: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}


def refused(answer: str | None, field: str = "response_format") -> str | None:
    """The parameter that a check names, or None."""
    try:
        asyncio.run(response_format.check(answer, field))
    except RequestError as error:
        return error.param
    return None


def grammar_of(**fields: Any) -> AnswerGrammar | None:
    return response_format.grammar_of(FormatFields(**fields), [])


def json_schema(schema: Any, **more: Any) -> ResponseFormat:
    return ResponseFormat("json_schema", {"name": "a", "schema": schema} | more)


def test_text_has_no_grammar() -> None:
    """No format, or `text`: no grammar."""
    assert grammar_of() is None
    assert grammar_of(response_format=ResponseFormat("text")) is None
    empty = {"guided_json": "", "guided_choice": [], "guided_grammar": "", "grammar": "", "format": ""}
    assert grammar_of(**empty, structured_outputs=StructuredOutputs()) is None


NUMBER = {"type": "number"}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize(
    ("fields", "text", "field"),
    [
        (
            {"response_format": ResponseFormat("json_object")},
            grammar.for_json_object(),
            "response_format.schema",
        ),
        (
            {"response_format": json_schema(None)},
            grammar.for_json_object(),
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": json_schema(NUMBER, strict=True)},
            grammar.for_json_schema(NUMBER),
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": ResponseFormat("json_schema", {"schema": NUMBER})},
            grammar.for_json_schema(NUMBER),
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": ResponseFormat("json_schema", PERSON)},
            grammar.for_json_schema(PERSON),
            "response_format.json_schema",
        ),
        (
            {"response_format": ResponseFormat("json_schema", schema=NUMBER)},
            grammar.for_json_schema(NUMBER),
            "response_format.schema",
        ),
        (
            {"response_format": ResponseFormat("json_object", schema=PERSON)},
            grammar.for_json_object(PERSON),
            "response_format.schema",
        ),
        ({"guided_json": PERSON}, grammar.for_json_schema(PERSON), "guided_json"),
        ({"guided_json": '{"type": "number"}'}, grammar.for_json_schema(NUMBER), "guided_json"),
        ({"guided_regex": "a|b"}, grammar.for_regex("a|b"), "guided_regex"),
        ({"guided_choice": ["yes", "no"]}, grammar.for_choice(["yes", "no"]), "guided_choice"),
        ({"json_schema": PERSON}, grammar.for_json_schema(PERSON), "json_schema"),
        ({"regex": "a"}, grammar.for_regex("a"), "regex"),
        ({"format": "json"}, grammar.for_json_object(), "format"),
        ({"format": PERSON}, grammar.for_json_schema(PERSON), "format"),
        (
            {"structured_outputs": StructuredOutputs(json=PERSON)},
            grammar.for_json_schema(PERSON),
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": StructuredOutputs(regex="a")},
            grammar.for_regex("a"),
            "structured_outputs.regex",
        ),
        (
            {"structured_outputs": StructuredOutputs(choice=["a"])},
            grammar.for_choice(["a"]),
            "structured_outputs.choice",
        ),
        (
            {"structured_outputs": StructuredOutputs(json_object=True)},
            grammar.for_json_object(),
            "structured_outputs.json_object",
        ),
    ],
)
def test_formats_are_grammars(fields: dict[str, Any], text: str, field: str) -> None:
    """OpenAI's forms, and those of vLLM, llama.cpp, SGLang and Ollama; all of them compile."""
    assert grammar_of(**fields) == AnswerGrammar(text, field)
    assert refused(text) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"ebnf": "root ::= x"}, "ebnf"),
        ({"structured_outputs": StructuredOutputs(grammar="x")}, "structured_outputs.grammar"),
        ({"structured_outputs": StructuredOutputs(structural_tag="x")}, "structured_outputs.structural_tag"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 301}, "guided_choice"),
        ({"guided_regex": "x" * 5001}, "guided_regex"),
        ({"guided_regex": "((a{100}){100}){100}"}, "guided_regex"),
        ({"guided_regex": "a", "response_format": ResponseFormat("json_object")}, "guided_regex"),
        ({"response_format": ResponseFormat("json_schema")}, "response_format.json_schema"),
        ({"response_format": json_schema("x")}, "response_format.json_schema.schema"),
    ],
)
def test_formats_that_cannot_be_held_are_refused(fields: dict[str, Any], param: str) -> None:
    """By name: an answer in another format than the one asked for is of no use."""
    with pytest.raises(RequestError) as raised:
        grammar_of(**fields)
    assert (raised.value.status, raised.value.param) == (400, param)


def test_a_misspelled_key_of_a_format_is_reported() -> None:
    """As every unknown key."""
    ignored: list[str] = []
    given = FormatFields(response_format=ResponseFormat("json_schema", {"name": "a", "schem": {}}))
    response_format.grammar_of(given, ignored)
    assert ignored == ["response_format.json_schema.schem"]


@pytest.mark.parametrize("pattern", ["(a", "a(?=b)", "x\\"])
def test_an_expression_that_does_not_compile_is_refused(pattern: str) -> None:
    """With the field that has it."""
    found = grammar_of(guided_regex=pattern)
    assert found is not None
    assert refused(found.text, found.field) == "guided_regex"


def test_an_unsatisfiable_schema_is_refused() -> None:
    """At once, with its path in the request."""
    impossible = grammar_of(response_format=json_schema(IMPOSSIBLE))
    assert impossible is not None
    assert refused(impossible.text, impossible.field) == "response_format.json_schema.schema"


def test_a_schema_that_is_too_large_is_refused_before_a_grammar_is_made() -> None:
    """It is named in the refusal, and none of it is cached."""

    def refuse(prefix: str) -> None:
        for i in range(10):
            schema = {"type": "object", "description": prefix + f"{i}" * 1_000_000}
            with pytest.raises(RequestError) as refused:
                grammar_of(response_format=json_schema(schema))
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
