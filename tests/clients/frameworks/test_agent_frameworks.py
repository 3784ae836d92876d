"""openai-agents and pydantic-ai, by each protocol that they speak."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import PYTHON_SCRIPTS, Outcomes, RunScript
from tests.clients.scripted.assistant import CITY, REPORT

RESULT = f"{REPORT}rain, 7 degrees"
AGENTS = ("chat", "responses")
PYDANTIC = ("chat", "responses", "anthropic")


@pytest.fixture(scope="module")
def got(run_scripted: RunScript, sdk_python: Path) -> Outcomes:
    return run_scripted(sdk_python, PYTHON_SCRIPTS / "frameworks_client.py")


def test_agents_tool(got: Outcomes) -> None:
    """openai-agents calls the function once and returns the answer."""
    items = ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]
    assert got["agents_tool"] == {name: [RESULT, items] for name in AGENTS}


def test_agents_stream(got: Outcomes) -> None:
    """Its text deltas add up to the final output."""
    assert got["agents_stream"] == {name: [RESULT, RESULT] for name in AGENTS}


def test_agents_typed_answer(got: Outcomes) -> None:
    """An output type is an object of that type."""
    assert got["agents_typed"] == dict.fromkeys(AGENTS, CITY)


def test_pydantic_tool(got: Outcomes) -> None:
    """pydantic-ai calls the function and returns the answer."""
    assert got["pydantic_tool"] == dict.fromkeys(PYDANTIC, RESULT)


def test_pydantic_stream(got: Outcomes) -> None:
    """The streamed text is the answer, in several parts."""
    assert set(got["pydantic_stream"]) == set(PYDANTIC)
    for text, num_parts in got["pydantic_stream"].values():
        assert text == RESULT
        assert num_parts > 3


def test_pydantic_typed_answer(got: Outcomes) -> None:
    """By a function whose arguments are the answer, and by a response format."""
    assert got["pydantic_typed"] == dict.fromkeys(PYDANTIC, CITY)
    assert got["pydantic_native"] == dict.fromkeys(AGENTS, CITY)
