"""A complete pool of synthetic workers for each test, and a client that checks every token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench import chaos
from bench.harness.pool import Pool
from bench.load.streams import Load, Stream
from tests.redis.pool_of_workers import wait_until


class Chaos:
    """A pool, its workers, and streams through its API."""

    def __init__(self, pool: Pool, num_api_processes: int = 1) -> None:
        self.pool = pool
        self.workers = chaos.Workers(pool)
        self.outcome = chaos.Outcome()
        self._num_api_processes = num_api_processes

    def start(self, num_workers: int = 1, *flags: str) -> None:
        """Start the workers, then the API, which serves only models that have a worker."""
        self.workers = chaos.Workers(self.pool, flags)
        for _ in range(num_workers):
            self.workers.start()
        self.pool.start_api(self._num_api_processes)

    @property
    def load(self) -> Load:
        return Load(self.pool.url, chaos.MODEL)

    def stream(self, num_tokens: int, prompt: str = "go") -> Stream:
        return Stream(self.load.request(prompt, num_tokens), check=True)

    def assert_exact(self) -> None:
        """Every stream was exact, and Redis is empty of jobs once the pool is idle."""
        assert self.outcome.num_streams
        assert self.outcome.wrong == []
        wait_until(lambda: not chaos.leftovers(self.pool), 20)


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[Chaos]:
    """A pool with the settings of the test's `settings` marker."""
    mark = request.node.get_closest_marker("settings")
    settings = {
        f"MLXPOOL_{name.upper()}": str(value) for name, value in (mark.kwargs if mark else {}).items()
    }
    processes = int(settings.pop("MLXPOOL_API_PROCESSES", "1"))
    with Pool(settings) as pool:
        yield Chaos(pool, processes)
