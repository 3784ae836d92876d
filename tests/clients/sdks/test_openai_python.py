"""The openai SDK for Python: the version that other clients depend on, and the project's own, newer one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.clients.conftest import PYTHON_SCRIPTS, Outcomes, RunScript
from tests.clients.expected import (
    ANSWER,
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    UNKNOWN_MODEL,
    are_openai_calls,
    is_call,
    is_city,
    without_ids,
)


@pytest.fixture(scope="module", params=["clients", "own"])
def got(request: pytest.FixtureRequest, run_script: RunScript, python: Path) -> Outcomes:
    own = request.param == "own"
    outcomes = run_script(sys.executable if own else python, PYTHON_SCRIPTS / "openai_client.py")
    assert (outcomes["version"] == openai.__version__) == own
    return outcomes


def assert_counts(usage: dict[str, Any]) -> None:
    counts = [usage[f"{kind}_tokens"] for kind in ("prompt", "completion", "total")]
    assert counts == [PROMPT_TOKENS, COMPLETION_TOKENS, PROMPT_TOKENS + COMPLETION_TOKENS]


def test_chat(got: Outcomes) -> None:
    """The right answer, with finish reason, usage, and the request id that the log has."""
    chat = got["chat"]
    assert (chat["content"], chat["finish_reason"]) == (ANSWER, "stop")
    assert_counts(chat["usage"])
    assert chat["request_id"]


def test_stream_helper(got: Outcomes) -> None:
    """`.stream()` assembles the non-streamed answer from several deltas, with its usage."""
    stream = got["chat_stream"]
    assert "".join(stream["deltas"]) == stream["content"] == ANSWER
    assert stream["done"] == [ANSWER]
    assert len(stream["deltas"]) > 3
    assert stream["finish_reason"] == "stop"
    assert_counts(stream["usage"])


def test_asynchronous(got: Outcomes) -> None:
    """Three concurrent requests and one stream give the same answer."""
    assert got["asynchronous"] == [ANSWER] * 4


def test_max_completion_tokens(got: Outcomes) -> None:
    """The newer name of max_tokens gives exactly that many tokens."""
    assert got["max_completion_tokens"] == ["length", 3]


def test_content_parts_and_the_developer(got: Outcomes) -> None:
    """Text parts equal plain text, and a developer message equals a system message, to the token."""
    as_parts, as_strings = got["content_parts"]
    assert as_parts == as_strings


def test_fields_that_ask_for_nothing(got: Outcomes) -> None:
    """Parameters that applications set by default change nothing and are not refused."""
    assert got["optional_fields"] == ANSWER


def test_choices(got: Outcomes) -> None:
    """`n` gives that many different answers, and usage is their sum."""
    choices = got["choices"]
    assert choices["indexes"] == [0, 1, 2]
    assert len(set(choices["contents"])) == 3
    assert choices["completion_tokens"] > 3


def test_parse(got: Outcomes) -> None:
    """A pydantic model as response_format returns an object; `.stream()` returns an equal one."""
    assert is_city(got["parse"]["parsed"])
    assert got["parse"]["finish_reason"] == "stop"
    assert got["parse_stream"] == got["parse"]["parsed"]


def test_function(got: Outcomes) -> None:
    """A required call has parsed arguments and no content; streamed it is the same except for its id."""
    function, stream = got["function"], got["function_stream"]
    assert are_openai_calls(function["calls"])
    assert len(function["calls"]) == 1
    assert function["content"] is None
    assert function["finish_reason"] == stream["finish_reason"] == "tool_calls"
    assert without_ids(stream["calls"]) == without_ids(function["calls"])
    assert "tool_calls.function.arguments.delta" in stream["kinds"]
    assert "tool_calls.function.arguments.done" in stream["kinds"]


def test_named_function(got: Outcomes) -> None:
    """The function named by `tool_choice` is called exactly once."""
    [[name, arguments]] = got["named_function"]
    assert name == "get_weather"
    assert is_call(name, arguments)


def test_function_result(got: Outcomes) -> None:
    """The SDK's message and the results are sent back and reach the model: a longer result is a longer prompt. No more calls."""
    result = got["function_result"]
    short, long = result["prompt_tokens"]
    assert long > short + 40
    assert not result["tool_calls"]
    assert isinstance(result["content"], str)


def test_models(got: Outcomes) -> None:
    """The list of models, and one model by id."""
    assert got["models"] == [["demo"], "demo"]


def test_errors(got: Outcomes) -> None:
    """Each refusal raises the SDK's exception for its status, with our message and fields."""
    unknown, wrong, too_long = got["unknown_model"], got["wrong_value"], got["too_long"]
    assert unknown["types"][0] == "openai.NotFoundError"
    assert (unknown["status"], unknown["code"], unknown["param"]) == (404, "model_not_found", "model")
    assert UNKNOWN_MODEL in unknown["message"]
    assert wrong["types"][0] == too_long["types"][0] == "openai.BadRequestError"
    assert (wrong["status"], wrong["param"]) == (400, "temperature")
    assert (too_long["code"], too_long["param"]) == ("context_length_exceeded", "messages")
