"""A small model's answers end if a grammar constrains them: the demo model, several prompts and seeds, up to temperature 1.5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from common.protocol import ChatPrompt, GenerationJob, SamplingParams, ToolUse
from common.schema import grammar
from common.settings import Settings
from worker.loop.engine import StepToken
from worker.mlx.engine import MLXEngine

PROMPTS = ("How many people live in Paris?", "Repeat: 1111111111111111111111111111111111")
SAMPLINGS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=1.5, seed=2),
    SamplingParams(temperature=1.5, seed=3),
)
SCHEMAS: dict[str, Any] = {
    "integers": {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in ("population", "area", "year")},
        "required": ["population", "area", "year"],
    },
    "numbers": {
        "type": "object",
        "properties": {
            "pi": {"type": "number"},
            "share": {"type": "number", "exclusiveMinimum": 0},
            "step": {"type": "integer", "multipleOf": 7},
            "ratio": {"type": "number", "minimum": -1, "maximum": 1},
        },
        "required": ["pi", "share", "step", "ratio"],
    },
}


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), max_batch=8))


def answers(
    engine: MLXEngine, text: str, max_tokens: int, tool_use: ToolUse | None = None
) -> list[tuple[str, str | None]]:
    """The text and the finish reason of each prompt's answer with each kind of sampling."""
    tokens: dict[str, list[StepToken]] = {}
    for i, prompt in enumerate(PROMPTS):
        for k, sampling in enumerate(SAMPLINGS):
            job = GenerationJob(
                job_id=f"{i}/{k}",
                model="m",
                channel="c",
                prompt=ChatPrompt([{"role": "user", "content": prompt}]),
                tool_use=tool_use,
                max_tokens=max_tokens,
                grammar=text,
                sampling=sampling,
            )
            engine.insert(job, engine.encode(job), [])
    while engine.num_sequences:
        for event in engine.step():
            assert isinstance(event, StepToken)
            tokens.setdefault(event.job_id, []).append(event)
    return [("".join(token.text for token in each), each[-1].finish_reason) for each in tokens.values()]


@pytest.mark.parametrize("name", SCHEMAS)
def test_numbers_end(engine: MLXEngine, name: str) -> None:
    """Each answer is complete and validates, although the schema does not bound a number."""
    for text, reason in answers(engine, grammar.for_json_schema(SCHEMAS[name]), 160):
        assert reason == "stop", text
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {}},
        {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
        },
        pytest.param(
            {"properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]},
            marks=pytest.mark.heavy,
        ),
    ],
)
@pytest.mark.parametrize("function", [pytest.param(None, marks=pytest.mark.heavy), "get_weather"])
def test_forced_calls_end(engine: MLXEngine, parameters: dict[str, Any], function: str | None) -> None:
    """Each forced call is complete, and its arguments are an object of the declared names."""
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    tool_use = ToolUse(tools=tools, function=function, is_required=True, is_parallel=function is not None)
    for text, reason in answers(engine, grammar.for_tool_calls(tool_use), 100, tool_use):
        assert reason == "stop", text
        for call in text.split("</tool_call>")[:-1]:
            arguments = json.loads(call.strip().removeprefix("<tool_call>"))["arguments"]
            assert arguments.keys() <= parameters["properties"].keys()
            jsonschema.validate(arguments, parameters)
