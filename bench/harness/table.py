"""Results as a Markdown table, printed row by row, and percentiles."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence


class Table:
    """A table that prints each row when it is added.

    Args:
        columns: Headings; all columns but the first are right-aligned.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns
        self._is_begun = False

    def add(self, cells: Sequence[str]) -> None:
        """Print a row, after the headings if it is the first."""
        if not self._is_begun:
            self._is_begun = True
            _print(self._columns)
            _print(["---", *("---:" for _ in self._columns[1:])])
        _print(cells)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed; NaN if there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def with_range(values: Sequence[float], form: str) -> str:
    """The median and the range, such as ``0.74 (0.70 to 0.78)``; empty if there are no values.

    Args:
        form: Of each number, such as ``.2f``.
    """
    if not values:
        return ""
    median = format(statistics.median(values), form)
    return median if len(values) == 1 else f"{median} ({min(values):{form}} to {max(values):{form}})"


def say(text: str) -> None:
    """Write a line to standard output and flush."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _print(cells: Sequence[str]) -> None:
    say("| " + " | ".join(cells) + " |")
