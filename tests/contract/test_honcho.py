"""honcho 2.0: what `common/pool/up.py` and the timeouts of `common/pool/redis_server.py` rely on."""

from __future__ import annotations

import io
import multiprocessing
import signal
import subprocess
from datetime import UTC, datetime
from typing import Any

import pytest
from honcho import manager
from honcho.compat import ProcessManager
from honcho.environ import parse_procfile
from honcho.manager import Manager
from honcho.printer import Message, Printer
from honcho.process import Popen

from common.pool import redis_server, up
from tests.contract.signatures import accepts, parameters


class Started(Exception):  # noqa: N818 (not an error)
    """Raised to end `Manager.loop` where it would start its processes."""


def test_handlers_come_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Pool._start` takes honcho's own handler from `signal.signal`. Otherwise Ctrl-C would end nothing. Open common/pool/up.py."""
    pool = Manager(Printer(io.StringIO()))
    installed: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", installed.__setitem__)

    def start() -> None:
        raise Started

    monkeypatch.setattr(pool, "_start", start)
    with pytest.raises(Started):
        pool.loop()
    assert installed.keys() == {signal.SIGTERM, signal.SIGINT}
    monkeypatch.setattr(pool, "_killall", lambda **_: None)
    installed[signal.SIGINT](signal.SIGINT, None)
    assert pool.returncode == up.EXIT_INTERRUPTED


def test_names_of_the_manager() -> None:
    """`Pool` overrides or reads these attributes. Open common/pool/up.py."""
    pool = Manager(Printer(io.StringIO()))
    assert pool._processes == {}
    assert isinstance(pool._printer, Printer)
    assert pool.returncode is None
    for name in ("_start", "_all_started", "_killall", "terminate", "loop"):
        assert callable(getattr(pool, name)), name
    assert accepts(Manager.add_process, None, "name", "command", env={}, cwd=".")


def test_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of a process that has ended is in `_processes[name]["returncode"]`: `Pool.error` reads it. Open common/pool/up.py."""
    output = io.StringIO()
    pool = Manager(Printer(output))
    monkeypatch.setattr(pool, "_start", lambda: None)
    monkeypatch.setattr(pool, "_killall", lambda **_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    pool.add_process("api", "true")
    now = datetime.now(UTC)
    pool.events.put(Message("start", {"pid": 0}, now, "api", None))
    pool.events.put(Message("line", b"hello", now, "api", None))
    pool.events.put(Message("stop", {"returncode": 1}, now, "api", None))
    pool.loop()
    assert pool._processes["api"]["returncode"] == 1
    assert pool.returncode == 1
    assert "hello" in output.getvalue()


def test_helpers_are_forked() -> None:
    """honcho starts its helpers with `multiprocessing`, and they inherit that SIGINT and SIGHUP are ignored. Open common/pool/up.py."""
    assert manager.multiprocessing is multiprocessing
    assert "ignore_signals" in parameters(manager.Process.run)


def test_children_have_a_group_each() -> None:
    """honcho signals process groups; the embedded Redis has a session of its own for that. Open common/pool/redis_server.py."""
    with Popen("exec sleep 0", stdout=subprocess.PIPE, env={"PATH": "/usr/bin:/bin"}) as child:
        child.communicate()
    assert "killpg" in ProcessManager.terminate.__code__.co_names
    assert parameters(Popen.__init__) == ["cmd", "kwargs"]


def test_patience_before_a_kill() -> None:
    """The embedded Redis waits for its clients within honcho's time from the first signal to SIGKILL. Open common/pool/redis_server.py."""
    patience = redis_server.CLIENT_DISCONNECT_SECONDS + redis_server.SERVER_EXIT_SECONDS
    assert patience < manager.KILL_WAIT


def test_printer() -> None:
    """`ErrorPrinter` reads each line in `write`; `_terminal_closed` replaces the output. Open common/pool/up.py."""
    assert parameters(Printer.write) == ["message"]
    assert Message._fields == ("type", "data", "time", "name", "colour")
    printer = Printer(io.StringIO())
    printer.output = later = io.StringIO()
    printer.write(Message("line", "moved\n", datetime.now(UTC), "api", None))
    assert "moved" in later.getvalue()


def test_procfile() -> None:
    """`add_processes` takes names and commands from it, in order. Open common/pool/up.py."""
    processes = parse_procfile("redis: a b\napi: exec c\n").processes
    assert list(processes.items()) == [("redis", "a b"), ("api", "exec c")]
