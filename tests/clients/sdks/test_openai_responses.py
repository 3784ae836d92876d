"""The openai SDKs for Python and Node, with all of their helpers for responses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import PYTHON_SCRIPTS, Outcomes, RunScript
from tests.clients.expected import UNKNOWN_MODEL
from tests.clients.scripted.assistant import CITY, REPORT, SENTENCE, WEATHER

RESULT = f"{REPORT}rain, 7 degrees"
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def python_got(run_scripted: RunScript, sdk_python: Path) -> Outcomes:
    return run_scripted(sdk_python, PYTHON_SCRIPTS / "openai_responses_client.py")


@pytest.fixture(scope="module")
def node_got(run_scripted: RunScript, node_scripts: Path) -> Outcomes:
    return run_scripted("node", node_scripts / "openai_responses_client.mjs")


@pytest.fixture(params=["python", "node"])
def got(request: pytest.FixtureRequest) -> Outcomes:
    outcomes: Outcomes = request.getfixturevalue(f"{request.param}_got")
    return outcomes


def test_create(got: Outcomes) -> None:
    """A completed response with text and usage."""
    create = got["create"]
    assert (create["text"], create["status"]) == (SENTENCE, "completed")
    assert create["usage"]["output_tokens"] == NUM_TOKENS


def test_stream(got: Outcomes) -> None:
    """Numbered events from the created to the completed response, with the same text."""
    stream = got["stream"]
    assert stream["text"] == SENTENCE
    assert stream["numbers"] == list(range(len(stream["numbers"])))
    assert stream["kinds"][:2] == ["response.created", "response.in_progress"]
    assert stream["kinds"][-1] == "response.completed"
    assert stream["kinds"].count("response.output_text.delta") > 3


def test_typed_answer(got: Outcomes) -> None:
    """`.parse()` returns an object of the type."""
    assert got["parse"] == CITY


def test_tools(got: Outcomes) -> None:
    """A call with parsed arguments; its result in the next input gives the answer."""
    assert got["tools"]["call"] == ["get_weather", WEATHER]
    assert got["tools"]["text"] == RESULT


def test_run_tools(node_got: Outcomes) -> None:
    """The chat helper runs the function once and ends with the answer, streamed."""
    assert node_got["run_tools"] == {"asked": [WEATHER], "text": RESULT}


def test_other_streams(python_got: Outcomes) -> None:
    """Text deltas add up; raw events, typed answers and calls are streamed too."""
    assert "".join(python_got["stream"]["deltas"]) == SENTENCE
    assert python_got["raw_stream"] == python_got["stream"]["kinds"]
    assert python_got["parse_stream"] == CITY
    assert python_got["tools"]["streamed"] == ["get_weather", WEATHER]
    assert "response.function_call_arguments.done" in python_got["tools"]["kinds"]


def test_asynchronous(python_got: Outcomes) -> None:
    """The asynchronous client gives the same answers."""
    assert python_got["asynchronous"] == [SENTENCE, SENTENCE]


def test_stored(python_got: Outcomes) -> None:
    """A stored response is continued by its id, retrieved with its input, and deleted."""
    stored = python_got["stored"]
    assert (stored["text"], stored["found"], stored["gone"]) == (RESULT, RESULT, 404)
    assert "function_call_output" in stored["items"]


def test_background(python_got: Outcomes) -> None:
    """A response in the background can be followed from the start and from any event."""
    background = python_got["background"]
    assert background["status"] in ("queued", "in_progress")
    assert (background["last"], background["text"]) == ("response.completed", SENTENCE)
    assert background["same"]


def test_count(python_got: Outcomes) -> None:
    """The count of input tokens is what the same request then uses."""
    counted, used = python_got["count"]
    assert counted == used > 0


def test_chat_tools(python_got: Outcomes) -> None:
    """The chat helpers of this release parse calls, plain and streamed."""
    assert python_got["chat_tools"] == [WEATHER, WEATHER]


def test_models(python_got: Outcomes) -> None:
    """The list has the model, and it can be retrieved."""
    assert python_got["models"] == [True, "scripted"]


def test_errors(python_got: Outcomes, node_got: Outcomes) -> None:
    """The SDKs raise their own exceptions, with our message and fields."""
    unknown = python_got["unknown_model"]
    assert unknown["types"][0] == "openai.NotFoundError"
    assert UNKNOWN_MODEL in unknown["message"]
    wrong = python_got["wrong_value"]
    assert (wrong["types"][0], wrong["param"]) == ("openai.BadRequestError", "temperature")
    assert node_got["unknown_model"] == {"isNotFound": True, "status": 404, "code": "model_not_found"}
