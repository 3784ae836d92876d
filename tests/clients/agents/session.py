"""One agent's tasks against a pool of its own: `python -m tests.clients.agents.session AGENT MODULES FOLDER`.

Runs in a network namespace with only loopback, the pool included: two API processes and two scripted workers. The agent does the
task twice: undisturbed, and while a worker and an API process are killed in the middle of an answer. Prints a JSON object by
scenario on its last line, which `test_agents` checks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.harness.pool import Pool
from tests.clients.agents import namespace
from tests.clients.agents.agents import AGENTS, Agent, write_files
from tests.clients.scripted import task

MODEL = "scripted"
KILL_WORKER_IN, KILL_API_IN = "edit", "test"
_TASK_SECONDS = 150
_TOKENS_PER_SECOND = 400
_POLL_SECONDS = 0.02


@dataclass(slots=True)
class Killer:
    """Kills the worker that is in the middle of one answer, and the API process that streams another.

    The engine holds these answers in their middle while the file `HOLDS/NAME` exists.

    Attributes:
        killed: Ids of the processes, by role.
    """

    pool: Pool
    record: Path
    holds: Path
    killed: dict[str, list[int]] = field(default_factory=dict)
    is_stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Wait for the two moments; returns early if stopped."""
        for name in (KILL_WORKER_IN, KILL_API_IN):
            (self.holds / name).touch()
        if (worker := self._wait_for_middle(KILL_WORKER_IN)) is None:
            return
        self._kill("worker", [worker])
        (self.holds / KILL_WORKER_IN).unlink()
        if self._wait_for_middle(KILL_API_IN) is None:
            return
        self._kill("api", self._connected_api_processes())
        (self.holds / KILL_API_IN).unlink()

    def _wait_for_middle(self, name: str) -> int | None:
        """The id of the worker that has generated half of an answer."""
        while not self.is_stopped.wait(_POLL_SECONDS):
            for line in read_record(self.record):
                if (line["answer"], line["event"]) == (name, "middle"):
                    return int(line["pid"])
        return None

    def _connected_api_processes(self) -> list[int]:
        """Those with a client's connection."""
        return [
            pid
            for pid in self.pool.pids("api")
            if any(
                each.status == psutil.CONN_ESTABLISHED and each.laddr.port == self.pool.port
                for each in psutil.Process(pid).net_connections("tcp")
            )
        ]

    def _kill(self, role: str, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.killed[role] = pids


def read_record(path: Path) -> list[dict[str, Any]]:
    """The lines that the scripted engines wrote; a line that is being written is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def run_task(
    agent: Agent, url: str, modules: Path, folder: Path, *, is_disturbed: bool = False
) -> dict[str, Any]:
    """Let the agent do the task in a new repository; returns the outcome."""
    repository, home = folder / "repository", folder / "home"
    for each in (repository, home):
        each.mkdir(parents=True)
    (repository / task.SOURCE_NAME).write_text(task.SOURCE)
    (repository / task.TEST_NAME).write_text(task.TEST)
    environ = _environment(home, modules)
    author = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for arguments in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "--quiet", "-m", "Start"]):
        subprocess.run(["git", *arguments], cwd=repository, env=environ, check=True)
    start = agent.start(url, agent.model, task.task(str(repository), is_disturbed=is_disturbed))
    write_files(start, home)
    started_mono = time.monotonic()
    done = subprocess.run(
        start.command,
        cwd=repository,
        env=environ | start.environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TASK_SECONDS,
        check=False,
    )
    log = repository / "runs.log"
    changed = subprocess.run(
        ["git", "diff", "--name-only"],
        cwd=repository,
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return {
        "seconds": round(time.monotonic() - started_mono, 1),
        "status": done.returncode,
        "output": f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}",
        "report": _report(agent, done.stdout),
        "source": (repository / task.SOURCE_NAME).read_text(),
        "changed": changed.stdout.split(),
        "num_test_runs": len(log.read_text().splitlines()) if log.exists() else 0,
    }


def _report(agent: Agent, stdout: str) -> str:
    try:
        return agent.report(stdout)
    except (LookupError, ValueError, TypeError) as error:
        return f"no report: {error!r}"


def _environment(home: Path, modules: Path) -> dict[str, str]:
    """Nothing of this process's own environment but the path: a home of its own, no proxies, no keys."""
    folders = {"CONFIG": ".config", "DATA": ".local/share", "STATE": ".local/state", "CACHE": ".cache"}
    xdg = {f"XDG_{name}_HOME": str(home / folder) for name, folder in folders.items()}
    path = f"{modules / '.bin'}:{os.environ['PATH']}"
    return {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "TERM": "dumb", **xdg}


def run_session(agent: Agent, modules: Path, folder: Path) -> dict[str, Any]:
    """Both scenarios, in one pool."""
    record, holds = folder / "record", folder / "holds"
    record.touch()
    holds.mkdir()
    scripted = [
        "tests.clients.scripted.worker",
        "--name",
        MODEL,
        "--record",
        str(record),
        "--holds",
        str(holds),
    ]
    scripted += ["--tokens-per-second", str(_TOKENS_PER_SECOND)]
    outcomes: dict[str, Any] = {}
    with Pool({"MLXPOOL_MODEL": "demo", "MLXPOOL_MODEL_ALIASES": f"*={MODEL}"}) as pool:
        pool.start("worker", scripted)
        pool.start_worker(scripted, MODEL)
        pool.start_api(num_processes=2)
        outcomes["undisturbed"] = run_task(agent, pool.url, modules, folder / "undisturbed")
        outcomes["undisturbed"]["record"] = read_record(record)
        record.write_text("")
        killer = Killer(pool, record, holds)
        thread = threading.Thread(target=killer.run)
        thread.start()
        try:
            outcomes["killed"] = run_task(agent, pool.url, modules, folder / "killed", is_disturbed=True)
        finally:
            killer.is_stopped.set()
            thread.join()
        outcomes["killed"] |= {"record": read_record(record), "killed": killer.killed}
    return outcomes


def main() -> None:
    """See the module."""
    namespace.enter()
    name, modules, folder = sys.argv[1:]
    outcomes = run_session(AGENTS[name], Path(modules), Path(folder))
    sys.stdout.write("\n" + json.dumps(outcomes) + "\n")


if __name__ == "__main__":
    main()
