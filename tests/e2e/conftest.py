"""A complete pool for the end-to-end tests: Redis, gunicorn and a worker with the demo model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.harness.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two API processes and one worker that serves `demo`."""
    with Pool({"MLXPOOL_MODEL": "demo"}) as running:
        running.start_worker(["worker"], "demo")
        running.start_api(num_processes=2)
        yield running
