"""LangChain's ChatOpenAI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import PYTHON_SCRIPTS, Outcomes, RunScript
from tests.clients.expected import (
    ANSWER,
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    UNKNOWN_MODEL,
    is_call,
    is_city,
)


@pytest.fixture(scope="module")
def got(run_script: RunScript, python: Path) -> Outcomes:
    return run_script(python, PYTHON_SCRIPTS / "langchain_client.py")


def assert_counts(usage: dict[str, Any]) -> None:
    assert (usage["input_tokens"], usage["output_tokens"]) == (PROMPT_TOKENS, COMPLETION_TOKENS)


def test_invoke(got: Outcomes) -> None:
    """The right answer, with finish reason and usage."""
    answer = got["invoke"]
    assert (answer["content"], answer["finish_reason"]) == (ANSWER, "stop")
    assert_counts(answer["usage"])


def test_stream(got: Outcomes) -> None:
    """The chunks are the non-streamed answer in several parts, with its usage."""
    stream = got["stream"]
    assert "".join(stream["deltas"]) == stream["content"] == ANSWER
    assert len(stream["deltas"]) > 3
    assert stream["finish_reason"] == "stop"
    assert_counts(stream["usage"])


def test_asynchronous(got: Outcomes) -> None:
    """ainvoke and astream give the same answer."""
    assert got["asynchronous"] == [ANSWER, ANSWER]


def test_batch(got: Outcomes) -> None:
    """Concurrent questions get the same answers as one after another."""
    together, one_by_one = got["batch"]
    assert together == one_by_one
    assert together[0] == ANSWER


def test_stop(got: Outcomes) -> None:
    """A stop word ends the answer before it."""
    assert got["stop"] == "The capital of France is "


def test_logprobs(got: Outcomes) -> None:
    """One log-probability per token; the tokens add up to the answer."""
    assert "".join(got["logprobs"]) == ANSWER


@pytest.mark.parametrize(
    "case",
    ["structured", "structured_as_function", "structured_strict_function", "structured_from_schema"],
)
def test_structured_output(got: Outcomes, case: str) -> None:
    """with_structured_output returns an object of the type, by schema and by function, strict and not."""
    assert is_city(got[case])


def test_structured_stream(got: Outcomes) -> None:
    """The last object of the stream equals the non-streamed one."""
    assert got["structured_stream"] == got["structured"]


def test_json_mode(got: Outcomes) -> None:
    """The answer is an object, or the beginning of one that was cut off."""
    answer = got["json_mode"]
    if "cut" in answer:
        assert answer["cut"].lstrip().startswith("{")
    else:
        assert isinstance(answer["parsed"], dict)


@pytest.mark.parametrize("how", ["required", "named", "streamed"])
def test_functions(got: Outcomes, how: str) -> None:
    """bind_tools gives one valid call: of any function, of a named one, and the same in a stream."""
    answer = got["functions"][how]
    [[name, arguments]] = answer["calls"]
    assert is_call(name, arguments)
    assert answer["invalid"] == []
    assert answer["finish_reason"] == "tool_calls"
    if how == "named":
        assert name == "get_weather"
    if how == "streamed":
        assert answer["calls"] == got["functions"]["required"]["calls"]


def test_function_result(got: Outcomes) -> None:
    """LangChain's message and the results are sent back and reach the model: a longer result is a longer prompt. No more calls."""
    result = got["function_result"]
    short, long = result["prompt_tokens"]
    assert long > short + 40
    assert result["tool_calls"] == []


@pytest.mark.parametrize("case", ["unknown_model", "unknown_model_stream"])
def test_unknown_model(got: Outcomes, case: str) -> None:
    """It raises LangChain's own exception, which is also the SDK's NotFoundError."""
    error = got[case]
    assert "langchain_core.ModelNotFoundError" in error["types"]
    assert "openai.NotFoundError" in error["types"]
    assert UNKNOWN_MODEL in error["message"]


def test_prompt_that_is_too_long(got: Outcomes) -> None:
    """LangChain recognizes the error, so that applications can shorten their history."""
    assert "langchain_core.ContextOverflowError" in got["too_long"]["types"]
    assert "openai.BadRequestError" in got["too_long"]["types"]
