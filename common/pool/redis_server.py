"""The embedded default: a private Redis or Valkey on loopback, for `make up` without `MLXPOOL_REDIS_URL`.

`python -m common.redis_server` runs it in the foreground, with a server that `common.pool.redis_binaries` finds. On a signal it
first lets its clients disconnect. Independent of what is stored.
"""

from __future__ import annotations

import fcntl
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from common import connections
from common.errors import StartupError
from common.machine.folders import state_folder
from common.pool import redis_binaries
from common.pool.redis_binaries import Server
from common.settings import EMBEDDED_REDIS_URL, Settings

HOST = "127.0.0.1"

# Together less than honcho's 5 seconds from its first signal to SIGKILL.
CLIENT_DISCONNECT_SECONDS = 3.0
SERVER_EXIT_SECONDS = 1.5

START_SECONDS = 30.0
"""Loading a large append-only file takes a while."""

DIED = 3
"""The exit status if the server died although it can run here: it should be restarted."""

_UNREADABLE = (
    "Can't handle RDB format version",
    "reading the append only file",
    "reading the RDB preamble",
    "AOF manifest",
    "Wrong signature",
    "file format",
)
"""Phrases in the log of Redis 7 and Valkey 8 if they cannot load their files."""


class ServerDiedError(Exception):
    """The server exited by itself, or was killed, although it can run here."""


class _UnreadableDataError(Exception):
    """This server cannot read the data that is there."""


def data_folder(settings: Settings, port: int) -> Path:
    """Where the server on `port` keeps its data: a folder for each port."""
    return state_folder(settings) / f"redis-{port}"


def arguments(binary: str, folder: Path, port: int) -> list[str]:
    """The server's complete configuration, as a command line."""
    options = {
        "bind": HOST,
        "port": str(port),
        "protected-mode": "yes",
        "daemonize": "no",
        "dir": str(folder),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    return [binary, *(word for name, value in options.items() for word in (f"--{name}", value))]


def run(settings: Settings, signals: list[int]) -> None:
    """Run a server that can read the data, until a signal is in `signals`, which a handler fills.

    A list, since an Event's lock must not be taken in a signal handler.

    Raises:
        StartupError: No server can run here.
        ServerDiedError: It ran, and exited by itself.
    """
    port = _port(settings.redis_url)
    servers = redis_binaries.find()
    folder = data_folder(settings, port)
    with _locked(folder, port):
        _free_port(_url(port), folder, port)
        writer = redis_binaries.writer(folder)
        for server in redis_binaries.preferred(servers, writer):
            try:
                _run_one(server, folder, port, signals)
            except _UnreadableDataError:
                continue
            return
        raise redis_binaries.unreadable(folder, servers, writer)


def _run_one(server: Server, folder: Path, port: int, signals: list[int]) -> None:
    """As `run`, with one server.

    Raises:
        _UnreadableDataError: This server cannot read the data; it has changed nothing.
    """
    log = folder / "server.log"
    with _start(arguments(server.path, folder, port), log) as process:
        try:
            is_up = _wait_until_ready(process, _url(port), signals)
            if is_up:
                _say(f"{server} on {HOST}:{port}, data in {folder}")
            while not signals and process.poll() is None:
                time.sleep(0.1)
            if process.poll() is not None:
                raise _exit_error(process.returncode, is_up, server.path, log)
            _wait_until_alone(_url(port))
        finally:
            _terminate(process)


def check(settings: Settings) -> None:
    """Check that `run` can start a server; one of ours whose `make up` was killed is shut down.

    Raises:
        StartupError: It cannot.
    """
    port = _port(settings.redis_url)
    redis_binaries.find()
    folder = data_folder(settings, port)
    with _locked(folder, port):
        _free_port(_url(port), folder, port)


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server, with a new log file, in a session of its own.

    A signal for our process group must not end it before its clients have disconnected.
    """
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _url(port: int) -> str:
    return f"redis://{HOST}:{port}/0"


def _port(url: str) -> int:
    """The port of a URL on this machine's loopback address."""
    parts = urlsplit(url)
    if (
        parts.scheme != "redis"
        or parts.hostname not in (HOST, "localhost")
        or parts.password
        or not parts.port
    ):
        raise StartupError(
            f"common.redis_server runs a server for {EMBEDDED_REDIS_URL} or another port of {HOST} only"
        )
    return parts.port


@contextmanager
def _locked(folder: Path, port: int) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases when this process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StartupError(
            f"the embedded Redis cannot keep its data in {folder} ({error}); set MLXPOOL_STATE_DIR"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(
                f"the embedded Redis is already running on port {port}, in another `make up`: stop that one first, or give"
                " each pool a Redis of its own (docs/operations.md, 'Two pools')"
            ) from None
        yield


def _free_port(url: str, folder: Path, port: int) -> None:
    """Check that the port is free; a server of ours whose `make up` was killed is shut down first.

    Raises:
        StartupError: Another program listens there.
    """
    if _is_free(port):
        return
    try:
        with connections.connect(url, SERVER_EXIT_SECONDS) as client:
            config: Any = client.config_get("dir")
            if Path(config["dir"]).samefile(folder):
                _say("shutting down the server of a `make up` that was killed")
                client.shutdown()
    except (redis.RedisError, OSError):
        pass
    deadline = time.monotonic() + SERVER_EXIT_SECONDS
    while not _is_free(port):
        if time.monotonic() > deadline:
            raise StartupError(
                f"port {port}, which the embedded Redis needs, is taken by another program: stop it, or set MLXPOOL_REDIS_URL"
            )
        time.sleep(0.05)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, signals: list[int]) -> bool:
    """Wait until the server answers, has exited, or there is a signal; whether it answers."""
    deadline = time.monotonic() + START_SECONDS
    with connections.connect(url) as client:
        while server.poll() is None and not signals:
            try:
                client.ping()
            except redis.RedisError:
                if time.monotonic() > deadline:
                    raise StartupError(
                        f"the embedded Redis does not answer after {START_SECONDS:.0f} s"
                    ) from None
                time.sleep(0.05)
            else:
                return True
    return False


def _exit_error(status: int, was_up: bool, binary: str, log: Path) -> Exception:
    """The error for a server that exited by itself: its type says whether it should be restarted."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if was_up or status < 0:
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        return ServerDiedError(f"{binary} {how} (its log is {log})")
    if any(phrase in line for line in lines for phrase in _UNREADABLE):
        return _UnreadableDataError()
    last = f": {lines[-1]}" if lines else ""
    return StartupError(f"{binary} exited by itself{last} (its log is {log})")


def _wait_until_alone(url: str) -> None:
    """Wait until no other client is connected, at most CLIENT_DISCONNECT_SECONDS."""
    deadline = time.monotonic() + CLIENT_DISCONNECT_SECONDS
    try:
        with connections.connect(url) as client:
            while len(client.client_list()) > 1 and time.monotonic() < deadline:
                time.sleep(0.05)
    except redis.RedisError:
        pass


def _terminate(server: subprocess.Popen[bytes]) -> None:
    """Terminate the server, with SIGKILL if it takes too long."""
    server.terminate()
    try:
        server.wait(SERVER_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _say(sentence: str) -> None:
    sys.stderr.write(f"mlx-pool redis: {sentence}\n")


def main() -> int:
    """Run the embedded server in the foreground; the exit status."""
    signals: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda received, _frame: signals.append(received))
    try:
        run(Settings.load(), signals)
    except StartupError as error:
        _say(str(error))
        return 1
    except ServerDiedError as error:
        _say(str(error))
        return DIED
    return 0
