"""One table of several runs of `bench.contest --json FILE`: `python -m bench.contest.collect FILE...`.

Machines differ, so rounds are measured on several, each with a file of its own. This prints the median and the range of all rounds
together, and the median of each machine. Each set of conditions (model, mix, tokens per stream) has a table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.contest import results
from bench.contest.contenders import Alone
from bench.contest.results import Summary
from bench.harness.table import Table, say, with_range

COLUMNS = (
    "streams",
    "contender",
    "÷ alone",
    "rounds",
    "by machine",
    "tokens/s",
    "alone, tokens/s",
    "p99 gap ÷ median gap",
    "alone, p99 ÷ median",
    "failed streams",
)


def rows(machines: Sequence[Sequence[Summary]]) -> list[list[str]]:
    """The cells of a table, by number of streams; `BatchGenerator` alone is in each row, not in one of its own.

    Args:
        machines: The results of each machine, all under the same conditions.
    """
    everything = [each for machine in machines for each in machine]
    keys = dict.fromkeys((each.num_streams, each.contender) for each in everything)
    return [
        _row(
            num_streams,
            contender,
            [_find(machine, num_streams, contender) for machine in machines],
            [_find(machine, num_streams, Alone.name) for machine in machines],
        )
        for num_streams, contender in sorted(keys, key=lambda key: key[0])
        if contender != Alone.name
    ]


def _find(machine: Iterable[Summary], num_streams: int, contender: str) -> list[Summary]:
    return [each for each in machine if (each.num_streams, each.contender) == (num_streams, contender)]


def _row(
    num_streams: int, contender: str, own: Sequence[list[Summary]], alone: Sequence[list[Summary]]
) -> list[str]:
    by_machine = [[ratio for each in found for ratio in each.ratios] for found in own]
    by_machine = [ratios for ratios in by_machine if ratios]
    num_rounds = sum(map(len, by_machine))
    num_machines = len(by_machine)
    return [
        str(num_streams),
        contender,
        with_range([ratio for ratios in by_machine for ratio in ratios], ".2f"),
        f"{num_rounds} on {num_machines} machine{'' if num_machines == 1 else 's'}",
        " ".join(f"{statistics.median(ratios):.2f}" for ratios in by_machine),
        with_range(_tokens_per_second(own), ",.0f"),
        with_range(_tokens_per_second(alone), ",.0f"),
        with_range(_gap_ratios(own), ".1f"),
        with_range(_gap_ratios(alone), ".1f"),
        str(sum(each.num_failed for found in own for each in found)),
    ]


def _tokens_per_second(machines: Iterable[list[Summary]]) -> list[float]:
    """By round; a file without rounds counts with its median."""
    return [
        rate
        for found in machines
        for each in found
        for rate in each.round_tokens_per_second or [each.tokens_per_second]
    ]


def _gap_ratios(machines: Iterable[list[Summary]]) -> list[float]:
    """The 99th percentile of the gaps ÷ their median, by round."""
    gaps = [gap for found in machines for each in found for gap in each.round_gaps_ms or [each.gaps_ms]]
    return [p99 / median for median, p99 in gaps if math.isfinite(p99) and median > 0]


def main(argv: list[str] | None = None) -> int:
    """Print a table for each kind of run; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.contest.collect", description=__doc__)
    parser.add_argument(
        "figures",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="that `bench.contest --json` wrote, one a machine",
    )
    arguments = parser.parse_args(argv)
    machines = [results.read(path) for path in arguments.figures]
    for conditions in dict.fromkeys(each.conditions for machine in machines for each in machine):
        say(f"\n{conditions}\n")
        table = Table(COLUMNS)
        for row in rows(
            [[each for each in machine if each.conditions == conditions] for machine in machines]
        ):
            table.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
