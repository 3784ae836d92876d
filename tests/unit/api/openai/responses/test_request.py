"""The body of a response request becomes a typed, checked value."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from api.generation.request import GenerationRequest
from api.openai.responses import request as response_request
from api.openai.responses.front_end import RESPONSES
from common.errors import RequestError
from tests.unit.api.openai.records import MODEL
from tests.unit.api.openai.responses.requests import parse, refused

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


async def check(request: GenerationRequest) -> None:
    await RESPONSES.check(request, MODEL)


def options(**fields: Any) -> Any:
    return parse(**fields).options


def test_the_shortest_request() -> None:
    """Everything has its default; nothing is echoed that has it."""
    request = parse()
    assert (request.model, request.max_tokens, request.stop, request.top_logprobs) == (None, None, [], None)
    assert (request.stream, request.ignored, request.grammar, request.tool_use) == (False, [], None, None)
    assert (request.num_jobs, request.options) == (1, response_request.ResponseOptions())


def test_sampling() -> None:
    """OpenAI's fields, and those of local servers."""
    request = parse(
        temperature=0.5,
        top_p=0.25,
        max_output_tokens=3,
        top_k=4,
        min_p=0.5,
        seed=7,
        stop=["x"],
        repetition_penalty=1.5,
        presence_penalty=1,
        logit_bias={"1": 2},
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 4, 0.5)
    assert (sampling.seed, sampling.repetition_penalty, sampling.presence_penalty) == (7, 1.5, 1)
    assert (sampling.logit_bias, request.stop, request.max_tokens) == ({1: 2.0}, ["x"], 3)
    assert parse(max_tokens=4).max_tokens == 4
    assert parse(max_tokens=4, max_output_tokens=3).max_tokens == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
        ({"top_logprobs": 3}, 3),
        ({"top_logprobs": 0}, None),
        ({"include": []}, None),
    ],
)
def test_logprobs(fields: dict[str, Any], expected: int | None) -> None:
    """They are asked for by `include`, or by a number of alternatives."""
    assert parse(**fields).top_logprobs == expected
    assert options(**fields).with_logprobs == (expected is not None)


@pytest.mark.parametrize(
    ("text_format", "has_grammar"),
    [
        (None, False),
        ({"type": "text"}, False),
        ({"type": "json_object"}, True),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, True),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": None, "description": "d"}, True),
    ],
)
def test_text_format(text_format: Any, has_grammar: bool) -> None:
    """A schema becomes a grammar."""
    assert (parse(text={"format": text_format}).grammar is not None) == has_grammar


@pytest.mark.parametrize(
    ("reasoning", "arguments", "is_summarized"),
    [
        (None, {}, False),
        ({}, {}, False),
        ({"effort": "low"}, {"reasoning_effort": "low"}, False),
        ({"effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}, False),
        ({"effort": None, "summary": "auto"}, {}, True),
        ({"generate_summary": "concise"}, {}, True),
    ],
)
def test_reasoning(reasoning: Any, arguments: dict[str, Any], is_summarized: bool) -> None:
    """The effort goes to the template; a summary is what the client asked for."""
    request = parse(reasoning=reasoning)
    assert request.prompts[0].template_arguments == arguments  # type: ignore[union-attr]
    assert options(reasoning=reasoning).is_summarized == is_summarized


def test_what_has_no_effect_is_named() -> None:
    """Unknown keys at each depth, and values that cannot be honored and do not change what the answer means."""
    request = parse(
        client_metadata={},
        reasoning={"context": "auto"},
        text={"verbosity": "low", "format": {"type": "text", "zzz": 1}},
        include=["reasoning.encrypted_content", "file_search_call.results"],
        tools=[{"type": "function", "name": "f", "cache_control": {}}],
        context_management=[],
    )
    assert sorted(request.ignored) == [
        "client_metadata",
        "context_management",
        "include[1]",
        "reasoning.context",
        "text.format.zzz",
        "text.verbosity",
        "tools[0].cache_control",
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"n": 2}, "n"),
        ({"input": 5}, "input"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "middle"}, "truncation"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"verbosity": "x"}}, "text.verbosity"),
        ({"metadata": {"k": 5}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"include": "x"}, "include"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": 5}, "tool_choice"),
    ],
)
def test_refusals(fields: dict[str, Any], param: str) -> None:
    """A 400 that names the field."""
    error = refused(**fields)
    assert (error.status, (error.param or "").removesuffix("[...]")) == (400, param)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"input": null}'])
def test_bodies_without_a_conversation(body: bytes) -> None:
    """Each is a 400."""
    with pytest.raises(RequestError) as error:
        response_request.parse(body)
    assert error.value.status == 400


def test_a_schema_that_no_text_can_match() -> None:
    """It is refused before anything is queued, by the name that the field has here."""
    text = {
        "format": {"type": "json_schema", "name": "n", "schema": {"type": "string", "pattern": "(", "x": 1}}
    }
    with pytest.raises(RequestError) as error:
        asyncio.run(check(parse(text=text)))
    assert error.value.param == "text.format.schema"


def test_the_echo() -> None:
    """The response repeats what the request set, as OpenAI does."""
    tool = {"type": "function", "name": "f"}
    echo = options(
        instructions="Be brief.",
        metadata={"k": "v"},
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=9,
        truncation="auto",
        user="u",
        safety_identifier="s",
        prompt_cache_key="p",
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        temperature=0.5,
        service_tier="auto",
        top_logprobs=2,
        max_tool_calls=3,
    ).echo
    assert json.loads(json.dumps(echo)) == {
        "instructions": "Be brief.",
        "metadata": {"k": "v"},
        "tools": [tool | {"description": None, "parameters": None, "strict": None}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 9,
        "max_tool_calls": 3,
        "truncation": "auto",
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {
            "format": {
                "type": "json_schema",
                "name": "n",
                "description": None,
                "schema": SCHEMA,
                "strict": True,
            },
            "verbosity": "medium",
        },
        "top_logprobs": 2,
    }


def test_a_user_that_is_no_text() -> None:
    """It has no effect, so any value is accepted; a response repeats only a text."""
    assert "user" not in options(user=False).echo
    assert options(user="ann").echo["user"] == "ann"
