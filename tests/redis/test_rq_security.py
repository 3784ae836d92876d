"""Write access to Redis must not be enough to run code on a Mac: a malicious pickle and a callback's module are planted."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from common import connections
from tests.redis.pool_of_workers import LEASE_SECONDS, Workers, exact, wait_until

RQ = str(Path(sys.executable).with_name("rq"))
CLASSES = {
    "RQ_JOB_CLASS": "common.rq.JsonJob",
    "RQ_QUEUE_CLASS": "common.rq.JsonQueue",
    "RQ_WORKER_CLASS": "common.rq.JsonWorker",
}


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connections.connect(redis_url) as connection:
        yield connection


class Exploit:
    """An abandoned job with a pickle in its meta and its data, and a callback in a module that leaves a trace."""

    def __init__(self, client: redis.Redis, folder: Path) -> None:
        self.unpickled = folder / "unpickled"
        self.imported = folder / "imported"
        (folder / "planted_callbacks.py").write_text(
            f"open({str(self.imported)!r}, 'w').close()\ndef f(*a): pass\n"
        )
        self.environ = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}"}
        payload = pickle.dumps(Payload(self.unpickled))
        client.sadd("rq:queues", "rq:queue:m")
        fields = {
            "created_at": "2026-01-01T00:00:00.000000Z",
            "status": "started",
            "origin": "m",
            "data": zlib.compress(payload),
            "meta": payload,
            "failure_callback_name": "planted_callbacks.f",
            "success_callback_name": "planted_callbacks.f",
        }
        client.hset("rq:job:planted", mapping=fields)  # type: ignore[arg-type]
        client.zadd("rq:wip:m", {"planted:execution": time.time() - 10})

    def traces(self) -> list[str]:
        """What code that was run left behind."""
        return [path.name for path in (self.unpickled, self.imported) if path.exists()]

    def run(self, *command: str, **environ: str) -> str:
        result = subprocess.run(
            command, env=self.environ | environ, capture_output=True, text=True, timeout=30, check=False
        )
        return result.stdout


def test_stock_rq_runs_the_exploit(client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """The control: RQ's own `rq info` without our classes runs the code, so the tests below can fail."""
    exploit = Exploit(client, tmp_path)
    exploit.run(RQ, "info", "--url", redis_url)
    assert exploit.traces() == ["unpickled", "imported"]


def test_our_rq_command_line(client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """`python -m common.rq info` shows the queue and runs no code."""
    exploit = Exploit(client, tmp_path)
    shown = exploit.run(sys.executable, "-m", "common.rq", "info", "--raw", MLXPOOL_REDIS_URL=redis_url)
    assert "queue m 0, " in shown
    assert exploit.traces() == []


def test_stock_rq_with_our_classes(client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """With the documented variables RQ's own `rq info` is safe too."""
    exploit = Exploit(client, tmp_path)
    shown = exploit.run(RQ, "info", "--raw", "--url", redis_url, **CLASSES)
    assert "queue m 0, " in shown
    assert exploit.traces() == []


def test_our_worker(
    client: redis.Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that meets such jobs, abandoned and queued, runs none of their code, and serves the next request."""
    exploit = Exploit(client, tmp_path)
    monkeypatch.setenv("PYTHONPATH", exploit.environ["PYTHONPATH"])
    with Workers(redis_url) as workers:
        client.hset("rq:job:queued", mapping=client.hgetall("rq:job:planted"))  # type: ignore[arg-type]
        client.rpush("rq:queue:m", "queued")
        workers.start()
        job = workers.submit()
        wait_until(lambda: workers.has_ended(job))
        assert workers.text(job) == exact(20)
        time.sleep(2 * LEASE_SECONDS)  # until takeover and maintenance have processed the abandoned one
        wait_until(lambda: client.zcard("rq:wip:m") == 0)
        wait_until(lambda: client.hget("rq:job:queued", "status") == b"failed")
    assert exploit.traces() == []


def test_pickle_is_disabled_in_our_processes() -> None:
    """Importing `common.rq` makes RQ's default serializer refuse everything."""
    code = "import common.rq, pickle, rq.serializers as s; s.resolve_serializer(None).loads(pickle.dumps(1))"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "reads JSON only" in refused.stderr
