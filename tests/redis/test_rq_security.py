"""Whoever can write to Redis must not be able to run code on a Mac: a live pickle and a callback's module, planted."""

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


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connections.connect(redis_url) as connected:
        yield connected


class Plant:
    """An abandoned job with a pickle in its meta and its data, and a callback in a module that leaves a trace."""

    def __init__(self, client: redis.Redis, folder: Path) -> None:
        self.unpickled = folder / "unpickled"
        self.imported = folder / "imported"
        (folder / "planted_callbacks.py").write_text(
            f"open({str(self.imported)!r}, 'w').close()\ndef f(*a): pass\n"
        )
        self.environ = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}"}
        bomb = pickle.dumps(Bomb(self.unpickled))
        client.sadd("rq:queues", "rq:queue:m")
        fields = {
            "created_at": "2026-01-01T00:00:00.000000Z",
            "status": "started",
            "origin": "m",
            "data": zlib.compress(bomb),
            "meta": bomb,
            "failure_callback_name": "planted_callbacks.f",
            "success_callback_name": "planted_callbacks.f",
        }
        client.hset("rq:job:planted", mapping=fields)  # type: ignore[arg-type]
        client.zadd("rq:wip:m", {"planted:execution": time.time() - 10})

    def went_off(self) -> list[str]:
        return [path.name for path in (self.unpickled, self.imported) if path.exists()]

    def run(self, *command: str, **environ: str) -> str:
        result = subprocess.run(
            command, env=self.environ | environ, capture_output=True, text=True, timeout=30, check=False
        )
        return result.stdout


def test_the_plant_is_live(client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """The control: stock `rq info` without our classes does run what was planted, so the tests below can fail."""
    plant = Plant(client, tmp_path)
    plant.run(RQ, "info", "--url", redis_url)
    assert plant.went_off() == ["unpickled", "imported"]


def test_our_rq(client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """`python -m common.rq info` shows the queue and runs nothing."""
    plant = Plant(client, tmp_path)
    shown = plant.run(sys.executable, "-m", "common.rq", "info", "--raw", MLXPOOL_REDIS_URL=redis_url)
    assert "queue m 0, " in shown
    assert plant.went_off() == []


def test_stock_rq_with_our_classes(client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """The variables of the README make stock `rq info` safe too."""
    plant = Plant(client, tmp_path)
    shown = plant.run(RQ, "info", "--raw", "--url", redis_url, **CLASSES)
    assert "queue m 0, " in shown
    assert plant.went_off() == []


def test_our_worker(
    client: redis.Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that finds such jobs, abandoned and queued, runs nothing of them, and serves the next request."""
    plant = Plant(client, tmp_path)
    monkeypatch.setenv("PYTHONPATH", plant.environ["PYTHONPATH"])
    with Workers(redis_url) as workers:
        client.hset("rq:job:queued", mapping=client.hgetall("rq:job:planted"))  # type: ignore[arg-type]
        client.rpush("rq:queue:m", "queued")
        workers.start()
        job = workers.submit()
        wait_until(lambda: workers.has_ended(job))
        assert workers.text(job) == exact(20)
        time.sleep(2 * LEASE_SECONDS)  # takeover and maintenance have looked at the abandoned one
        wait_until(lambda: client.zcard("rq:wip:m") == 0)
        wait_until(lambda: client.hget("rq:job:queued", "status") == b"failed")
    assert plant.went_off() == []


def test_pickle_is_closed_in_our_processes() -> None:
    """Importing `common.rq` makes RQ's default serializer refuse, whoever asks for it."""
    code = "import common.rq, pickle, rq.serializers as s; s.resolve_serializer(None).loads(pickle.dumps(1))"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "reads JSON only" in refused.stderr
