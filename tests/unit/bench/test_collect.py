"""Results of several machines are put together."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from bench.contest import collect, results
from bench.contest.contenders import Alone
from bench.contest.results import Summary
from bench.harness.table import with_range


def _summary(contender: str, rates: list[float], ratios: list[float], p99_ms: float = 8.0) -> Summary:
    return Summary(
        contender,
        8,
        rates[0],
        ratios,
        (1.0, 3.0),
        (2.0, p99_ms),
        1,
        {},
        0.0,
        "1b, greedy, 64 tokens per stream",
        rates,
        [(2.0, p99_ms)] * len(rates),
    )


FIRST = [
    _summary(Alone.name, [100.0, 100.0, 100.0], [1.0, 1.0, 1.0]),
    _summary("mlx-pool", [110.0, 130.0, 120.0], [1.1, 1.3, 1.2], 4.0),
]
SECOND = [_summary(Alone.name, [200.0], [1.0], 20.0), _summary("mlx-pool", [180.0], [0.9], 6.0)]


def test_rounds_of_all_machines_count_alike() -> None:
    """Median and range are of all rounds; each machine's median stands beside them, in the order of the files."""
    assert collect.rows([FIRST, SECOND]) == [
        [
            "8",
            "mlx-pool",
            "1.15 (0.90 to 1.30)",
            "4 on 2 machines",
            "1.20 0.90",
            "125 (110 to 180)",
            "100 (100 to 200)",
            "2.0 (2.0 to 3.0)",
            "4.0 (4.0 to 10.0)",
            "2",
        ]
    ]


def test_a_machine_without_a_contender_does_not_count() -> None:
    """Not every number of streams fits in a machine's time."""
    (row,) = collect.rows([FIRST, SECOND[:1]])
    assert row[2:5] == ["1.20 (1.10 to 1.30)", "3 on 1 machine", "1.20"]


def test_conditions_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy streams and mixed ones of one machine are different tables."""
    mixed = [
        msgspec.structs.replace(each, conditions="1b, logprobs, 64 tokens per stream") for each in SECOND
    ]
    results.write(tmp_path / "greedy.json", FIRST)
    results.write(tmp_path / "mix.json", mixed)
    assert collect.main([str(tmp_path / "greedy.json"), str(tmp_path / "mix.json")]) == 0
    printed = capsys.readouterr().out
    greedy, logprobs = printed.split("1b, logprobs, 64 tokens per stream")
    assert "3 on 1 machine |" in greedy
    assert "1 on 1 machine |" in logprobs


def test_old_files_are_read(tmp_path: Path) -> None:
    """A file that has neither rounds nor conditions has its medians."""
    path = tmp_path / "old.json"
    old = [msgspec.to_builtins(each) for each in SECOND]
    for each in old:
        del each["conditions"], each["round_tokens_per_second"], each["round_gaps_ms"]
    path.write_bytes(msgspec.json.encode(old))
    (row,) = collect.rows([results.read(path)])
    assert row[5:9] == ["180", "200", "3.0", "10.0"]


def test_gaps_that_were_not_measured(tmp_path: Path) -> None:
    """A contender without streaming has none: NaN survives the file, and the cell is empty."""
    path = tmp_path / "one.json"
    nan = (math.nan, math.nan)
    results.write(path, [msgspec.structs.replace(SECOND[1], gaps_ms=nan, round_gaps_ms=[nan])])
    (read,) = results.read(path)
    assert math.isnan(read.gaps_ms[0])
    assert collect.rows([[read]])[0][7] == ""


def test_range() -> None:
    """Of one value there is none."""
    assert with_range([0.7, 0.78, 0.74], ".2f") == "0.74 (0.70 to 0.78)"
    assert with_range([0.7], ".2f") == "0.70"
    assert with_range([], ".2f") == ""
