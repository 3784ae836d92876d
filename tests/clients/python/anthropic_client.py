"""The anthropic SDK against a server, as `tests/clients/python/cases.py` describes."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import anthropic
import cases
from pydantic import BaseModel

TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": cases.get_weather.model_json_schema(),
}


class Place(cases.Closed):
    """Without limits of length: the SDK turns those into descriptions."""

    continent: Literal["Africa", "Asia", "Europe"]
    is_capital: bool


def client_of(base_url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key=cases.KEY, max_retries=0)


def asked(model: str, **fields: Any) -> Any:
    """A greedy request."""
    question = cases.user(cases.QUESTION)
    return {"model": model, "max_tokens": cases.MAX_TOKENS, "messages": question} | fields


GREEDY = {"temperature": 0}


def version(_base_url: str, _model: str) -> Any:
    return anthropic.__version__


def message(base_url: str, model: str) -> Any:
    found = client_of(base_url).messages.create(**asked(model), extra_body=GREEDY)
    return {
        "text": found.content[0].text,
        "stop_reason": found.stop_reason,
        "input_tokens": found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0),
        "output_tokens": found.usage.output_tokens,
        "request_id": found._request_id,
    }


def stream_helper(base_url: str, model: str) -> Any:
    with client_of(base_url).messages.stream(**asked(model), extra_body=GREEDY) as stream:
        deltas = list(stream.text_stream)
        final = stream.get_final_message()
    return {
        "deltas": deltas,
        "text": final.content[0].text,
        "stop_reason": final.stop_reason,
        "output_tokens": final.usage.output_tokens,
        "input_tokens": final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0),
    }


def raw_stream(base_url: str, model: str) -> Any:
    stream = client_of(base_url).messages.create(**asked(model, stream=True), extra_body=GREEDY)
    return [event.type for event in stream]


def beta(base_url: str, model: str) -> Any:
    """The beta namespace, with the fields that Claude Code sends."""
    fields = asked(
        model,
        thinking={"type": "adaptive"},
        metadata={"user_id": "u"},
        context_management={"edits": [{"type": "clear_thinking_20251015"}]},
        betas=["context-management-2025-06-27", "interleaved-thinking-2025-05-14"],
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    )
    with client_of(base_url).beta.messages.stream(**fields) as stream:
        return stream.get_final_message().stop_reason


def forced_call(base_url: str, model: str) -> Any:
    """A call, streamed and not, and the turn with its result."""
    client = client_of(base_url)
    fields = asked(
        model,
        messages=cases.user(cases.WEATHER_QUESTION),
        max_tokens=cases.MAX_FORM_TOKENS,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "get_weather"},
    )
    found = client.messages.create(**fields, extra_body=GREEDY)
    with client.messages.stream(**fields, extra_body=GREEDY) as stream:
        inputs = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    [call] = found.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    history = [*fields["messages"], found.to_param(), {"role": "user", "content": [result]}]
    after = client.messages.create(**asked(model, messages=history, tools=[TOOL]), extra_body=GREEDY)
    return {
        "input": call.input,
        "streamed": streamed.content[0].input,
        "joined": "".join(inputs),
        "stop_reason": found.stop_reason,
        "after": after.stop_reason,
    }


def parsed(base_url: str, model: str) -> Any:
    """`.parse()` turns a pydantic model into a schema, and the text back into it."""
    fields = asked(model, messages=cases.user(cases.CITY_QUESTION), max_tokens=cases.MAX_FORM_TOKENS)
    found = client_of(base_url).messages.parse(**fields, output_format=Place).parsed_output
    return found.model_dump() if isinstance(found, BaseModel) else None


def stop_sequence(base_url: str, model: str) -> Any:
    found = client_of(base_url).messages.create(**asked(model, stop_sequences=[" France"]), extra_body=GREEDY)
    return [found.stop_reason, found.stop_sequence]


def count_tokens(base_url: str, model: str) -> Any:
    fields = {name: value for name, value in asked(model).items() if name != "max_tokens"}
    return client_of(base_url).messages.count_tokens(**fields).input_tokens


def models(base_url: str, model: str) -> Any:
    client = client_of(base_url)
    listed = [found.id for found in client.models.list(limit=1)]
    return {"listed": listed, "one": client.models.retrieve(model).display_name}


def errors(base_url: str, model: str) -> Any:
    client = client_of(base_url)
    return {
        "bad": cases.refused(lambda: client.messages.create(**asked(model), extra_body={"temperature": "x"})),
        "unknown": cases.refused(lambda: client.messages.create(**asked("unknown"))),
        "too long": cases.refused(
            lambda: client.messages.create(**asked(model, messages=cases.user(cases.TOO_LONG)))
        ),
        "batches": cases.refused(lambda: client.messages.batches.list().data),
    }


def asynchronous(base_url: str, model: str) -> Any:
    async def ask() -> list[str]:
        url = base_url.removesuffix("/v1")
        async with anthropic.AsyncAnthropic(base_url=url, api_key=cases.KEY, max_retries=0) as client:
            each = [client.messages.create(**asked(model), extra_body=GREEDY) for _ in range(3)]
            plain = [found.content[0].text for found in await asyncio.gather(*each)]
            async with client.messages.stream(**asked(model), extra_body=GREEDY) as stream:
                return [*plain, await stream.get_final_text()]

    return asyncio.run(ask())


if __name__ == "__main__":
    cases.run(
        version,
        message,
        stream_helper,
        raw_stream,
        beta,
        forced_call,
        parsed,
        stop_sequence,
        count_tokens,
        models,
        errors,
        asynchronous,
    )
