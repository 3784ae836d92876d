"""The supervisor around each process of `make up`: what it restarts, and when."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.pool import supervise
from common.pool.supervise import MAX_PAUSE_SECONDS, Pauses, Supervisor

ROOT = Path(__file__).resolve().parents[4]


def counting(folder: Path, *statuses: int) -> list[str]:
    """A command that exits with each status in turn; a negative one is a signal that kills it."""
    code = (
        "import os, pathlib, sys\n"
        f"runs = pathlib.Path({str(folder / 'runs')!r})\n"
        "n = len(runs.read_text()) if runs.exists() else 0\n"
        "runs.write_text('x' * (n + 1))\n"
        f"status = {list(statuses)}[n]\n"
        "os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)\n"
    )
    return [sys.executable, "-c", code]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_PAUSE_SECONDS", 0.01)


def test_restarts_until_status_zero(tmp_path: Path) -> None:
    """A crash, a kill and, after a first run, also a failed start: each is reported and followed by a restart."""
    said: list[str] = []
    assert Supervisor(counting(tmp_path, 3, -9, 1, 0), said.append).run() == 0
    assert (tmp_path / "runs").read_text() == "xxxx"
    assert ["exited with status 3" in said[0], "killed by signal 9" in said[1], "status 1" in said[2]] == [
        True
    ] * 3


def test_a_command_that_cannot_start_is_not_restarted(tmp_path: Path) -> None:
    """Its sentence says what to do; it is printed once."""
    said: list[str] = []
    assert Supervisor(counting(tmp_path, 1, 0), said.append).run() == 1
    assert said == []


def test_pauses() -> None:
    """Twice as long each time, up to a limit; reset after a long run."""
    pauses = Pauses()
    lengths = [pauses.after(1.0) for _ in range(20)]
    assert lengths[:3] == [0.01, 0.02, 0.04]
    assert lengths[-1] == MAX_PAUSE_SECONDS
    assert pauses.after(3600.0) == 0.01


def test_sigterm_is_passed_on() -> None:
    """SIGTERM reaches the command, and it is not restarted."""
    sleeper = [sys.executable, "-m", "common.pool.supervise", "sleep", "60"]
    process = subprocess.Popen(sleeper, cwd=ROOT)
    child = _child_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_an_orphaned_command_is_terminated() -> None:
    """If the process given as --parent is killed, the command is terminated within moments."""
    with subprocess.Popen(["sleep", "60"]) as parent:
        supervised = ["--group", "--parent", str(parent.pid), "sleep", "60"]
        process = subprocess.Popen(
            [sys.executable, "-m", "common.pool.supervise", *supervised],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        child = _child_of(process)
        assert process.poll() is None
        parent.kill()
        parent.wait()
    assert "was killed: sleep 60 is terminated" in process.communicate(timeout=10)[1]
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_killed_supervisor_leaves_no_command_behind() -> None:
    """Its command is terminated within moments, and so is the guard that did it."""
    process = subprocess.Popen([sys.executable, "-m", "common.pool.supervise", "sleep", "60"], cwd=ROOT)
    child, guard = _child_of(process), _child_of(process, "sh")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while _is_running(child) or _is_running(guard):
        assert time.monotonic() < deadline, "the command goes on without a supervisor"
        time.sleep(0.05)


def test_a_guard_ends_with_its_command() -> None:
    """The guard ends with the command: it never signals another process that gets the same id."""
    process = subprocess.Popen(["sleep", "60"])
    with supervise._guarded(process.pid, print):
        guard = _child_of_this_process("sh")
        process.kill()
        process.wait()
    assert not _is_running(guard)


def test_a_command_runs_without_a_guard_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If there are too many processes for the guard, the command is still supervised, and the operator informed."""

    class NoGuard(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            if command[0] == "/bin/sh":
                raise BlockingIOError("too many processes")
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", NoGuard)
    said: list[str] = []
    assert Supervisor(counting(tmp_path, 3, 0), said.append).run() == 0
    assert (tmp_path / "runs").read_text() == "xx"
    assert "its guard cannot be started: too many processes" in said[0]


def _is_running(process_id: int) -> bool:
    """Whether a process exists that is not a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    return False


def _child_of_this_process(name: str) -> int:
    return next(child.pid for child in psutil.Process().children() if child.name() == name)


def _child_of(process: subprocess.Popen[Any], name: str = "sleep") -> int:
    """The id of a supervisor's command, once that runs."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = subprocess.run(
            ["pgrep", "-x", "-P", str(process.pid), name], capture_output=True, text=True, check=False
        )
        if found.stdout.strip():
            return int(found.stdout)
        time.sleep(0.05)
    raise AssertionError("nothing was started")
