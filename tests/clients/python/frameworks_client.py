"""Agent frameworks: openai-agents and pydantic-ai, each by all of its protocols, with a function, streams and typed answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import agents
import openai
from cases import KEY, QUESTION, WEATHER_QUESTION, City, run
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

WEATHER = "rain, 7 degrees"
agents.set_tracing_disabled(disabled=True)


def get_weather(city: str, unit: str) -> str:
    """The weather in a city."""
    assert (city, unit) == ("Paris", "celsius")
    return WEATHER


def agents_models(url: str, model: str) -> dict[str, Any]:
    client = openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)
    return {
        "chat": agents.OpenAIChatCompletionsModel(model=model, openai_client=client),
        "responses": agents.OpenAIResponsesModel(model=model, openai_client=client),
    }


def pydantic_models(url: str, model: str) -> dict[str, Any]:
    provider = OpenAIProvider(base_url=url, api_key=KEY)
    anthropic = AnthropicProvider(base_url=url.removesuffix("/v1"), api_key=KEY)
    return {
        "chat": OpenAIChatModel(model, provider=provider),
        "responses": OpenAIResponsesModel(model, provider=provider),
        "anthropic": AnthropicModel(model, provider=anthropic),
    }


def openai_models(url: str, model: str) -> dict[str, Any]:
    """pydantic-ai refuses a typed answer without a function for Anthropic models that it does not know."""
    return {kind: each for kind, each in pydantic_models(url, model).items() if kind != "anthropic"}


def by_model(models: Callable[[str, str], dict[str, Any]], name: str, ask: Callable[[Any], Any]) -> Any:
    """A case for each model."""

    def case(url: str, model: str) -> Any:
        async def ask_each() -> Any:
            return {kind: await ask(each) for kind, each in models(url, model).items()}

        return asyncio.run(ask_each())

    case.__name__ = name
    return case


async def agents_tool(model: Any) -> Any:
    agent = agents.Agent(
        name="Assistant", instructions="Answer.", model=model, tools=[agents.function_tool(get_weather)]
    )
    result = await agents.Runner.run(agent, WEATHER_QUESTION)
    return [result.final_output, [type(item).__name__ for item in result.new_items]]


async def agents_stream(model: Any) -> Any:
    agent = agents.Agent(
        name="Assistant", instructions="Answer.", model=model, tools=[agents.function_tool(get_weather)]
    )
    result = agents.Runner.run_streamed(agent, WEATHER_QUESTION)
    events = [event async for event in result.stream_events()]
    deltas = [
        event.data.delta
        for event in events
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    return [result.final_output, "".join(deltas)]


async def agents_typed(model: Any) -> Any:
    agent = agents.Agent(name="Assistant", model=model, output_type=City)
    return (await agents.Runner.run(agent, QUESTION)).final_output.model_dump()


async def pydantic_tool(model: Any) -> Any:
    return (await Agent(model, tools=[get_weather]).run(WEATHER_QUESTION)).output


async def pydantic_stream(model: Any) -> Any:
    async with Agent(model, tools=[get_weather]).run_stream(WEATHER_QUESTION) as result:
        texts = [text async for text in result.stream_text(delta=True, debounce_by=None)]
    return ["".join(texts), len(texts)]


async def pydantic_typed(model: Any) -> Any:
    return (await Agent(model, output_type=City).run(QUESTION)).output.model_dump()


async def pydantic_native(model: Any) -> Any:
    return (await Agent(model, output_type=NativeOutput(City)).run(QUESTION)).output.model_dump()


if __name__ == "__main__":
    run(
        by_model(agents_models, "agents_tool", agents_tool),
        by_model(agents_models, "agents_stream", agents_stream),
        by_model(agents_models, "agents_typed", agents_typed),
        by_model(pydantic_models, "pydantic_tool", pydantic_tool),
        by_model(pydantic_models, "pydantic_stream", pydantic_stream),
        by_model(pydantic_models, "pydantic_typed", pydantic_typed),
        by_model(openai_models, "pydantic_native", pydantic_native),
    )
