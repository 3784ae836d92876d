"""The results of a contest and their file: one `Summary` for each contender at each number of streams.

Written by `bench.contest.rounds` (`--json FILE`), read by `bench.contest.plot` and `bench.contest.collect`. Independent of what ran.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """All rounds of one contender at one number of streams.

    Attributes:
        ratios: Tokens per second ÷ those of `BatchGenerator` alone, by round.
        gaps_ms: Between the tokens of a stream: the median and the 99th percentile, each the median of all rounds.
        cpu_ms: Per token, by process.
        first_ms: Time to first token: the median and the 99th percentile.
        others: Mean number of CPUs that other processes used.
        conditions: What all contenders of the run had in common, such as the model and the mix.
        round_tokens_per_second: By round.
        round_gaps_ms: As `gaps_ms`, by round.
    """

    contender: str
    num_streams: int
    tokens_per_second: float
    ratios: list[float]
    first_ms: tuple[float, float]
    gaps_ms: tuple[float, float]
    num_failed: int
    cpu_ms: dict[str, float]
    others: float
    conditions: str = ""
    round_tokens_per_second: list[float] = []
    round_gaps_ms: list[tuple[float, float]] = []


def write(path: Path, found: list[Summary]) -> None:
    """Write the results of one run."""
    path.write_bytes(msgspec.json.encode(found))


def read(path: Path) -> list[Summary]:
    """Read what `write` wrote."""
    return msgspec.convert(_with_nan(msgspec.json.decode(path.read_bytes())), list[Summary])


def _with_nan(value: Any) -> Any:
    """JSON has no NaN; msgspec writes null instead."""
    if value is None:
        return math.nan
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    if isinstance(value, dict):
        return {key: _with_nan(each) for key, each in value.items()}
    return value
