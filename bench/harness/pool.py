"""A private pool for benchmarks and tests: Redis, API processes and workers on free ports, started and ended by process id.

`Pool` keeps track of each process and its children, so that a benchmark can report CPU time and memory by role. It runs the same
commands as users do, with default settings.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil
import redis

from common import connections, names
from common.pool import redis_binaries
from common.pool.redis_server import arguments

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = "127.0.0.1"

_READY_SECONDS = 300.0
_END_SECONDS = 15.0
_POLL_SECONDS = 0.05


class PoolError(RuntimeError):
    """A process of the pool did not start, or exited; the message has the end of its log."""


def synthetic_worker(model: str, max_batch: int, *flags: str) -> list[str]:
    """The command of a `bench.harness.synthetic_worker`, for `Pool.start_worker`."""
    command = ["bench.harness.synthetic_worker", "--name", model, "--max-batch", str(max_batch)]
    return [*command, "--log-level", "WARNING", *flags]


def free_port() -> int:
    """An unused TCP port on loopback."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Pool:
    """A pool that runs for the duration of a `with` block.

    Attributes:
        url: The API's address, once `start_api` was called.
        redis_url: URL of the private Redis.
        redis_port: Its port.

    Args:
        environ: More environment variables for all processes, such as settings.
    """

    def __init__(self, environ: dict[str, str] | None = None) -> None:
        self._environ = {k: v for k, v in os.environ.items() if not k.startswith("MLXPOOL_")} | (
            environ or {}
        )
        self._processes: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._logs: dict[int, IO[bytes]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mlx-pool-bench-")
        self.redis_port = free_port()
        self.redis_url = f"redis://{HOST}:{self.redis_port}/0"
        self.url = ""
        self.port = 0

    def __enter__(self) -> Self:
        # On SIGTERM, end all processes too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            self.start_redis()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start_redis(self) -> None:
        """Start Redis, with its data of an earlier start, and wait until it answers."""
        data = self.folder / "redis"
        data.mkdir(exist_ok=True)
        self._start("redis", arguments(redis_binaries.find()[0].path, data, self.redis_port))
        with connections.connect(self.redis_url) as client:
            connections.check(client)

    def start_api(self, num_processes: int = 1) -> None:
        """Start gunicorn and wait until it answers."""
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        environ = {"MLXPOOL_PORT": str(self.port), "MLXPOOL_API_PROCESSES": str(num_processes)}
        command = [sys.executable, "-m", "gunicorn", "-c", "api/gunicorn.conf.py", "api.asgi:app"]
        self._start("api", command, environ)
        self._wait_for("api", self._api_answers)

    def start_worker(self, command: Sequence[str], model: str, role: str = "worker") -> None:
        """Start `python -m COMMAND...` and wait until it publishes a card for `model`."""
        with connections.connect(self.redis_url) as client:
            before = _cards(client, model)
            self.start(role, command)
            self._wait_for(role, lambda: _cards(client, model) - before)

    def start(self, role: str, command: Sequence[str]) -> None:
        """Start `python -m COMMAND...`."""
        self._start(role, [sys.executable, "-m", *command])

    def stop(self, role: str) -> None:
        """End the processes of one role: SIGTERM, then SIGKILL after a timeout."""
        processes = self._processes.pop(role, [])
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                for child in _family(process.pid):
                    child.kill()
                process.wait()
            self._logs.pop(process.pid).close()

    def close(self) -> None:
        """End all processes, Redis last."""
        for role in [role for role in self._processes if role != "redis"]:
            self.stop(role)
        self.stop("redis")
        self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """Folder of the logs and of Redis's data; deleted when the pool is closed."""
        return Path(self._folder.name)

    def process(self, role: str) -> subprocess.Popen[bytes]:
        """The first process of a role."""
        return self._processes[role][0]

    def pids(self, role: str) -> list[int]:
        """The ids of a role's processes, children included."""
        return [pid for process in self._processes.get(role, []) for pid in family_pids(process.pid)]

    def cpu_seconds(self) -> dict[str, float]:
        """User and system time of each role's processes so far, children included."""
        return {role: sum(map(cpu_seconds_of, self.pids(role))) for role in self._processes}

    def rss_bytes(self) -> dict[str, int]:
        """Resident memory of each role's processes, children included."""
        return {
            role: sum(psutil.Process(pid).memory_info().rss for pid in self.pids(role))
            for role in self._processes
        }

    def log(self, role: str) -> str:
        """The log of a role's processes so far."""
        return "".join(
            Path(self._logs[process.pid].name).read_text(errors="replace")
            for process in self._processes.get(role, [])
        )

    def _start(self, role: str, command: list[str], environ: dict[str, str] | None = None) -> None:
        log = tempfile.NamedTemporaryFile(dir=self._folder.name, prefix=role, suffix=".log", delete=False)  # noqa: SIM115
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environ | {"MLXPOOL_REDIS_URL": self.redis_url} | (environ or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the benchmark, which ends its processes in order
        )
        self._logs[process.pid] = log
        self._processes.setdefault(role, []).append(process)

    def _wait_for(self, role: str, is_ready: object) -> None:
        assert callable(is_ready)
        deadline = time.monotonic() + _READY_SECONDS
        while not is_ready():
            ended = [process for process in self._processes[role] if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                what = f"ended with status {ended[0].returncode}" if ended else "does not answer"
                raise PoolError(f"{role} {what}:\n{self.log(role)[-3000:]}")
            time.sleep(_POLL_SECONDS)

    def _api_answers(self) -> bool:
        try:
            connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
            try:
                connection.request("GET", "/v1/models")
                response = connection.getresponse()
                # 401: it runs with API keys
                return response.status in (http.HTTPStatus.OK, http.HTTPStatus.UNAUTHORIZED)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError):
            return False


def _cards(client: redis.Redis, model: str) -> set[bytes]:
    """Names of the workers that have a card for the model; the card of a killed worker stays for a while."""
    workers: list[bytes] = client.zrange(names.WORKER_CARDS, 0, -1)  # type: ignore[assignment]
    return {w for w in workers if client.hget(names.worker_card(w.decode()), "id") == model.encode()}


def _family(pid: int) -> list[psutil.Process]:
    """The process and its descendants; empty if it has ended."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def family_pids(pid: int) -> list[int]:
    """Ids of a process and its running descendants."""
    return [process.pid for process in _family(pid)]


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a process; 0 if it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def cpu_seconds_of_family(pid: int) -> float:
    """User and system time of a process and its running descendants."""
    return sum(cpu_seconds_of(process.pid) for process in _family(pid))
