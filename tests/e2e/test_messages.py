"""Anthropic's protocol against the complete pool: gunicorn, RQ, Redis and a worker with a real model."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from bench.harness.pool import Pool

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
    },
}
TIME = {"name": "get_time", "input_schema": {"type": "object", "properties": {}}}
WEATHER_QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture
def ask(pool: Pool) -> Any:
    """Sends a body to `/v1/messages`, or to a path below; returns the status, and the object or the events of a stream."""

    def send(path: str = "", **fields: Any) -> tuple[int, Any]:
        body = {"model": "demo", "max_tokens": 16, "temperature": 0, "messages": QUESTION} | fields
        connection = http.client.HTTPConnection("127.0.0.1", pool.port, timeout=60)
        headers = {"anthropic-version": "2023-06-01", "x-api-key": "none", "content-type": "application/json"}
        connection.request("POST", f"/v1/messages{path}", json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read().decode()
        connection.close()
        if not response.headers["content-type"].startswith("text/event-stream"):
            return response.status, json.loads(data)
        lines = [line.removeprefix("data: ") for line in data.split("\n") if line.startswith("data: ")]
        return response.status, [json.loads(line) for line in lines]

    return send


def answered(ask: Any, path: str = "", **fields: Any) -> Any:
    status, found = ask(path, **fields)
    assert status == 200, found
    return found


def text(message: Any) -> str:
    [block] = message["content"]
    return str(block["text"])


def test_a_message_and_its_stream(ask: Any) -> None:
    """The same text, usage and reason; the stream's first event has the prompt's tokens before there is a text."""
    message = answered(ask)
    assert (text(message), message["stop_reason"]) == (ANSWER, "end_turn")
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 37
    assert usage["output_tokens"] == 8
    events = answered(ask, stream=True)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == ANSWER
    assert len(deltas) > 3
    first = events[0]["message"]["usage"]
    assert first["input_tokens"] + first["cache_read_input_tokens"] == 37
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    assert events[-2]["usage"]["output_tokens"] == 8


def test_blocks_are_the_same_prompt(ask: Any) -> None:
    """A string or a block, with or without `cache_control`: the second request finds the first one's prefix cached."""
    block = {"type": "text", "text": QUESTION[0]["content"], "cache_control": {"type": "ephemeral"}}
    system = [{"type": "text", "text": "Answer briefly.", "cache_control": {"type": "ephemeral"}}]
    plain = answered(ask, system="Answer briefly.")
    marked = answered(ask, system=system, messages=[{"role": "user", "content": [block]}])
    assert text(marked) == text(plain)
    assert marked["usage"]["cache_read_input_tokens"] > 0


def test_why_it_stopped(ask: Any) -> None:
    """The limit, or the stop sequence and which one it was; a limit beyond the context is cut, not refused."""
    assert answered(ask, max_tokens=3)["stop_reason"] == "max_tokens"
    stopped = answered(ask, stop_sequences=["never", " France"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " France")
    assert text(stopped) == "The capital of"
    assert answered(ask, max_tokens=10_000_000)["stop_reason"] == "end_turn"
    assert answered(ask, max_tokens=0)["content"] == []


def test_the_answer_continues_the_last_message(ask: Any) -> None:
    """Prefill: the answer is the rest."""
    said = {"role": "assistant", "content": "The capital of France is "}
    assert text(answered(ask, messages=[*QUESTION, said])).strip() == "Paris."


def test_forced_calls(ask: Any) -> None:
    """A call of any tool, or of the named one, with an input of its schema; streamed, the input adds up to the same."""
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        fields = {"tools": [WEATHER], "tool_choice": choice, "messages": WEATHER_QUESTION, "max_tokens": 80}
        message = answered(ask, **fields)
        assert message["stop_reason"] == "tool_use"
        call = message["content"][0]
        assert (call["type"], call["name"], set(call["input"])) == ("tool_use", "get_weather", {"city"})
        events = answered(ask, stream=True, **fields)
        parts = [
            event["delta"]["partial_json"]
            for event in events
            if event["type"] == "content_block_delta" and event["index"] == 0
        ]
        assert json.loads("".join(parts)) == call["input"]


def test_a_tool_without_input(ask: Any) -> None:
    """Its input is an empty object."""
    message = answered(
        ask, tools=[TIME], tool_choice={"type": "any", "disable_parallel_tool_use": True}, max_tokens=80
    )
    assert [block["input"] for block in message["content"]] == [{}]


def test_a_turn_with_results(ask: Any) -> None:
    """The history of an agent, thoughts and an error included, is served; no call is forced."""
    history = [
        *WEATHER_QUESTION,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I should look.", "signature": "x"},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "toolu_2", "name": "get_time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "sunny"}],
                },
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "content": "no clock"},
                {"type": "text", "text": "Well?"},
            ],
        },
        {"role": "system", "content": "Be brief."},
    ]
    message = answered(ask, messages=history, tools=[WEATHER, TIME], tool_choice={"type": "auto"})
    assert message["usage"]["output_tokens"] > 0


def test_an_answer_in_a_schema(ask: Any) -> None:
    """The text is JSON of the schema."""
    schema = {
        "type": "object",
        "properties": {"is_capital": {"type": "boolean"}},
        "required": ["is_capital"],
        "additionalProperties": False,
    }
    message = answered(
        ask, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=60
    )
    assert set(json.loads(text(message))) == {"is_capital"}


def test_counting_tokens(ask: Any) -> None:
    """The count is the number of prompt tokens that the same request then has, tools included."""
    for fields in ({}, {"system": "Be brief."}, {"tools": [WEATHER], "messages": WEATHER_QUESTION}):
        counted = answered(ask, "/count_tokens", **fields)["input_tokens"]
        usage = answered(ask, **fields)["usage"]
        assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_a_prompt_that_is_too_long(ask: Any) -> None:
    """An error, not a stream, even if a stream was asked for."""
    long = [{"role": "user", "content": "word " * 9000}]
    for stream in (False, True):
        status, error = ask(messages=long, stream=stream)
        assert status == 400
        assert error["error"]["type"] == "invalid_request_error"
        assert "context length" in error["error"]["message"]
