"""The report: counts by section, and one line for each behavior that is not shown."""

from __future__ import annotations

from collections.abc import Iterator

from tests.conformance.catalogue import SECTIONS
from tests.conformance.runner import Result

_REASON_CHARACTERS = 140


def table(results: list[Result], *, with_all: bool = False) -> Iterator[str]:
    """The lines of the report.

    Args:
        with_all: Also print a line for each behavior that is shown.
    """
    for section in SECTIONS:
        mine = [result for result in results if result.behavior.section == section]
        if not mine:
            continue
        yield f"{section:12} {summary(mine)}"
        for result in mine:
            if with_all or not result.shown:
                yield _line(result)
    deaths = [result.behavior.id for result in results if result.died]
    if deaths:
        yield f"\nThe server died of {len(deaths)}: {', '.join(deaths)}"
    yield f"\n{summary(results)} behaviors are shown"


def summary(results: list[Result]) -> str:
    return f"{sum(result.shown for result in results)} of {len(results)}"


def _line(result: Result) -> str:
    mark, reason = ("+", "") if result.shown else ("-", f": {' '.join(str(result.reason).split())}")
    return f"  {mark} {result.seconds:4.1f} s  {result.behavior.id}{reason[:_REASON_CHARACTERS]}"
