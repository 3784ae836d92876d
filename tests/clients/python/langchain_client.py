"""LangChain's ChatOpenAI: invoke, stream, batch, typed answers, functions and their results, errors."""

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
    get_time,
    get_weather,
    refused,
    run,
)
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI


def llm(url: str, model: str, **options: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS, "max_retries": 0} | options
    return ChatOpenAI(base_url=url, api_key=KEY, model=model, timeout=120, **settings)


def form(url: str, model: str) -> ChatOpenAI:
    return llm(url, model, max_tokens=MAX_FORM_TOKENS)


def invoke(url: str, model: str) -> Any:
    answer = llm(url, model).invoke(QUESTION)
    return {
        "content": answer.content,
        "finish_reason": answer.response_metadata["finish_reason"],
        "usage": answer.usage_metadata,
    }


def stream(url: str, model: str) -> Any:
    chunks = list(llm(url, model, stream_usage=True).stream(QUESTION))
    whole = AIMessageChunk("")
    for chunk in chunks:
        whole += chunk
    return {
        "deltas": [chunk.content for chunk in chunks if chunk.content],
        "content": whole.content,
        "finish_reason": whole.response_metadata["finish_reason"],
        "usage": whole.usage_metadata,
    }


def asynchronous(url: str, model: str) -> Any:
    async def ask() -> Any:
        answer = await llm(url, model).ainvoke(QUESTION)
        streamed = [chunk.content async for chunk in llm(url, model).astream(QUESTION)]
        return [answer.content, "".join(streamed)]

    return asyncio.run(ask())


def batch(url: str, model: str) -> Any:
    questions: list[Any] = [QUESTION, "Count from 1 to 5.", [SystemMessage("Be brief."), HumanMessage("Hi.")]]
    chain = llm(url, model)
    together = chain.batch(questions)
    return [[a.content for a in together], [chain.invoke(q).content for q in questions]]


def stop(url: str, model: str) -> Any:
    return llm(url, model).invoke(QUESTION, stop=["Paris"]).content


def logprobs(url: str, model: str) -> Any:
    answer = llm(url, model, logprobs=True, top_logprobs=2).invoke(QUESTION)
    return [item["token"] for item in answer.response_metadata["logprobs"]["content"]]


def structured(url: str, model: str) -> Any:
    chain = form(url, model).with_structured_output(City)
    return chain.invoke(CITY_QUESTION).model_dump()


def structured_stream(url: str, model: str) -> Any:
    chain = form(url, model).with_structured_output(City)
    return list(chain.stream(CITY_QUESTION))[-1].model_dump()


def structured_as_function(url: str, model: str) -> Any:
    chain = form(url, model).with_structured_output(City, method="function_calling")
    return chain.invoke(CITY_QUESTION).model_dump()


def structured_strict_function(url: str, model: str) -> Any:
    chain = form(url, model).with_structured_output(City, method="function_calling", strict=True)
    return chain.invoke(CITY_QUESTION).model_dump()


def structured_from_schema(url: str, model: str) -> Any:
    schema = {"title": "city"} | City.model_json_schema()
    chain = form(url, model).with_structured_output(schema, method="json_schema")
    return City.model_validate(chain.invoke(CITY_QUESTION)).model_dump()


def json_mode(url: str, model: str) -> Any:
    """Any object is valid, and its length depends on the model: the SDK raises if it is cut off."""
    chain = form(url, model).with_structured_output(None, method="json_mode")
    try:
        return {"parsed": chain.invoke(CITY_QUESTION)}
    except openai.LengthFinishReasonError as error:
        return {"cut": error.completion.choices[0].message.content}


def functions(url: str, model: str) -> Any:
    """A required call of any function, of a named one, and the same in a stream."""
    plain = form(url, model)
    offered = [get_weather, get_time]
    required = plain.bind_tools(offered, tool_choice="any", parallel_tool_calls=False)
    named = plain.bind_tools(offered, tool_choice="get_weather")
    whole = AIMessageChunk("")
    for chunk in required.stream(WEATHER_QUESTION):
        whole += chunk
    answers = {
        "required": required.invoke(WEATHER_QUESTION),
        "named": named.invoke(WEATHER_QUESTION),
        "streamed": whole,
    }
    return {
        how: {
            "calls": [[call["name"], call["args"]] for call in answer.tool_calls],
            "invalid": answer.invalid_tool_calls,
            "finish_reason": answer.response_metadata["finish_reason"],
        }
        for how, answer in answers.items()
    }


def function_result(url: str, model: str) -> Any:
    """LangChain's own message is sent back unchanged, then the results; the functions are still offered."""
    named = form(url, model).bind_tools([get_weather], tool_choice="get_weather")
    call = named.invoke(WEATHER_QUESTION)
    counts = []
    for result in ("20", "20 " * 50):
        results = [ToolMessage(result, tool_call_id=each["id"]) for each in call.tool_calls]
        offered = llm(url, model).bind_tools([get_weather], tool_choice="none")
        answer = offered.invoke([HumanMessage(WEATHER_QUESTION), call, *results])
        counts.append(answer.usage_metadata["input_tokens"])
    return {"prompt_tokens": counts, "tool_calls": answer.tool_calls, "kind": type(answer).__name__}


def unknown_model(url: str, _model: str) -> Any:
    return refused(lambda: llm(url, "no-such-model").invoke(QUESTION))


def unknown_model_stream(url: str, _model: str) -> Any:
    return refused(lambda: list(llm(url, "no-such-model").stream(QUESTION)))


def too_long(url: str, model: str) -> Any:
    return refused(lambda: llm(url, model).invoke(TOO_LONG))


if __name__ == "__main__":
    run(
        invoke,
        stream,
        asynchronous,
        batch,
        stop,
        logprobs,
        structured,
        structured_stream,
        structured_as_function,
        structured_strict_function,
        structured_from_schema,
        json_mode,
        functions,
        function_result,
        unknown_model,
        unknown_model_stream,
        too_long,
    )
