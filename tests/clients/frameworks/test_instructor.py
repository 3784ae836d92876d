"""instructor, in its JSON-schema mode and its modes of functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import PYTHON_SCRIPTS, Outcomes, RunScript
from tests.clients.expected import UNKNOWN_MODEL, is_city


@pytest.fixture(scope="module")
def got(run_script: RunScript, python: Path) -> Outcomes:
    return run_script(python, PYTHON_SCRIPTS / "instructor_client.py")


@pytest.mark.parametrize(
    ("mode", "finish_reason"),
    [("json_schema", "stop"), ("tools", "tool_calls"), ("tools_strict", "tool_calls")],
)
def test_typed_answer(got: Outcomes, mode: str, finish_reason: str) -> None:
    """Returns an object of the type at the first attempt, with usage."""
    answer = got[mode]
    assert is_city(answer["parsed"])
    assert answer["finish_reason"] == finish_reason
    assert answer["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(("mode", "case"), [("JSON_SCHEMA", "json_schema"), ("TOOLS", "tools")])
def test_partial(got: Outcomes, mode: str, case: str) -> None:
    """A streamed object grows and ends as a valid object of the type."""
    growing = got["partial"][mode]
    assert growing["num"] > 3
    assert is_city(growing["last"])


def test_unknown_model(got: Outcomes) -> None:
    """instructor's own exception has our message."""
    error = got["unknown_model"]
    assert "instructor.InstructorError" in error["types"]
    assert UNKNOWN_MODEL in error["message"]
