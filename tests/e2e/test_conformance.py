"""Our own server under the suite that judges any server: all of it has to be shown, with a real model."""

from __future__ import annotations

from bench.harness.pool import Pool
from tests.conformance import catalogue, report, runner
from tests.conformance.server import Server


def test_every_behaviour_is_shown(pool: Pool) -> None:
    """Nothing in the catalogue is left out, and nothing kills a process."""
    server = Server(pool.url, "demo")
    results = runner.run(server, catalogue.load())
    server.close()
    assert all(result.shown for result in results), "\n".join(report.table(results))
    assert not any(result.died for result in results)
