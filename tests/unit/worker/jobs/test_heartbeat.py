"""How often a worker's heartbeats come."""

from __future__ import annotations

import pytest

from common import names
from worker.jobs.heartbeat import beat_interval_seconds


@pytest.mark.parametrize("lease_seconds", [0.5, 3.0, 60.0, 600.0])
def test_several_beats_fit_into_a_lease_and_a_card(lease_seconds: float) -> None:
    """Neither a lease nor the model card expires between two heartbeats, however long the lease is."""
    assert 3 * beat_interval_seconds(lease_seconds) < min(lease_seconds, names.CARD_SECONDS)
