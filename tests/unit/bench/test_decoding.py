"""The table of decode steps."""

from __future__ import annotations

from bench.decoding import cells


def test_ratios_have_their_range() -> None:
    """Each round is compared within itself; the median and the range are of the rounds' ratios."""
    rounds = [[0.010, 0.007, 0.011], [0.020, 0.0156, 0.020], [0.010, 0.0074, 0.012]]
    assert cells(rounds) == [
        "10.00 (10.00 to 20.00)",
        "0.740 (0.700 to 0.780)",
        "1.100 (1.000 to 1.200)",
    ]
