"""The measured speed of a worker, which goes into its model card."""

from __future__ import annotations

from worker.jobs.heartbeat import BusyRate


def test_rate_while_busy() -> None:
    """Idle time does not count, a single outlier changes little, and an early heartbeat adds to the next measurement."""
    rate = BusyRate()
    rate.observe(0.0, 0, is_busy=True)
    rate.observe(0.5, 500, is_busy=True)
    assert rate.per_second == 0.0
    rate.observe(2.0, 2000, is_busy=True)
    assert rate.per_second == 1000.0
    rate.observe(100.0, 2000, is_busy=False)
    rate.observe(200.0, 2000, is_busy=True)
    assert rate.per_second == 1000.0
    rate.observe(201.0, 2000, is_busy=True)
    assert rate.per_second == 700.0
