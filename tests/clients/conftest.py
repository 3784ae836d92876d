"""Pools for all clients, one with the real demo model and one with a scripted one, and the results of each client's script.

A module's script runs once, as a process of its own in the clients' environment; each test looks at one of its cases.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.harness.pool import Pool
from tests.clients import environments
from tests.conftest import missing

HERE = Path(__file__).parent
PYTHON_SCRIPTS = HERE / "python"
SCRIPT_SECONDS = 400
CLIENTS_VARIABLES = ("OPENAI_", "ANTHROPIC_", "LANGCHAIN_", "LANGSMITH_", "LITELLM_", "LLM_", "PYTHON")
"""Prefixes of environment variables that would change a client's defaults."""


class Outcomes:
    """The results of a script's cases.

    Args:
        cases: By name: a `value`, or the `error` that ended it.
    """

    def __init__(self, cases: dict[str, dict[str, Any]]) -> None:
        self._cases = cases

    def __getitem__(self, name: str) -> Any:
        """A case's value; the test fails if the client raised unexpectedly."""
        case = self._cases[name]
        if "error" in case:
            pytest.fail(case["error"], pytrace=False)
        return case["value"]


RunScript = Callable[..., Outcomes]


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two API processes and one worker that serves `demo`."""
    with Pool({"MLXPOOL_MODEL": "demo"}) as running:
        running.start_worker(["worker"], "demo")
        running.start_api(num_processes=2)
        yield running


@pytest.fixture(scope="session")
def scripted_pool() -> Iterator[Pool]:
    """Two API processes and one worker that serves `scripted`, which calls functions and follows schemas as a good model does."""
    with Pool({"MLXPOOL_MODEL": "demo"}) as running:
        running.start_worker(
            ["tests.clients.scripted.worker", "--script", "assistant", "--name", "scripted"], "scripted"
        )
        running.start_api(num_processes=2)
        yield running


@pytest.fixture(scope="session")
def sdk_python() -> Path:
    """The Python of the environment with the newest SDKs."""
    return environments.sdk_environment()


@pytest.fixture(scope="session")
def python() -> Path:
    """The Python of the clients' environment."""
    return environments.python_environment()


@pytest.fixture(scope="session")
def node_scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Node scripts next to their `node_modules`, where Node looks for imports."""
    if not (shutil.which("node") and shutil.which("npm")):
        missing("node with npm")
    modules = environments.node_modules()
    folder = tmp_path_factory.mktemp("node")
    for script in (HERE / "node").glob("*.mjs"):
        shutil.copy(script, folder)
    (folder / "node_modules").symlink_to(modules, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def run_script(pool: Pool) -> RunScript:
    """Runs a script against the pool with the demo model."""
    return _script_runner(pool, "demo")


@pytest.fixture(scope="session")
def run_scripted(scripted_pool: Pool) -> RunScript:
    """Runs a script against the pool with the scripted model."""
    return _script_runner(scripted_pool, "scripted")


def _script_runner(pool: Pool, model: str) -> RunScript:
    def run(interpreter: Path | str, script: Path) -> Outcomes:
        done = subprocess.run(
            [interpreter, script, f"{pool.url}/v1", model],
            env={k: v for k, v in os.environ.items() if not k.startswith(CLIENTS_VARIABLES)},
            capture_output=True,
            text=True,
            timeout=SCRIPT_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            pytest.fail(f"{script.name} ended with {done.returncode}:\n{done.stderr[-3000:]}", pytrace=False)
        return Outcomes(json.loads(done.stdout.splitlines()[-1]))  # clients print too

    return run
