"""The anthropic SDK for Python, unmodified: messages, streams, tools, parsed answers, token counts, models, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import PYTHON_SCRIPTS, Outcomes, RunScript
from tests.clients.expected import ANSWER, COMPLETION_TOKENS, PROMPT_TOKENS


@pytest.fixture(scope="module")
def got(run_script: RunScript, python: Path) -> Outcomes:
    return run_script(python, PYTHON_SCRIPTS / "anthropic_client.py")


def test_a_message(got: Outcomes) -> None:
    """The right answer, with its reason, token counts, and the request id that the log has."""
    message = got["message"]
    assert (message["text"], message["stop_reason"]) == (ANSWER, "end_turn")
    assert (message["input_tokens"], message["output_tokens"]) == (PROMPT_TOKENS, COMPLETION_TOKENS)
    assert message["request_id"]


def test_streams(got: Outcomes) -> None:
    """The helper adds events up to the same message; the raw stream has every kind of event, without pings, which the SDK skips."""
    helper = got["stream_helper"]
    assert "".join(helper["deltas"]) == helper["text"] == ANSWER
    assert len(helper["deltas"]) > 3
    assert (helper["input_tokens"], helper["output_tokens"]) == (PROMPT_TOKENS, COMPLETION_TOKENS)
    kinds = got["raw_stream"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_beta_namespace(got: Outcomes) -> None:
    """The fields that Claude Code sends are accepted."""
    assert got["beta"] in ("end_turn", "max_tokens")


def test_a_forced_call(got: Outcomes) -> None:
    """Streamed and not, it has the same input; the turn with its result is served."""
    call = got["forced_call"]
    assert call["input"] == call["streamed"]
    assert set(call["input"]) == {"city", "unit"}
    assert call["joined"]
    assert call["stop_reason"] == "tool_use"
    assert call["after"]


def test_a_parsed_answer(got: Outcomes) -> None:
    """An answer that a pydantic model describes."""
    assert set(got["parsed"]) == {"continent", "is_capital"}


def test_stop_sequences_counts_and_models(got: Outcomes) -> None:
    """Which sequence ended the answer; the prompt's tokens without an answer; the models over several pages."""
    assert got["stop_sequence"] == ["stop_sequence", " France"]
    assert got["count_tokens"] == PROMPT_TOKENS
    assert "demo" in got["models"]["listed"]
    assert got["models"]["one"] == "demo"


def test_errors(got: Outcomes) -> None:
    """The SDK's exception of each status."""
    errors = got["errors"]
    assert "anthropic.BadRequestError" in errors["bad"]["types"]
    assert "temperature" in errors["bad"]["message"]
    assert "anthropic.NotFoundError" in errors["unknown"]["types"]
    assert "anthropic.BadRequestError" in errors["too long"]["types"]
    assert "anthropic.NotFoundError" in errors["batches"]["types"]


def test_asynchronous(got: Outcomes) -> None:
    """Three requests at once and a stream give the same answer."""
    assert got["asynchronous"] == [ANSWER] * 4
