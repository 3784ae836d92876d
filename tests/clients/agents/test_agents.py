"""Coding agents, unmodified, each with a task in a repository: list files, read one, edit it, run its test, report.

The model's answers come from a script (`tests.clients.scripted`); everything else is real. The script refuses a conversation
whose history it does not recognize, so these tests also prove that calls, results and texts come back as they were made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients import environments
from tests.clients.agents import namespace
from tests.clients.agents.agents import AGENTS
from tests.clients.agents.session import KILL_API_IN, KILL_WORKER_IN
from tests.clients.scripted import task
from tests.conftest import missing

ROOT = Path(__file__).resolve().parents[3]
SESSION_SECONDS = 420
SCENARIOS = ("undisturbed", "killed")
STEPS = ["list", "read", "edit", "test", "report"]


@pytest.fixture(scope="module", params=sorted(AGENTS))
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An agent's outcomes by scenario."""
    if refusal := namespace.refusal():
        pytest.skip(refusal)
    if not (shutil.which("node") and shutil.which("npm")):
        missing("node with npm")
    modules = environments.agent_modules()
    folder = tmp_path_factory.mktemp(request.param)
    session = [sys.executable, "-m", "tests.clients.agents.session", request.param, str(modules), str(folder)]
    done = subprocess.run(
        namespace.command(session),
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("MLXPOOL_")},
        capture_output=True,
        text=True,
        timeout=SESSION_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"the session of {request.param} ended:\n{done.stderr[-3000:]}", pytrace=False)
    outcomes: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_task_is_done(outcomes: dict[str, Any], scenario: str) -> None:
    """The file is corrected, nothing else changed, the test ran once and passed, and the report has what it printed."""
    outcome = outcomes[scenario]
    assert outcome["status"] == 0, outcome["output"]
    assert outcome["report"] == f"{task.REPORT}{task.PASSED}", outcome["output"]
    assert outcome["source"] == task.SOURCE.replace(task.WRONG_LINE, task.RIGHT_LINE)
    assert outcome["changed"] == [task.SOURCE_NAME]
    assert outcome["num_test_runs"] == 1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_refused(outcomes: dict[str, Any], scenario: str) -> None:
    """The script recognized each conversation, the grammar allowed each token, and a takeover continued the same answer."""
    record = outcomes[scenario]["record"]
    assert [line for line in record if line["event"] == "refused"] == []


def test_each_step_is_answered_once(outcomes: dict[str, Any]) -> None:
    """Undisturbed, the agent asks once for each step."""
    ends = [line["answer"] for line in outcomes["undisturbed"]["record"] if line["event"] == "end"]
    assert [name for name in ends if name in STEPS] == STEPS


def test_worker_was_killed(outcomes: dict[str, Any]) -> None:
    """The other worker continued the answer in its middle, as the same job: the agent saw one answer."""
    outcome = outcomes["killed"]
    lines = [line for line in outcome["record"] if line["answer"] == KILL_WORKER_IN]
    [killed] = outcome["killed"]["worker"]
    first, middle, continued, end = lines
    assert {line["job_id"] for line in lines} == {first["job_id"]}
    assert first["pid"] == middle["pid"] == killed
    assert continued["pid"] == end["pid"] != killed
    assert continued["num_tokens"] > 0


def test_api_process_was_killed(outcomes: dict[str, Any]) -> None:
    """The agent sent the request again, as a new job, and the unfinished answer left no trace."""
    outcome = outcomes["killed"]
    assert len(outcome["killed"]["api"]) >= 1
    starts = [line for line in outcome["record"] if (line["answer"], line["event"]) == (KILL_API_IN, "start")]
    assert len({line["job_id"] for line in starts}) == 2
