"""Sequences constrained to a grammar, on the real demo model: in a mixed batch, with every kind of sampling, after a takeover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from common.errors import RequestError
from common.protocol import ChatPrompt, GenerationJob, SamplingParams, ToolUse
from common.schema import grammar
from common.settings import Settings
from worker.loop.engine import StepToken
from worker.mlx.engine import MLXEngine

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "register", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), max_batch=8))


def chat(job_id: str, **fields: Any) -> GenerationJob:
    fields.setdefault("sampling", SamplingParams(temperature=0))
    prompt = ChatPrompt([{"role": "user", "content": "Tell me about a pet."}])
    return GenerationJob(
        job_id=job_id, model="m", channel="c", prompt=prompt, **({"max_tokens": 60} | fields)
    )


def run(
    engine: MLXEngine, *jobs: GenerationJob, replay: list[int] | None = None
) -> dict[str, list[StepToken]]:
    tokens: dict[str, list[StepToken]] = {}
    for job in jobs:
        engine.insert(job, engine.encode(job), replay or [])
    while engine.num_sequences:
        for event in engine.step():
            assert isinstance(event, StepToken)
            tokens.setdefault(event.job_id, []).append(event)
    return tokens


def text(tokens: list[StepToken]) -> str:
    return "".join(token.text for token in tokens)


def ids(tokens: list[StepToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_constrained_and_free_sequences_in_one_batch(engine: MLXEngine) -> None:
    """Each constrained answer validates, greedy, sampled or penalized, with log-probabilities; the unconstrained one has the tokens that it has alone."""
    held = grammar.for_json_schema(SCHEMA)
    samplings = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.2, seed=1),
        SamplingParams(temperature=0.9, top_p=0.8, top_k=50, seed=2, frequency_penalty=0.4),
    ]
    jobs = [
        chat(str(i), grammar=held, sampling=sampling, top_logprobs=2) for i, sampling in enumerate(samplings)
    ]
    free = chat("free", max_tokens=10)
    together = run(engine, *jobs, free)
    for job in jobs:
        tokens = together[job.job_id]
        assert tokens[-1].finish_reason == "stop"
        jsonschema.validate(json.loads(text(tokens)), SCHEMA)
        assert ids(run(engine, job)[job.job_id]) == ids(tokens)
        assert all(token.logprob is not None and token.logprob.logprob > -1000 for token in tokens)
    assert ids(run(engine, free)["free"]) == ids(together["free"])


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SamplingParams(temperature=1.1, seed=4)])
@pytest.mark.parametrize("asked", ["schema", pytest.param("call", marks=pytest.mark.heavy)])
def test_a_takeover_restores_the_grammar_state(
    engine: MLXEngine, asked: str, sampling: SamplingParams
) -> None:
    """After replaying the first k tokens, the rest are those of an uninterrupted run."""
    fields: dict[str, Any] = {"grammar": grammar.for_json_schema(SCHEMA)}
    if asked == "call":
        fields = {"tool_use": ToolUse(tools=[TOOL], is_required=True, is_parallel=False)}
    job = chat("a", sampling=sampling, **fields)
    whole = run(engine, job)["a"]
    assert whole[-1].finish_reason == "stop"
    for k in (1, len(whole) // 2, len(whole) - 1):
        rest = run(engine, job, replay=ids(whole)[:k])["a"]
        assert ids(whole)[:k] + ids(rest) == ids(whole)


def test_a_required_call(engine: MLXEngine) -> None:
    """Whatever the model would write, the answer is a call with valid arguments."""
    job = chat("a", tool_use=ToolUse(tools=[TOOL], is_required=True, is_parallel=False))
    said = text(run(engine, job)["a"])
    call = json.loads(said.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] == "register"
    jsonschema.validate(call["arguments"], SCHEMA)


def test_a_grammar_that_cannot_be_compiled(engine: MLXEngine) -> None:
    """A 400 before the engine accepts the job; the API checks it too, but a worker does not rely on that."""
    with pytest.raises(RequestError) as refused:
        engine.encode(chat("a", grammar=grammar.for_json_schema({"enum": []})))
    assert (refused.value.status, refused.value.param) == (400, "response_format")
    assert engine.num_sequences == 0
