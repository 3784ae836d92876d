"""`/v1/responses` with the openai SDK and a real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from bench.harness.pool import Pool

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


class City(BaseModel):
    """What the model is asked for."""

    name: str


@pytest.fixture
def client(pool: Pool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"model": "demo", "input": QUESTION, "temperature": 0, "max_output_tokens": 32} | fields
    return client.responses.create(**fields)


def test_the_answer_is_that_of_a_chat(client: openai.OpenAI) -> None:
    """The same prompt, the same text, the same counts; log-probabilities of each token, which is the text."""
    answer = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    assert (answer.output_text, answer.status) == (ANSWER, "completed")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (37, 8)
    items = answer.output[0].content[0].logprobs
    assert "".join(item.token for item in items) == ANSWER
    assert {len(item.top_logprobs) for item in items} == {2}


def test_a_stream_and_the_next_turn(client: openai.OpenAI) -> None:
    """The stream is that text; the next turn has the conversation as its prompt."""
    with client.responses.stream(model="demo", input=QUESTION, temperature=0) as stream:
        final = stream.get_final_response()
    assert final.output_text == ANSWER
    counted = client.responses.input_tokens.count(
        model="demo", input="And of Italy?", previous_response_id=final.id
    )
    second = ask(client, input="And of Italy?", previous_response_id=final.id)
    assert second.usage.input_tokens == counted.input_tokens > 37


def test_structured_output(client: openai.OpenAI) -> None:
    """`responses.parse` gets an object of its type."""
    answer = client.responses.parse(
        model="demo", input=QUESTION, text_format=City, temperature=0, max_output_tokens=64
    )
    assert answer.output_parsed is not None
    assert isinstance(answer.output_parsed.name, str)


def test_forced_calls(client: openai.OpenAI) -> None:
    """Of a function, whose arguments match its schema, and of a custom tool, which gets plain text."""
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["celsius", "kelvin"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    function = {"type": "function", "name": "weather", "parameters": parameters, "strict": True}
    [call] = ask(client, tools=[function], tool_choice={"type": "function", "name": "weather"}).output
    assert json.loads(call.arguments)["unit"] in ("celsius", "kelvin")
    custom = {
        "type": "custom",
        "name": "note",
        "format": {"type": "grammar", "syntax": "regex", "definition": "[a-c]{3}"},
    }
    [run] = ask(client, tools=[custom], tool_choice={"type": "custom", "name": "note"}).output
    assert (run.type, len(run.input), set(run.input) <= set("abc")) == ("custom_tool_call", 3, True)


def test_a_conversation_that_is_too_long(client: openai.OpenAI) -> None:
    """With `truncation: auto` its oldest messages are dropped; without, it is refused."""
    question = {"role": "user", "content": QUESTION}
    conversation = [
        {"role": "user", "content": "word " * 9000},
        {"role": "assistant", "content": "Yes."},
        question,
    ]
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, input=conversation)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "input")
    answer = ask(client, input=conversation, truncation="auto")
    alone = ask(client, input=conversation[1:])
    assert answer.output_text == alone.output_text
    assert answer.usage.input_tokens == alone.usage.input_tokens
