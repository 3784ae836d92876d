"""The openai SDK for Node: its helpers for streams, zod and functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import Outcomes, RunScript
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


@pytest.fixture(scope="module")
def got(run_script: RunScript, node_scripts: Path) -> Outcomes:
    return run_script("node", node_scripts / "openai_client.mjs")


def test_chat_and_stream(got: Outcomes) -> None:
    """`.stream()` assembles the non-streamed answer from several deltas, with the same usage."""
    chat, stream = got["chat"], got["chat_stream"]
    assert chat["content"] == stream["content"] == "".join(stream["deltas"]) == ANSWER
    assert len(stream["deltas"]) > 3
    assert chat["request_id"]
    for answer in (chat, stream):
        usage = answer["usage"]
        assert answer["finish_reason"] == "stop"
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT_TOKENS, COMPLETION_TOKENS)


def test_parse(got: Outcomes) -> None:
    """A zod schema as response_format returns an object; `.stream()` returns an equal one."""
    assert is_city(got["parse"]["parsed"])
    assert got["parse"]["finish_reason"] == "stop"
    assert got["parse_stream"] == got["parse"]["parsed"]


def test_function(got: Outcomes) -> None:
    """A required call has parsed arguments; streamed it is the same except for its id."""
    function, stream = got["function"], got["function_stream"]
    assert are_openai_calls(function["calls"])
    assert function["finish_reason"] == stream["finish_reason"] == "tool_calls"
    assert without_ids(stream["calls"]) == without_ids(function["calls"])


def test_run_tools(got: Outcomes) -> None:
    """The helper's complete round trip: a call, the function, its result."""
    rounds = got["run_tools"]
    assert rounds["roles"][:3] == ["user", "assistant", "tool"]
    assert rounds["asked"]
    assert all(is_call("get_weather", arguments) for arguments in rounds["asked"])


def test_unknown_model(got: Outcomes) -> None:
    """It raises the SDK's NotFoundError, with our message and fields."""
    error = got["unknown_model"]
    assert error["isNotFound"]
    assert (error["status"], error["code"], error["param"]) == (404, "model_not_found", "model")
    assert UNKNOWN_MODEL in error["message"]
