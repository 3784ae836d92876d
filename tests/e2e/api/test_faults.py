"""The API while Redis is away, and with settings that prevent its start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.harness.pool import ROOT, Pool
from common.protocol import Delta, Event, Finished, GenerationJob, Started, Usage
from tests.conftest import unused_port
from tests.e2e.api_pool import MODEL, ApiPool, api_pool, chat_body, read_response, request
from tests.fake_worker import FakeWorker


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def start(**variables: str) -> subprocess.CompletedProcess[str]:
    """Run gunicorn with these settings until it exits by itself."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLXPOOL_")}
    environ |= {"MLXPOOL_PORT": str(unused_port())} | variables
    command = [sys.executable, "-m", "gunicorn", "-c", "api/gunicorn.conf.py", "api.asgi:app"]
    return subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"MLXPOOL_HOST": "0.0.0.0"}, "MLXPOOL_ALLOW_UNAUTHENTICATED"),  # noqa: S104 (refused)
        ({"MLXPOOL_API_PROCESSES": "many"}, "MLXPOOL_API_PROCESSES"),
        ({"MLXPOOL_PROT": "8080"}, "MLXPOOL_PORT"),
        ({"MLXPOOL_REDIS_URL": "http://127.0.0.1"}, "MLXPOOL_REDIS_URL"),
        ({"MLXPOOL_REDIS_URL": "redis://127.0.0.1:port/0"}, "MLXPOOL_REDIS_URL"),
    ],
)
def test_settings_that_prevent_the_start(variables: dict[str, str], named: str) -> None:
    """One sentence that names the setting, an exit status, no traceback and no respawn loop."""
    ended = start(**variables)
    assert ended.returncode == 1
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert line.startswith("mlx-pool: ")
    assert named in line


def test_a_start_without_redis() -> None:
    """The API starts, answers 503 with `Retry-After`, and serves once Redis is up."""
    with Pool() as pool:
        pool.stop("redis")
        pool.port = unused_port()
        command = [sys.executable, "-m", "gunicorn", "-c", "api/gunicorn.conf.py", "api.asgi:app"]
        pool._start("api", command, {"MLXPOOL_PORT": str(pool.port), "MLXPOOL_API_PROCESSES": "1"})
        api = ApiPool(pool, None)  # type: ignore[arg-type]  # no worker yet
        wait_for(lambda: answers(api))
        assert api.ask("GET", "/readyz").status == 503
        health = api.ask("GET", "/health")
        assert (health.status, health.json["status"], health.json["redis"]) == (200, "degraded", False)
        refused = api.chat(model=MODEL)
        assert (refused.status, refused.error["code"]) == (503, "queue_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert "Traceback" not in pool.log("api")
        assert pool.log("api").count("Redis is unavailable") == 1
        pool.start_redis()
        wait_for(lambda: api.ask("GET", "/readyz").json["reason"] == "no model has a live worker")
        assert api.ask("GET", "/readyz").status == 503
        assert api.ask("GET", "/v1/models").json == {"object": "list", "data": []}
        unnamed = api.chat()
        assert (unnamed.status, unnamed.error["param"]) == (400, "model")
        with FakeWorker(pool.redis_url, MODEL):
            wait_for(lambda: api.ask("GET", "/readyz").status == 200)
            assert api.chat(model=MODEL).status == 200


def answers(api: ApiPool) -> bool:
    try:
        return api.ask("GET", "/livez").status == 200
    except OSError:
        return False


def test_a_redis_outage() -> None:
    """New requests are a 503 within a second; a running stream sends comments, then continues without a gap."""
    state: dict[str, Any] = {"away": False}

    def interrupted(_job: GenerationJob) -> Iterator[Event | float]:
        yield Started(0, 5)
        for n in range(1, 6):
            yield Delta(n, n, f" {n}")
        while not state["away"]:
            yield 0.01
        while state["away"]:
            yield 0.01
        for n in range(6, 11):
            yield Delta(n, n, f" {n}")
        yield Finished(11, "stop", Usage(5, 10))

    with api_pool({"MLXPOOL_SSE_COMMENT_SECONDS": "0.5"}) as api:
        api.follow(interrupted)
        connection = api.connect()
        connection.sendall(request("POST", "/v1/chat/completions", chat_body(model=MODEL, stream=True)))
        wait_for(lambda: api.worker.jobs)
        time.sleep(0.3)
        api.pool.stop("redis")
        state["away"] = True
        wait_for(lambda: api.ask("GET", "/readyz").status == 503)
        began_at = time.monotonic()
        refused = api.chat(model=MODEL)
        assert (refused.status, refused.error["code"]) == (503, "queue_unavailable")
        assert time.monotonic() - began_at < 1
        time.sleep(1.2)
        api.pool.start_redis()
        state["away"] = False
        answer = read_response(connection)
        connection.close()
        text = "".join(f["choices"][0]["delta"].get("content", "") for f in answer.frames[:-1])
        assert text == "".join(f" {n}" for n in range(1, 11))
        assert answer.frames[-1] == "[DONE]"
        assert answer.body.count(b": keep-alive") >= 2
        assert api.pool.log("api").count("Redis is unavailable") == 1
        api.follow(lambda _job: iter([Started(0, 1), Finished(1, "stop", Usage(1, 0))]))
        wait_for(lambda: api.chat(model=MODEL).status == 200)
