"""The anthropic SDK for Python: create, stream, parse, the tool runner, counts, models, errors.

The scripted model calls `get_weather` once, and answers with its result.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import anthropic
from anthropic import beta_tool
from cases import KEY, MAX_FORM_TOKENS, QUESTION, WEATHER_QUESTION, City, get_weather, refused, run, user

WEATHER = "rain, 7 degrees"


def client(url: str) -> anthropic.Anthropic:
    base_url = url.removesuffix("/v1")
    return anthropic.Anthropic(base_url=base_url, api_key=KEY, max_retries=0, timeout=60)


def asking(model: str, question: str = QUESTION, **options: Any) -> Any:
    return {"model": model, "max_tokens": MAX_FORM_TOKENS, "messages": user(question)} | options


def weather_tool() -> Any:
    schema = get_weather.model_json_schema()
    return {"name": "get_weather", "description": "The weather in a city.", "input_schema": schema}


def version(_url: str, _model: str) -> Any:
    return anthropic.__version__


def create(url: str, model: str) -> Any:
    got = client(url).messages.create(**asking(model, system="Answer."))
    return {
        "id": got.id,
        "text": [block.text for block in got.content if block.type == "text"],
        "stop_reason": got.stop_reason,
        "usage": got.usage.to_dict(),
        "request_id": got._request_id,
    }


def stream(url: str, model: str) -> Any:
    with client(url).messages.stream(**asking(model)) as events:
        texts = list(events.text_stream)
        final = events.get_final_message()
    return {
        "texts": texts,
        "text": final.content[0].text,
        "stop_reason": final.stop_reason,
        "usage": final.usage.to_dict(),
    }


def raw_stream(url: str, model: str) -> Any:
    return [event.type for event in client(url).messages.create(**asking(model, stream=True))]


def asynchronous(url: str, model: str) -> Any:
    async def ask() -> Any:
        base_url = url.removesuffix("/v1")
        async with anthropic.AsyncAnthropic(base_url=base_url, api_key=KEY, max_retries=0) as asked:
            plain = await asked.messages.create(**asking(model))
            async with asked.messages.stream(**asking(model)) as events:
                streamed = [text async for text in events.text_stream]
        return [plain.content[0].text, "".join(streamed)]

    return asyncio.run(ask())


def stop_sequence(url: str, model: str) -> Any:
    got = client(url).messages.create(**asking(model, stop_sequences=["Par"]))
    return [got.content[0].text, got.stop_reason, got.stop_sequence]


def max_tokens(url: str, model: str) -> Any:
    got = client(url).messages.create(**asking(model, max_tokens=3))
    return [got.stop_reason, got.usage.output_tokens]


def parse(url: str, model: str) -> Any:
    got = client(url).messages.parse(**asking(model, output_format=City))
    return got.parsed_output.model_dump()


def parse_stream(url: str, model: str) -> Any:
    with client(url).messages.stream(**asking(model, output_format=City)) as events:
        return events.get_final_message().parsed_output.model_dump()


def tools(url: str, model: str) -> Any:
    """A call and its result, the history sent back by the client; the call streamed too."""
    ask = client(url).messages
    asked = asking(model, WEATHER_QUESTION, tools=[weather_tool()])
    first = ask.create(**asked)
    [call] = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": WEATHER}]}
    history = [
        *asked["messages"],
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = ask.create(**asked | {"messages": history})
    with ask.stream(**asked) as events:
        partial = "".join(event.partial_json for event in events if event.type == "input_json")
        streamed = events.get_final_message()
    return {
        "call": [call.name, call.input],
        "stop_reasons": [first.stop_reason, second.stop_reason],
        "text": second.content[0].text,
        "partial": partial,
        "streamed": streamed.content[-1].input,
    }


def _run_tools(url: str, model: str, **options: Any) -> Any:
    asked: list[Any] = []

    @beta_tool(name="get_weather")
    def weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
        """The weather in a city."""
        asked.append({"city": city, "unit": unit})
        return WEATHER

    tool: Any = weather
    runner = client(url).beta.messages.tool_runner(**asking(model, WEATHER_QUESTION, tools=[tool], **options))
    final = runner.until_done()
    return {"asked": asked, "text": final.content[0].text, "stop_reason": final.stop_reason}


def tool_runner(url: str, model: str) -> Any:
    return _run_tools(url, model)


def tool_runner_stream(url: str, model: str) -> Any:
    return _run_tools(url, model, stream=True)


def tool_choice(url: str, model: str) -> Any:
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    asked = asking(model, WEATHER_QUESTION, tools=[weather_tool()], tool_choice=choice)
    return [block.type for block in client(url).messages.create(**asked).content]


def count_tokens(url: str, model: str) -> Any:
    asked = asking(model, tools=[weather_tool()])
    used = client(url).messages.create(**asked).usage.input_tokens
    del asked["max_tokens"]
    return [client(url).messages.count_tokens(**asked).input_tokens, used]


def models(url: str, model: str) -> Any:
    found = client(url).models.retrieve(model)
    return [model in [each.id for each in client(url).models.list()], found.id, found.type]


def unknown_model(url: str, _model: str) -> Any:
    return refused(lambda: client(url).messages.create(**asking("no-such-model")))


def wrong_value(url: str, model: str) -> Any:
    return refused(lambda: client(url).messages.create(**asking(model, extra_body={"temperature": 3})))


if __name__ == "__main__":
    run(
        version,
        create,
        stream,
        raw_stream,
        asynchronous,
        stop_sequence,
        max_tokens,
        parse,
        parse_stream,
        tools,
        tool_runner,
        tool_runner_stream,
        tool_choice,
        count_tokens,
        models,
        unknown_model,
        wrong_value,
    )
