"""The table: what is shown by section, and a line for each behaviour that is not."""

from __future__ import annotations

from collections.abc import Iterator

from tests.conformance.catalogue import SECTIONS
from tests.conformance.runner import Result

_REASON_CHARACTERS = 140


def table(results: list[Result], *, with_all: bool = False) -> Iterator[str]:
    """Lines of text.

    Args:
        with_all: A line for what is shown too.
    """
    for section in SECTIONS:
        mine = [result for result in results if result.behaviour.section == section]
        if not mine:
            continue
        yield f"{section:12} {summary(mine)}"
        for result in mine:
            if with_all or not result.shown:
                yield _line(result)
    deaths = [result.behaviour.id for result in results if result.died]
    if deaths:
        yield f"\nThe server died of {len(deaths)}: {', '.join(deaths)}"
    yield f"\n{summary(results)} behaviours are shown"


def summary(results: list[Result]) -> str:
    return f"{sum(result.shown for result in results)} of {len(results)}"


def _line(result: Result) -> str:
    mark, reason = ("+", "") if result.shown else ("-", f": {' '.join(str(result.reason).split())}")
    return f"  {mark} {result.seconds:4.1f} s  {result.behaviour.id}{reason[:_REASON_CHARACTERS]}"
