"""litellm: completions, streams, functions, typed answers and errors, by its providers for OpenAI-compatible servers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched from the internet at each start

import litellm
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

PROVIDERS = ("openai", "hosted_vllm")


def greedy(url: str, model: str, question: str = QUESTION, provider: str = "openai", **options: Any) -> Any:
    return {
        "model": f"{provider}/{model}",
        "api_base": url,
        "api_key": KEY,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "messages": user(question),
        "num_retries": 0,
        "timeout": 120,
    } | options


def weather(url: str, model: str) -> Any:
    function = {
        "name": "get_weather",
        "description": get_weather.__doc__,
        "parameters": get_weather.model_json_schema(),
    }
    return greedy(
        url,
        model,
        WEATHER_QUESTION,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=MAX_FORM_TOKENS,
    )


def calls_of(message: Any) -> Any:
    return [
        [c.id, c.type, c.function.name, get_weather.model_validate_json(c.function.arguments).model_dump()]
        for c in message.tool_calls
    ]


def completion(url: str, model: str) -> Any:
    answers = {}
    for provider in PROVIDERS:
        answer = litellm.completion(**greedy(url, model, provider=provider))
        answers[provider] = {
            "content": answer.choices[0].message.content,
            "finish_reason": answer.choices[0].finish_reason,
            "usage": answer.usage.model_dump(),
        }
    return answers


def stream(url: str, model: str) -> Any:
    asked = greedy(url, model, stream=True, stream_options={"include_usage": True})
    chunks = list(litellm.completion(**asked))
    whole = litellm.stream_chunk_builder(chunks)
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    return {
        "deltas": [delta for delta in deltas if delta],
        "content": whole.choices[0].message.content,
        "finish_reason": whole.choices[0].finish_reason,
        "usage": whole.usage.model_dump(),
    }


def asynchronous(url: str, model: str) -> Any:
    async def ask() -> Any:
        plain = await litellm.acompletion(**greedy(url, model))
        chunks = await litellm.acompletion(**greedy(url, model, stream=True))
        streamed = [chunk.choices[0].delta.content or "" async for chunk in chunks]
        return [plain.choices[0].message.content, "".join(streamed)]

    return asyncio.run(ask())


def text_completion(url: str, model: str) -> Any:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        prompt="The capital of France is",
        api_base=url,
        api_key=KEY,
        temperature=0,
        max_tokens=3,
    )
    return answer.choices[0].text


def choices(url: str, model: str) -> Any:
    answer = litellm.completion(**greedy(url, model, n=2))
    return [choice.message.content for choice in answer.choices]


def structured(url: str, model: str) -> Any:
    asked = greedy(url, model, CITY_QUESTION, response_format=City, max_tokens=MAX_FORM_TOKENS)
    answer = litellm.completion(**asked)
    return City.model_validate_json(answer.choices[0].message.content).model_dump()


def functions(url: str, model: str) -> Any:
    choice = litellm.completion(**weather(url, model)).choices[0]
    return {"finish_reason": choice.finish_reason, "calls": calls_of(choice.message)}


def functions_stream(url: str, model: str) -> Any:
    whole = litellm.stream_chunk_builder(list(litellm.completion(**weather(url, model), stream=True)))
    choice = whole.choices[0]
    return {"finish_reason": choice.finish_reason, "calls": calls_of(choice.message)}


def function_result(url: str, model: str) -> Any:
    """litellm's own message is sent back unchanged, then the results."""
    message = litellm.completion(**weather(url, model)).choices[0].message
    counts = []
    for result in ("20", "20 " * 50):
        results = [
            {"role": "tool", "tool_call_id": c.id, "name": c.function.name, "content": result}
            for c in message.tool_calls
        ]
        asked = weather(url, model) | {
            "messages": [*user(WEATHER_QUESTION), message, *results],
            "tool_choice": "none",
            "max_tokens": MAX_TOKENS,
        }
        answer = litellm.completion(**asked)
        counts.append(answer.usage.prompt_tokens)
    return {"prompt_tokens": counts, "tool_calls": answer.choices[0].message.tool_calls}


def unknown_model(url: str, _model: str) -> Any:
    return refused(lambda: litellm.completion(**greedy(url, "no-such-model")))


def wrong_value(url: str, model: str) -> Any:
    return refused(lambda: litellm.completion(**greedy(url, model, temperature=3)))


def too_long(url: str, model: str) -> Any:
    return refused(lambda: litellm.completion(**greedy(url, model, TOO_LONG)))


if __name__ == "__main__":
    run(
        completion,
        stream,
        asynchronous,
        text_completion,
        choices,
        structured,
        functions,
        functions_stream,
        function_result,
        unknown_model,
        wrong_value,
        too_long,
    )
