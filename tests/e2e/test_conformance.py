"""Our own server under the conformance suite, which checks any server: with a real model, every behavior has to be present."""

from __future__ import annotations

import pytest

from bench.harness.pool import Pool
from tests.conformance import catalogue, report, runner
from tests.conformance.server import Server

SHORT_STRIDE = 12
"""`make test` checks every twelfth behavior of the catalogue, so that each section has some."""


def _assert_shown(pool: Pool, behaviors: list[catalogue.Behavior]) -> None:
    server = Server(pool.url, "demo")
    results = runner.run(server, behaviors)
    server.close()
    assert all(result.shown for result in results), "\n".join(report.table(results))
    assert not any(result.died for result in results)


def test_a_selection_of_behaviors(pool: Pool) -> None:
    """A few behaviors of each section are shown, and none of them kills a process."""
    behaviors = catalogue.load()[::SHORT_STRIDE]
    assert {behavior.section for behavior in behaviors} == set(catalogue.SECTIONS)
    _assert_shown(pool, behaviors)


@pytest.mark.heavy
def test_every_behavior(pool: Pool) -> None:
    """Every behavior of the catalogue is shown, and none of them kills a process."""
    _assert_shown(pool, catalogue.load())
