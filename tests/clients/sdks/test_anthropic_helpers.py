"""The newest anthropic SDKs for Python and Node, with all of their helpers for messages, tool runners included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import PYTHON_SCRIPTS, Outcomes, RunScript
from tests.clients.expected import UNKNOWN_MODEL
from tests.clients.scripted.assistant import CITY, REPORT, SENTENCE, WEATHER

RESULT = f"{REPORT}rain, 7 degrees"
TOOL_RUN = {"asked": [WEATHER], "text": RESULT, "stop_reason": "end_turn"}
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def python_got(run_scripted: RunScript, sdk_python: Path) -> Outcomes:
    return run_scripted(sdk_python, PYTHON_SCRIPTS / "anthropic_helpers_client.py")


@pytest.fixture(scope="module")
def node_got(run_scripted: RunScript, node_scripts: Path) -> Outcomes:
    return run_scripted("node", node_scripts / "anthropic_client.mjs")


@pytest.fixture(params=["python", "node"])
def got(request: pytest.FixtureRequest) -> Outcomes:
    outcomes: Outcomes = request.getfixturevalue(f"{request.param}_got")
    return outcomes


def test_create_and_stream(got: Outcomes) -> None:
    """The stream's parts add up to the plain answer, with the same reason to stop; the answer has usage and a request id."""
    create, stream = got["create"], got["stream"]
    text = create["text"] if isinstance(create["text"], str) else "".join(create["text"])
    assert text == stream["text"] == "".join(stream["texts"]) == SENTENCE
    assert len(stream["texts"]) > 3
    assert create["stop_reason"] == stream["stop_reason"] == "end_turn"
    assert create["usage"]["output_tokens"] == NUM_TOKENS
    assert create["request_id"].startswith("req_")


def test_events(got: Outcomes) -> None:
    """A stream has Anthropic's events in their order."""
    kinds = [kind for kind in got["raw_stream"] if kind != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_typed_answer(got: Outcomes) -> None:
    """`.parse()` returns an object of the type."""
    assert got["parse"] == CITY


@pytest.mark.parametrize("case", ["tool_runner", "tool_runner_stream"])
def test_tool_runner(got: Outcomes, case: str) -> None:
    """It calls the function once, sends the result back and ends with the final answer."""
    assert got[case] == TOOL_RUN


def test_count_tokens(got: Outcomes) -> None:
    """The count is what the same request then uses."""
    counted, used = got["count_tokens"]
    assert counted == used > 0


def test_models(got: Outcomes) -> None:
    """The list has the model, and it can be retrieved."""
    is_listed, found, *_ = got["models"]
    assert (is_listed, found) == (True, "scripted")


def test_typed_stream(python_got: Outcomes) -> None:
    """A typed answer can be streamed."""
    assert python_got["parse_stream"] == CITY


def test_asynchronous(python_got: Outcomes) -> None:
    """The asynchronous client gives the same answers."""
    assert python_got["asynchronous"] == [SENTENCE, SENTENCE]


def test_tools_by_hand(python_got: Outcomes) -> None:
    """A call, its result in the history, and the call as a stream of partial JSON."""
    tools = python_got["tools"]
    assert tools["call"] == ["get_weather", WEATHER]
    assert tools["stop_reasons"] == ["tool_use", "end_turn"]
    assert tools["text"] == RESULT
    assert tools["streamed"] == WEATHER
    assert tools["partial"].startswith("{")
    assert python_got["tool_choice"] == ["tool_use"]


def test_ends(python_got: Outcomes) -> None:
    """A stop sequence is named and not part of the text; a limit of tokens is the reason to stop."""
    assert python_got["stop_sequence"] == ["The capital of France is ", "stop_sequence", "Par"]
    assert python_got["max_tokens"] == ["max_tokens", 3]


def test_errors(python_got: Outcomes, node_got: Outcomes) -> None:
    """The SDKs raise their own exceptions for Anthropic's error types."""
    unknown: dict[str, Any] = python_got["unknown_model"]
    assert unknown["types"][0] == "anthropic.NotFoundError"
    assert UNKNOWN_MODEL in unknown["message"]
    assert python_got["wrong_value"]["types"][0] == "anthropic.BadRequestError"
    assert node_got["unknown_model"]["isNotFound"]
    assert node_got["unknown_model"]["error"]["error"]["type"] == "not_found_error"
