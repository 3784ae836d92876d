"""Restarts a command when it dies: `python -m common.pool.supervise [OPTIONS] COMMAND...`, around each process of `make up`.

A Mac's own supervisor (launchd) does the same for a pool that is installed permanently. A command that cannot start at all
is not tried again: its message says what to do. If the supervisor itself is killed, its command is terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

CANNOT_START = 1
"""The exit status of our commands if they refuse to start, with a sentence."""

STARTING_SECONDS = 900.0
"""A first run that exits with that status within this time (it may download and load a model first) was never up."""

FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0
STABLE_SECONDS = 60.0
"""A run this long resets the pauses."""

PARENT_POLL_SECONDS = 1.0
"""How often the parent process is polled."""

ORPHAN_EXIT_SECONDS = 10.0
"""How long an orphaned command may take to terminate; then it is killed."""

_GUARD = """
trap '' TERM INT HUP
read -r _
kill -TERM "$1" || exit
i=0
while [ $i -lt "$2" ] && kill -0 "$1"; do sleep 1; i=$((i + 1)); done
kill -KILL "$1"
"""
"""A shell script that waits for the end of its standard input, a pipe from the supervisor, and then ends the command."""


class Pauses:
    """How long to wait before each restart: twice as long each time, until a run lasts STABLE_SECONDS."""

    def __init__(self) -> None:
        self._next_seconds = FIRST_PAUSE_SECONDS

    def after(self, run_seconds: float) -> float:
        """The pause after a run of so many seconds."""
        if run_seconds >= STABLE_SECONDS:
            self._next_seconds = FIRST_PAUSE_SECONDS
        pause = self._next_seconds
        self._next_seconds = min(2 * pause, MAX_PAUSE_SECONDS)
        return pause


class Supervisor:
    """See the module.

    Args:
        say: Takes a line for the operator.
        is_group_signaled: Signals are sent to the whole process group, as honcho does: they are not passed on, since a second
            one has a meaning of its own.
    """

    def __init__(
        self, command: list[str], say: Callable[[str], object], *, is_group_signaled: bool = False
    ) -> None:
        self._command = command
        self._say = say
        self._is_group_signaled = is_group_signaled
        self._is_stopping = False
        self._process: subprocess.Popen[bytes] | None = None

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """A signal handler: start nothing more, and pass the signal on."""
        self._is_stopping = True
        if self._process is not None and not self._is_group_signaled:
            self._process.send_signal(signum)

    def orphaned(self) -> None:
        """The parent process is gone: terminate the command, with SIGKILL if it takes too long."""
        self._say(f"the process that started this pool was killed: {' '.join(self._command)} is terminated\n")
        self._is_stopping = True
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(ORPHAN_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def run(self) -> int:
        """Run the command until it exits with 0, is stopped, or cannot start; its exit status."""
        pauses, is_first = Pauses(), True
        while True:
            began_mono = time.monotonic()
            status = self._run_once()
            run_seconds = time.monotonic() - began_mono
            never_up = is_first and status == CANNOT_START and run_seconds < STARTING_SECONDS
            if self._is_stopping or status == 0 or never_up:
                return status
            is_first = False
            pause = pauses.after(run_seconds)
            how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
            self._say(f"{' '.join(self._command)} {how}; it is restarted in {pause:g} s\n")
            self._sleep(pause)
            if self._is_stopping:
                return 0

    def _run_once(self) -> int:
        self._process = subprocess.Popen(self._command)
        if self._is_stopping:  # a signal came before there was a process to pass it on to
            self._process.terminate()
        with _guarded(self._process.pid, self._say):
            return self._process.wait()

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._is_stopping and time.monotonic() < deadline:
            time.sleep(0.05)


@contextmanager
def _guarded(process_id: int, say: Callable[[str], object]) -> Iterator[None]:
    """Have a process terminated if this one is killed meanwhile, on any Unix: the kernel then closes the guard's pipe.

    If the guard cannot be started, the process runs without one: to leave it without a supervisor would be worse.
    """
    command = ["/bin/sh", "-c", _GUARD, "guard", str(process_id), f"{ORPHAN_EXIT_SECONDS:.0f}"]
    null = subprocess.DEVNULL
    guard = None
    try:
        guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null)
    except OSError as error:
        say(
            f"process {process_id} goes on if its supervisor is killed: its guard cannot be started: {error}\n"
        )
    if guard is None:
        yield
        return
    with guard:
        try:
            yield
        finally:
            guard.kill()


def when_gone(process_id: int, act: Callable[[], object]) -> None:
    """Call `act` once, in a thread, when that process has ended, however it ended."""

    def watch() -> None:
        while _is_alive(process_id):
            time.sleep(PARENT_POLL_SECONDS)
        act()

    threading.Thread(target=watch, daemon=True).start()


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main(argv: list[str] | None = None) -> int:
    """Supervise; the exit status, 128 + N for signal N as in a shell."""
    parser = argparse.ArgumentParser(prog="python -m common.pool.supervise")
    parser.add_argument("--group", action="store_true", help="signals are sent to the whole process group")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process is gone")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    command: list[str] = arguments.command
    if not command:
        sys.stderr.write(
            "python -m common.pool.supervise [--group] [--parent PID] COMMAND...: the command is missing\n"
        )
        return 2

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            sys.stderr.write(f"mlx-pool: {line}")
            sys.stderr.flush()

    supervisor = Supervisor(command, say, is_group_signaled=arguments.group)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, supervisor.stop)
    if arguments.parent is not None:
        when_gone(arguments.parent, supervisor.orphaned)
    status = supervisor.run()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
