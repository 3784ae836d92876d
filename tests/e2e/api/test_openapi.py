"""The API against its OpenAPI description, with two fuzzers: responses are as described, and never a 5xx."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.fuzz.fuzzer import Fuzz
from bench.fuzz.texts import MODEL
from bench.harness.pool import ROOT, Pool
from common import connections
from common.rq import JsonJob
from tests.e2e.api_pool import ApiPool
from tests.fake_worker import FakeWorker
from tests.redis.pool_of_workers import wait_until

MAX_EXAMPLES = 25
NUM_BODIES = 1500


@pytest.fixture(scope="module")
def api() -> Iterator[ApiPool]:
    with Pool() as pool, FakeWorker(pool.redis_url, MODEL, vocab_size=2**62) as worker:
        pool.start_api()
        yield ApiPool(pool, worker)


def test_conditional_requests(api: ApiPool) -> None:
    """The description has an ETag; `If-None-Match` in each of its forms is a 304, or a 200 if it has changed."""
    first = api.ask("GET", "/openapi.json")
    etag = first.headers["etag"]
    assert (first.status, first.headers["content-type"]) == (200, "application/json")
    assert first.json["openapi"] == "3.1.0"
    assert re.fullmatch('"[0-9a-f]{32}"', etag)
    head = api.ask("HEAD", "/openapi.json")
    assert (head.status, head.headers["etag"]) == (200, etag)
    assert head.headers["content-length"] == str(len(first.body))
    for method in ("GET", "HEAD"):
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            assert _conditional(api, method, known) == (304, etag, b"")
    assert _conditional(api, "GET", '"other"') == (200, etag, first.body)


def _conditional(api: ApiPool, method: str, known: str) -> tuple[int, str | None, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", api.pool.port, timeout=10)
    try:
        connection.request(method, "/openapi.json", headers={"If-None-Match": known})
        response = connection.getresponse()
        return response.status, response.headers["etag"], response.read()
    finally:
        connection.close()


@pytest.mark.heavy
def test_schemathesis(api: ApiPool, tmp_path: Path) -> None:
    """Every operation with valid and invalid parameters and bodies, and with methods that it does not have: no 5xx,
    statuses, headers, types, bodies and stream events as described, nothing invalid accepted, nothing valid refused.
    """
    environ = os.environ | {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.e2e.schemathesis_hooks"}
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{api.pool.url}/openapi.json", "--no-color"]
    # Its own check of accepted requests looks at the status only; ours, in the hooks, also examines refusals.
    command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(MAX_EXAMPLES)]
    command += ["--generation-deterministic", "--continue-on-failure"]
    command += ["--suppress-health-check", "all", "--request-timeout", "20"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    num_cases = re.search(r"([\d,]+) generated", done.stdout)
    assert num_cases is not None
    assert int(num_cases[1].replace(",", "")) > 1000, done.stdout[-2000:]
    _check_no_leftovers(api)


def test_nearly_valid_bodies(api: ApiPool) -> None:
    """Each response is as described: a 400 that names the invalid field, or a valid body. No job is left behind."""
    fuzz = Fuzz(api.pool.port)
    fuzz.run(NUM_BODIES, is_repeatable=True)
    answered = {status: fuzz.statuses[status] for status in ("200", "200 stream", "400")}
    assert min(answered.values()) > NUM_BODIES // 20, fuzz.statuses
    assert fuzz.num_connections <= NUM_BODIES // 100, "a 400 must not close the connection"
    _check_no_leftovers(api)


def _check_no_leftovers(api: ApiPool) -> None:
    wait_until(lambda: not list(Fuzz(api.pool.port).left_behind(api.pool.redis_url)))
    with connections.connect(api.pool.redis_url) as client:
        open_jobs = [
            job.job_id
            for job in api.worker.jobs
            if client.hget(JsonJob.key_for(job.job_id), "status") == b"started"
            and job.job_id
            not in api.worker.cancelled  # its deadline was over; the fake worker does not finish such a job
        ]
    assert open_jobs == []
    assert all(thread.is_alive() for thread in api.worker._threads)
    num_jobs = len(api.worker.jobs)
    answer = api.chat()
    assert (answer.status, len(api.worker.jobs)) == (200, num_jobs + 1)
    assert "Traceback" not in api.pool.log("api")
