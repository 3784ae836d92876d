"""Vercel's AI SDK, by its provider for OpenAI-compatible servers and by its provider for OpenAI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Outcomes, RunScript
from tests.clients.expected import (
    ANSWER,
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    UNKNOWN_MODEL,
    is_call,
    is_city,
)

pytestmark = pytest.mark.parametrize("provider", ["compatible", "openai"])


@pytest.fixture(scope="module")
def got(run_script: RunScript, node_scripts: Path) -> Outcomes:
    return run_script("node", node_scripts / "vercel_client.mjs")


def assert_counts(usage: dict[str, Any]) -> None:
    assert (usage["inputTokens"], usage["outputTokens"]) == (PROMPT_TOKENS, COMPLETION_TOKENS)


def test_generate_text(got: Outcomes, provider: str) -> None:
    """The right answer, with finish reason and usage."""
    answer = got[f"{provider}_text"]
    assert (answer["text"], answer["finishReason"]) == (ANSWER, "stop")
    assert_counts(answer["usage"])


def test_stream_text(got: Outcomes, provider: str) -> None:
    """The non-streamed answer in several parts, with its usage."""
    stream = got[f"{provider}_stream"]
    assert "".join(stream["deltas"]) == ANSWER
    assert len(stream["deltas"]) > 3
    assert stream["finishReason"] == "stop"
    assert_counts(stream["usage"])


def test_messages(got: Outcomes, provider: str) -> None:
    """A conversation of content parts with a system message reaches the model completely."""
    assert got[f"{provider}_messages"]["inputTokens"] > PROMPT_TOKENS


def test_object(got: Outcomes, provider: str) -> None:
    """generateObject returns a valid object; a streamed one is the same."""
    answer = got[f"{provider}_object"]
    assert is_city(answer["object"])
    assert answer["finishReason"] == "stop"
    assert got[f"{provider}_output_stream"] == answer["object"]


def test_tool(got: Outcomes, provider: str) -> None:
    """A required call has valid arguments; streamed it is the same."""
    plain, stream = got[f"{provider}_tool"], got[f"{provider}_tool_stream"]
    assert plain["calls"]
    assert all(is_call(*call) for call in plain["calls"])
    assert plain["finishReason"] == "tool-calls"
    assert stream == plain


def test_named_tool(got: Outcomes, provider: str) -> None:
    """The named function is called exactly once."""
    [[name, arguments]] = got[f"{provider}_named_tool"]
    assert name == "get_weather"
    assert is_call(name, arguments)


def test_steps(got: Outcomes, provider: str) -> None:
    """The SDK runs the called function and sends its result in a second step, which calls nothing."""
    answer = got[f"{provider}_steps"]
    first, second = answer["steps"]
    assert answer["asked"] == first["numCalls"] > 0
    assert first["finishReason"] == "tool-calls"
    assert second["numCalls"] == 0
    assert second["inputTokens"] > PROMPT_TOKENS + 20


def test_unknown_model(got: Outcomes, provider: str) -> None:
    """It raises the SDK's APICallError with our message and is not retried."""
    error = got[f"{provider}_unknown_model"]
    assert (error["isCallError"], error["statusCode"], error["isRetryable"]) == (True, 404, False)
    assert error["message"] == UNKNOWN_MODEL
