"""Our own server under the conformance suite, which judges any server: with a real model, every behaviour has to be shown."""

from __future__ import annotations

import pytest

from bench.harness.pool import Pool
from tests.conformance import catalogue, report, runner
from tests.conformance.server import Server

SHORT_STRIDE = 12
"""`make test` checks every twelfth behaviour of the catalogue, which are some of each section."""


def _assert_shown(pool: Pool, behaviours: list[catalogue.Behaviour]) -> None:
    server = Server(pool.url, "demo")
    results = runner.run(server, behaviours)
    server.close()
    assert all(result.shown for result in results), "\n".join(report.table(results))
    assert not any(result.died for result in results)


def test_a_selection_of_behaviours(pool: Pool) -> None:
    """A few behaviours of each section are shown, and none of them kills a process."""
    behaviours = catalogue.load()[::SHORT_STRIDE]
    assert {behaviour.section for behaviour in behaviours} == set(catalogue.SECTIONS)
    _assert_shown(pool, behaviours)


@pytest.mark.heavy
def test_every_behaviour(pool: Pool) -> None:
    """Every behaviour of the catalogue is shown, and none of them kills a process."""
    _assert_shown(pool, catalogue.load())
