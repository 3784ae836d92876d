"""The `llm` command with a model from extra-openai-models.yaml."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import PYTHON_SCRIPTS, Outcomes, RunScript
from tests.clients.expected import ANSWER, COMPLETION_TOKENS, PROMPT_TOKENS, UNKNOWN_MODEL, is_city


@pytest.fixture(scope="module")
def got(run_script: RunScript, python: Path) -> Outcomes:
    return run_script(python, PYTHON_SCRIPTS / "llm_client.py")


def counts(done: dict[str, Any]) -> tuple[int, int]:
    """Prompt and completion tokens, as llm prints them."""
    found = re.search(r"Token usage: (\d+) input, (\d+) output", done["stderr"])
    assert found, done
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("case", ["prompt", "stream"])
def test_prompt(got: Outcomes, case: str) -> None:
    """The right answer on standard output with its usage, streamed (the default) and not."""
    done = got[case]
    assert (done["status"], done["stdout"].strip()) == (0, ANSWER)
    assert counts(done) == (PROMPT_TOKENS, COMPLETION_TOKENS)


def test_conversation(got: Outcomes) -> None:
    """`--continue` resends the first question and its answer."""
    first, second = got["conversation"]
    assert first["status"] == second["status"] == 0
    assert counts(second)[0] > sum(counts(first))


def test_schema(got: Outcomes) -> None:
    """`--schema` prints valid JSON, streamed and not."""
    whole, streamed = got["schema"]
    assert whole["status"] == streamed["status"] == 0
    assert is_city(json.loads(whole["stdout"]))
    assert json.loads(streamed["stdout"]) == json.loads(whole["stdout"])


def test_functions(got: Outcomes) -> None:
    """Functions are offered, whether the model calls one or not; streamed and not."""
    for done in got["functions"]:
        assert done["status"] == 0
        assert counts(done)[0] > PROMPT_TOKENS


def test_unknown_model(got: Outcomes) -> None:
    """llm prints our message and exits with an error."""
    done = got["unknown_model"]
    assert done["status"] == 1
    assert UNKNOWN_MODEL in done["stderr"]
