"""Third-party RQ tools, unmodified from PyPI, on a pool with several executions in flight."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import missing, unused_port
from tests.redis.pool_of_workers import Workers, wait_until


@pytest.fixture
def workers(redis_url: str) -> Iterator[Workers]:
    with Workers(redis_url) as pool:
        yield pool


@contextmanager
def tool(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process during the `with` block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


def fetch(url: str) -> str:
    """Fetch a page, waiting for its server to start.

    Raises:
        HTTPError: The server answers with an error.
    """
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310 (http, as written below)
                return str(page.read().decode())
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.1)


def test_rq_dashboard(workers: Workers) -> None:
    """`python -m common.rq dashboard` shows queues, workers and jobs as they are, without prompts, and listens on loopback."""
    for _ in range(2):
        workers.start()
    jobs = [workers.submit(max_tokens=5000) for _ in range(6)]
    wait_until(lambda: workers.has_token(*jobs))
    port = unused_port()
    command = ["-m", "common.rq", "dashboard", "--redis-url", workers.url, "-p", str(port)]
    with tool(sys.executable, *command) as process:
        data = f"http://127.0.0.1:{port}/0/data"
        [queue] = json.loads(fetch(f"{data}/queues.json"))["queues"]
        assert (queue["name"], queue["count"], queue["started_job_registry_count"]) == ("m", 0, 6)
        listed: list[dict[str, Any]] = json.loads(fetch(f"{data}/workers.json"))["workers"]
        assert [worker["state"] for worker in listed] == ["busy", "busy"]
        assert {worker["current_job"]["job_id"] for worker in listed} <= set(jobs)
        assert {worker["current_job"]["call_string"] for worker in listed} == {"mlxpool.generate"}
        started = json.loads(fetch(f"{data}/jobs/m/started/10/asc/1.json"))["jobs"]
        assert {job["id"] for job in started} == set(jobs)
        assert json.loads(fetch(f"{data}/job/{jobs[0]}.json"))["status"] == "started"
        listening = psutil.Process(process.pid).net_connections()
        assert {each.laddr[0] for each in listening if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


@pytest.fixture(scope="session")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """rq-exporter in an environment of its own, as an operator would install it: 3.1 requires RQ 2."""
    folder = tmp_path_factory.mktemp("rq-exporter")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin" / "pip"), "install", "--quiet", "rq-exporter==3.1.0"]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        missing("rq-exporter (pip cannot install it)")
    return str(Path(folder) / "bin" / "rq-exporter")


@pytest.mark.heavy
def test_rq_exporter(workers: Workers, exporter: str) -> None:
    """rq-exporter, with an older RQ than ours, counts workers and jobs by status."""
    workers.start()
    done = workers.submit()
    wait_until(lambda: workers.has_ended(done))
    wait_until(lambda: workers.status(done) == "finished")
    jobs = [workers.submit(max_tokens=5000) for _ in range(4)]
    wait_until(lambda: workers.has_token(*jobs))
    port = unused_port()
    with tool(exporter, "--host", "127.0.0.1", "-p", str(port), "--redis-url", workers.url):
        metrics = fetch(f"http://127.0.0.1:{port}/metrics")
    assert re.search(r'rq_workers\{name="m\..*",queues="m",state="busy"\} 1\.0', metrics)
    assert re.search(r'rq_workers_success_total\{name="m\..*",queues="m"\} 1\.0', metrics)
    for status, count in (("started", 4), ("finished", 1), ("queued", 0), ("failed", 0)):
        assert f'rq_jobs{{queue="m",status="{status}"}} {count}.0' in metrics
