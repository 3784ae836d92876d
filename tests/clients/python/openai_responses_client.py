"""The openai SDK's responses, and its newest chat helpers: create, stream, parse, tools, counts, errors.

The scripted model calls `get_weather` once, and answers with its result.
"""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from cases import KEY, QUESTION, WEATHER_QUESTION, City, get_weather, refused, run, user
from openai.types.chat import ChatCompletionMessageFunctionToolCall

WEATHER = "rain, 7 degrees"


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)


def weather_tool() -> Any:
    tool = openai.pydantic_function_tool(get_weather)["function"]
    return {"type": "function", "name": tool["name"], "parameters": tool["parameters"], "strict": True}


def version(_url: str, _model: str) -> Any:
    return openai.__version__


def create(url: str, model: str) -> Any:
    got = client(url).responses.create(model=model, instructions="Answer.", input=QUESTION, store=False)
    assert got.usage is not None
    return {
        "text": got.output_text,
        "status": got.status,
        "kinds": [item.type for item in got.output],
        "usage": got.usage.to_dict(),
    }


def stream(url: str, model: str) -> Any:
    with client(url).responses.stream(model=model, input=QUESTION, store=False) as events:
        seen = list(events)
        final = events.get_final_response()
    return {
        "kinds": [event.type for event in seen],
        "numbers": [event.sequence_number for event in seen],
        "deltas": [event.delta for event in seen if event.type == "response.output_text.delta"],
        "text": final.output_text,
    }


def raw_stream(url: str, model: str) -> Any:
    events = client(url).responses.create(model=model, input=QUESTION, store=False, stream=True)
    return [event.type for event in events]


def asynchronous(url: str, model: str) -> Any:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as asking:
            one = asking.responses.create(model=model, input=QUESTION, store=False)
            other = asking.responses.create(model=model, input=QUESTION, store=False)
            return [got.output_text for got in await asyncio.gather(one, other)]

    return asyncio.run(ask())


def parse(url: str, model: str) -> Any:
    got = client(url).responses.parse(model=model, input=QUESTION, text_format=City, store=False)
    return got.output_parsed.model_dump()


def parse_stream(url: str, model: str) -> Any:
    asked = {"model": model, "input": QUESTION, "text_format": City, "store": False}
    with client(url).responses.stream(**asked) as events:
        events.until_done()
        return events.get_final_response().output_parsed.model_dump()


def tools(url: str, model: str) -> Any:
    """A call and its result, the history sent back by the client, plain and streamed."""
    ask = client(url).responses
    history: list[Any] = user(WEATHER_QUESTION)
    first = ask.create(model=model, input=history, tools=[weather_tool()], store=False)
    [call] = [item for item in first.output if item.type == "function_call"]
    history += [item.to_dict() for item in first.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": WEATHER})
    second = ask.create(model=model, input=history, tools=[weather_tool()], store=False)
    asked = {"model": model, "input": user(WEATHER_QUESTION), "tools": [weather_tool()], "store": False}
    with ask.stream(**asked) as events:
        kinds = {event.type for event in events}
        [streamed] = events.get_final_response().output
    return {
        "call": [call.name, get_weather.model_validate_json(call.arguments).model_dump()],
        "text": second.output_text,
        "kinds": sorted(kinds),
        "streamed": [streamed.name, get_weather.model_validate_json(streamed.arguments).model_dump()],
    }


def stored(url: str, model: str) -> Any:
    """A stored response is continued by its id, retrieved and deleted."""
    ask = client(url).responses
    first = ask.create(model=model, input=WEATHER_QUESTION, tools=[weather_tool()])
    [call] = [item for item in first.output if item.type == "function_call"]
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": WEATHER}]
    second = ask.create(model=model, previous_response_id=first.id, input=result, tools=[weather_tool()])
    found = ask.retrieve(second.id)
    items = [item.type for item in ask.input_items.list(second.id)]
    ask.delete(second.id)
    gone = refused(lambda: ask.retrieve(second.id))
    return {"text": second.output_text, "found": found.output_text, "items": items, "gone": gone["status"]}


def background(url: str, model: str) -> Any:
    """A response in the background is followed from the middle of its stream."""
    ask = client(url).responses
    made = ask.create(model=model, input=QUESTION, background=True)
    everything = list(ask.retrieve(made.id, stream=True))
    rest = list(ask.retrieve(made.id, stream=True, starting_after=3))
    return {
        "status": made.status,
        "last": everything[-1].type,
        "same": [event.to_dict() for event in everything[4:]] == [event.to_dict() for event in rest],
        "text": ask.retrieve(made.id).output_text,
    }


def count(url: str, model: str) -> Any:
    counted = client(url).responses.input_tokens.count(model=model, input=QUESTION)
    used = client(url).responses.create(model=model, input=QUESTION, store=False).usage
    return [counted.input_tokens, used.input_tokens if used else None]


def chat_tools(url: str, model: str) -> Any:
    """The chat helpers of the same release."""
    asked: Any = {
        "model": model,
        "messages": user(WEATHER_QUESTION),
        "tools": [openai.pydantic_function_tool(get_weather)],
    }
    choice = client(url).chat.completions.parse(**asked).choices[0]
    with client(url).chat.completions.stream(**asked) as events:
        streamed = events.get_final_completion().choices[0]
    calls = [*(choice.message.tool_calls or []), *(streamed.message.tool_calls or [])]
    assert all(isinstance(call, ChatCompletionMessageFunctionToolCall) for call in calls)
    return [call.function.parsed_arguments.model_dump() for call in calls]


def models(url: str, model: str) -> Any:
    return [model in [each.id for each in client(url).models.list()], client(url).models.retrieve(model).id]


def unknown_model(url: str, _model: str) -> Any:
    return refused(lambda: client(url).responses.create(model="no-such-model", input=QUESTION))


def wrong_value(url: str, model: str) -> Any:
    return refused(lambda: client(url).responses.create(model=model, input=QUESTION, temperature=3))


if __name__ == "__main__":
    run(
        version,
        create,
        stream,
        raw_stream,
        asynchronous,
        parse,
        parse_stream,
        tools,
        stored,
        background,
        count,
        chat_tools,
        models,
        unknown_model,
        wrong_value,
    )
