"""Starts a command again when it dies: `python -m common.pool.supervise [OPTIONS] COMMAND...`, around each process of `make up`.

A Mac's own supervisor (launchd) does the same for a pool that is installed for good. A command that cannot start at all
is not tried again: its message says what to do.
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
from collections.abc import Callable
from types import FrameType

CANNOT_START = 1
"""The exit status of our commands that end with a sentence."""

STARTING_SECONDS = 900.0
"""A first run that says so within this time (it may download and load a model before) was never up."""

FIRST_PAUSE_SECONDS = 1.0
LAST_PAUSE_SECONDS = 30.0
WELL_AFTER_SECONDS = 60.0
"""A run this long starts the pauses from the beginning again."""

ORPHAN_SECONDS = 1.0
"""How often it is looked whether the process that all this is for still runs."""

ORPHAN_ENDS_SECONDS = 10.0
"""What a command has to end, once it is for nobody."""


class Pauses:
    """How long to wait before each next start: twice as long each time, until a run was a good one."""

    def __init__(self) -> None:
        self._next_seconds = FIRST_PAUSE_SECONDS

    def after(self, run_seconds: float) -> float:
        """The pause after a run of so many seconds."""
        if run_seconds >= WELL_AFTER_SECONDS:
            self._next_seconds = FIRST_PAUSE_SECONDS
        pause = self._next_seconds
        self._next_seconds = min(2 * pause, LAST_PAUSE_SECONDS)
        return pause


class Supervisor:
    """See the module.

    Args:
        say: Takes a line for the operator.
        is_group_told: Signals come to the whole process group, as a foreman sends them: they are not passed on, since a
            second one has a meaning of its own.
    """

    def __init__(
        self, command: list[str], say: Callable[[str], object], *, is_group_told: bool = False
    ) -> None:
        self._command = command
        self._say = say
        self._is_group_told = is_group_told
        self._is_stopping = False
        self._process: subprocess.Popen[bytes] | None = None

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """A signal handler: start nothing more, and let the command know."""
        self._is_stopping = True
        if self._process is not None and not self._is_group_told:
            self._process.send_signal(signum)

    def orphaned(self) -> None:
        """Nobody is left who asked for the command: end it, by force if it takes too long."""
        self._say(f"what started this pool was killed: {' '.join(self._command)} ends, too\n")
        self._is_stopping = True
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(ORPHAN_ENDS_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def run(self) -> int:
        """Until the command ends well, is told to stop, or cannot start; its exit status."""
        pauses, is_first = Pauses(), True
        while True:
            began_at = time.monotonic()
            status = self._run_once()
            run_seconds = time.monotonic() - began_at
            never_up = is_first and status == CANNOT_START and run_seconds < STARTING_SECONDS
            if self._is_stopping or status == 0 or never_up:
                return status
            is_first = False
            pause = pauses.after(run_seconds)
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self._say(f"{' '.join(self._command)} {how}; it is started again in {pause:g} s\n")
            self._sleep(pause)
            if self._is_stopping:
                return 0

    def _run_once(self) -> int:
        self._process = subprocess.Popen(self._command)
        if self._is_stopping:  # a signal that came before there was a process to pass it to
            self._process.terminate()
        return self._process.wait()

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._is_stopping and time.monotonic() < deadline:
            time.sleep(0.05)


def when_gone(process_id: int, act: Callable[[], object]) -> None:
    """Call `act` once, in a thread, when that process has ended. A kill leaves it no time to say so itself."""

    def watch() -> None:
        while _is_alive(process_id):
            time.sleep(ORPHAN_SECONDS)
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
    """Supervise; the exit status, 128 + N for signal N as a shell says it."""
    parser = argparse.ArgumentParser(prog="python -m common.pool.supervise")
    parser.add_argument("--group", action="store_true", help="signals come to the whole process group")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process is gone")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    command: list[str] = arguments.command
    if not command:
        sys.stderr.write(
            "python -m common.pool.supervise [--group] [--parent PID] COMMAND...: there is no command\n"
        )
        return 2

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # of one that nobody listens to
            sys.stderr.write(f"mlx-pool: {line}")
            sys.stderr.flush()

    supervisor = Supervisor(command, say, is_group_told=arguments.group)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, supervisor.stop)
    if arguments.parent is not None:
        when_gone(arguments.parent, supervisor.orphaned)
    status = supervisor.run()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
