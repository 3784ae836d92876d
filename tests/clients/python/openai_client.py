"""The openai SDK for Python: plain, asynchronous, `.stream()` and `.parse()`, functions and their results, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from cases import (
    CITY_QUESTION,
    KEY,
    MAX_FORM_TOKENS,
    MAX_TOKENS,
    QUESTION,
    TOO_LONG,
    WEATHER_QUESTION,
    City,
    get_weather,
    refused,
    run,
    user,
)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120)


def greedy(model: str, question: str = QUESTION, **options: Any) -> Any:
    return {"model": model, "temperature": 0, "max_tokens": MAX_TOKENS, "messages": user(question)} | options


def city(model: str) -> Any:
    return greedy(model, CITY_QUESTION, response_format=City, max_tokens=MAX_FORM_TOKENS)


def weather(model: str) -> Any:
    tools = [openai.pydantic_function_tool(get_weather)]
    return greedy(
        model,
        WEATHER_QUESTION,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=MAX_FORM_TOKENS,
    )


def version(_url: str, _model: str) -> Any:
    return openai.__version__


def chat(url: str, model: str) -> Any:
    answer = client(url).chat.completions.create(**greedy(model))
    choice = answer.choices[0]
    return {
        "content": choice.message.content,
        "finish_reason": choice.finish_reason,
        "usage": answer.usage.to_dict() if answer.usage else None,
        "request_id": answer._request_id,
    }


def max_completion_tokens(url: str, model: str) -> Any:
    asked = greedy(model, max_completion_tokens=3)
    del asked["max_tokens"]
    answer = client(url).chat.completions.create(**asked)
    return [answer.choices[0].finish_reason, answer.usage.completion_tokens if answer.usage else None]


def chat_stream(url: str, model: str) -> Any:
    asked = greedy(model, stream_options={"include_usage": True})
    with client(url).chat.completions.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    return {
        "deltas": [event.delta for event in events if event.type == "content.delta"],
        "done": [event.content for event in events if event.type == "content.done"],
        "content": final.choices[0].message.content,
        "finish_reason": final.choices[0].finish_reason,
        "usage": final.usage.to_dict() if final.usage else None,
    }


def asynchronous(url: str, model: str) -> Any:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as asking:
            plain = [asking.chat.completions.create(**greedy(model)) for _ in range(3)]
            answers = await asyncio.gather(*plain)
            async with asking.chat.completions.stream(**greedy(model)) as stream:
                streamed = await stream.get_final_completion()
            return [answer.choices[0].message.content for answer in [*answers, streamed]]

    return asyncio.run(ask())


def content_parts(url: str, model: str) -> Any:
    messages = [
        {"role": "developer", "content": "Answer."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    strings = [{"role": "system", "content": "Answer."}, {"role": "user", "content": QUESTION}]
    ask = client(url).chat.completions.create
    answers = [ask(**greedy(model, messages=each)) for each in (messages, strings)]
    return [[a.choices[0].message.content, a.usage.prompt_tokens] for a in answers]


def optional_fields(url: str, model: str) -> Any:
    """Parameters that applications set by default and that do not change the answer."""
    habits = {
        "n": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "stop": None,
        "user": "someone",
        "store": False,
        "metadata": {"app": "test"},
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "safety_identifier": "someone",
        "prompt_cache_key": "key",
    }
    answer = client(url).chat.completions.create(**greedy(model, **habits))
    return answer.choices[0].message.content


def choices(url: str, model: str) -> Any:
    answer = client(url).chat.completions.create(**greedy(model, n=3, temperature=1, seed=11))
    return {
        "indexes": [choice.index for choice in answer.choices],
        "contents": [choice.message.content for choice in answer.choices],
        "completion_tokens": answer.usage.completion_tokens if answer.usage else None,
    }


def parse(url: str, model: str) -> Any:
    answer = client(url).chat.completions.parse(**city(model))
    parsed = answer.choices[0].message.parsed
    return {"parsed": parsed.model_dump(), "finish_reason": answer.choices[0].finish_reason}


def parse_stream(url: str, model: str) -> Any:
    with client(url).chat.completions.stream(**city(model)) as stream:
        final = stream.get_final_completion()
    return final.choices[0].message.parsed.model_dump()


def function(url: str, model: str) -> Any:
    choice = client(url).chat.completions.parse(**weather(model)).choices[0]
    calls = choice.message.tool_calls or []
    return {
        "content": choice.message.content,
        "finish_reason": choice.finish_reason,
        "calls": [[c.id, c.type, c.function.name, c.function.parsed_arguments.model_dump()] for c in calls],
    }


def function_stream(url: str, model: str) -> Any:
    with client(url).chat.completions.stream(**weather(model)) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    calls = choice.message.tool_calls or []
    return {
        "kinds": sorted(set(kinds)),
        "finish_reason": choice.finish_reason,
        "calls": [[c.id, c.type, c.function.name, c.function.parsed_arguments.model_dump()] for c in calls],
    }


def named_function(url: str, model: str) -> Any:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    asked = weather(model) | {"tool_choice": choice}
    answer = client(url).chat.completions.create(**asked)
    return [
        [c.function.name, get_weather.model_validate_json(c.function.arguments).model_dump()]
        for c in answer.choices[0].message.tool_calls
    ]


def function_result(url: str, model: str) -> Any:
    """The SDK's own message is sent back unchanged, as its documentation shows, then the result, short or long."""
    message = client(url).chat.completions.parse(**weather(model)).choices[0].message
    counts = []
    for result in ("20", "20 " * 50):
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": result} for call in message.tool_calls
        ]
        asked = weather(model) | {
            "messages": [*user(WEATHER_QUESTION), message, *results],
            "tool_choice": "none",
            "max_tokens": MAX_TOKENS,
        }
        answer = client(url).chat.completions.create(**asked)
        counts.append(answer.usage.prompt_tokens)
    choice = answer.choices[0]
    return {
        "prompt_tokens": counts,
        "content": choice.message.content,
        "tool_calls": choice.message.tool_calls,
        "finish_reason": choice.finish_reason,
    }


def models(url: str, model: str) -> Any:
    return [[each.id for each in client(url).models.list()], client(url).models.retrieve(model).id]


def unknown_model(url: str, _model: str) -> Any:
    return refused(lambda: client(url).chat.completions.create(**greedy("no-such-model")))


def wrong_value(url: str, model: str) -> Any:
    return refused(lambda: client(url).chat.completions.create(**greedy(model, temperature=3)))


def too_long(url: str, model: str) -> Any:
    return refused(lambda: client(url).chat.completions.create(**greedy(model, TOO_LONG)))


if __name__ == "__main__":
    run(
        version,
        chat,
        max_completion_tokens,
        chat_stream,
        asynchronous,
        content_parts,
        optional_fields,
        choices,
        parse,
        parse_stream,
        function,
        function_stream,
        named_function,
        function_result,
        models,
        unknown_model,
        wrong_value,
        too_long,
    )
