"""litellm, by its providers for OpenAI-compatible servers."""

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
    are_openai_calls,
    is_city,
    without_ids,
)


@pytest.fixture(scope="module")
def got(run_script: RunScript, python: Path) -> Outcomes:
    return run_script(python, PYTHON_SCRIPTS / "litellm_client.py")


def assert_is_answer(answer: dict[str, Any]) -> None:
    assert (answer["content"], answer["finish_reason"]) == (ANSWER, "stop")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT_TOKENS, COMPLETION_TOKENS)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_completion(got: Outcomes, provider: str) -> None:
    """The right answer, with finish reason and usage."""
    assert_is_answer(got["completion"][provider])


def test_stream(got: Outcomes) -> None:
    """litellm's own builder assembles the non-streamed answer from the chunks, with its usage."""
    stream = got["stream"]
    assert_is_answer(stream)
    assert "".join(stream["deltas"]) == ANSWER
    assert len(stream["deltas"]) > 3


def test_asynchronous(got: Outcomes) -> None:
    """acompletion, streamed and not."""
    assert got["asynchronous"] == [ANSWER, ANSWER]


def test_text_completion(got: Outcomes) -> None:
    """The legacy endpoint continues the prompt."""
    assert got["text_completion"].startswith(" Paris.")


def test_choices(got: Outcomes) -> None:
    """`n` gives that many answers; greedy ones are equal."""
    assert got["choices"] == [ANSWER, ANSWER]


def test_structured(got: Outcomes) -> None:
    """The answer validates against a pydantic model as response_format."""
    assert is_city(got["structured"])


def test_functions(got: Outcomes) -> None:
    """A required call has valid arguments; streamed it is the same except for its id."""
    plain, stream = got["functions"], got["functions_stream"]
    assert are_openai_calls(plain["calls"])
    assert plain["finish_reason"] == stream["finish_reason"] == "tool_calls"
    assert without_ids(stream["calls"]) == without_ids(plain["calls"])


def test_function_result(got: Outcomes) -> None:
    """litellm's message and the results are sent back and reach the model: a longer result is a longer prompt. No more calls."""
    result = got["function_result"]
    short, long = result["prompt_tokens"]
    assert long > short + 40
    assert not result["tool_calls"]


def test_errors(got: Outcomes) -> None:
    """Each refusal raises litellm's exception for it; litellm recognizes a prompt that is too long by our message."""
    unknown, wrong, too_long = got["unknown_model"], got["wrong_value"], got["too_long"]
    assert unknown["types"][0] == "litellm.NotFoundError"
    assert UNKNOWN_MODEL in unknown["message"]
    assert wrong["types"][0] == "litellm.BadRequestError"
    assert "temperature" in wrong["message"]
    assert too_long["types"][0] == "litellm.ContextWindowExceededError"
