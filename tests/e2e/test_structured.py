"""Structured output: JSON, schemas, tool calls. The openai SDK against a worker with a real model.

The model is too small for sensible content: the tests check the format, which the grammar guarantees.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from bench.harness.pool import Pool

QUESTION: Any = [{"role": "user", "content": "Tell me about the weather in Paris, as JSON."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}


class Sky(Enum):
    CLEAR = "clear"
    CLOUDY = "cloudy"


class Weather(BaseModel):
    """As users write it; the SDK turns it into a strict schema."""

    city: str = Field(max_length=12)
    degrees: int
    sky: Sky
    warnings: list[bool] = Field(max_length=2)


@pytest.fixture
def client(pool: Pool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def options(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": QUESTION, "temperature": 1.0, "seed": 5, "max_tokens": 120} | more


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_a_typed_answer(client: openai.OpenAI) -> None:
    """`.parse()` returns an object of the type; the SDK's stream helper returns an equal one."""
    asked = options(response_format=Weather)
    answer = client.chat.completions.parse(**asked).choices[0]
    assert isinstance(answer.message.parsed, Weather)
    assert answer.finish_reason == "stop"
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.message.parsed


def test_each_choice_follows_the_schema(client: openai.OpenAI) -> None:
    """Constrained next to unconstrained answers: log-probabilities match the text and contain no banned token."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as asking:
            return await asyncio.gather(
                asking.chat.completions.create(
                    **options(response_format=schema_format(schema), n=3, logprobs=True, top_logprobs=2)
                ),
                asking.chat.completions.create(**options(max_tokens=12)),
            )

    held, free = asyncio.run(ask())
    alone = client.chat.completions.create(**options(max_tokens=12))
    assert free.choices[0].message.content == alone.choices[0].message.content
    for choice in held.choices:
        jsonschema.validate(json.loads(choice.message.content), schema)
        assert "".join(item.token for item in choice.logprobs.content) == choice.message.content
        assert all(item.logprob > -1000 for item in choice.logprobs.content)


def test_any_object(client: openai.OpenAI) -> None:
    """`json_object`: every answer that max_tokens does not cut off is an object, sampled or greedy."""
    for more in ({}, {"temperature": 0}):
        answer = client.chat.completions.create(
            **options(response_format={"type": "json_object"}, max_tokens=80, **more)
        ).choices[0]
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content or ""), dict)
        else:
            assert (answer.message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
        ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
    ],
    ids=["required", "named", "named with parameters"],
)
def test_a_call_that_is_required(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    """A required call names an allowed function with valid arguments; streamed it is the same."""
    asked = options(tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False)
    answer = client.chat.completions.create(**asked).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    [call] = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in names
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        jsonschema.validate(arguments, WEATHER["function"]["parameters"])
    else:
        assert arguments == {}
    chunks = list(client.chat.completions.create(stream=True, **asked))
    calls = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [part.function.name for part in calls if part.function and part.function.name] == [
        call.function.name
    ]
    assert calls[0].id
    assert (
        "".join((part.function and part.function.arguments) or "" for part in calls)
        == call.function.arguments
    )
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_results(client: openai.OpenAI) -> None:
    """A call and its result are sent back to the model, which then answers with text."""
    asked = options(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    message = client.chat.completions.create(**asked).choices[0].message
    [call] = message.tool_calls or []
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'}
    answer = client.chat.completions.create(
        **options(messages=[*QUESTION, message, result], tools=[WEATHER], tool_choice="none", max_tokens=20)
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("more", "param"),
    [
        (
            {
                "response_format": schema_format(
                    {"type": "object", "required": ["a"], "properties": {"a": False}}
                )
            },
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": schema_format({"type": "string", "enum": []})},
            "response_format.json_schema.schema",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nope"}}},
            "tool_choice",
        ),
    ],
    ids=["impossible", "empty enum", "unknown function"],
)
def test_impossible_requests_are_refused_at_once(
    client: openai.OpenAI, more: dict[str, Any], param: str
) -> None:
    """A 400 that names the parameter, also for a stream."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(stream=stream, **options(**more))
        assert refused.value.param is not None
        assert refused.value.param.startswith(param)
