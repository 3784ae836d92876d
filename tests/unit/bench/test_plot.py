"""The chart of a contest shows what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from bench.contest import plot, results
from bench.contest.results import Summary


def _summary(contender: str, num_streams: int, tokens_per_second: float) -> Summary:
    gaps_ms = (
        (math.nan, math.nan) if contender == "one after another" else (2.0 * num_streams, 9.0 * num_streams)
    )
    return Summary(contender, num_streams, tokens_per_second, [], (1.0, 3.0), gaps_ms, 0, {}, 0.0)


def test_lines_are_the_medians() -> None:
    """One line per contender and panel, by number of streams; a contender without measurements in a panel has none."""
    found = [_summary("a", 8, 80.0), _summary("a", 1, 10.0), _summary("one after another", 8, 5.0)]
    tokens, _, gaps = plot.chart(found, "title").axes
    assert [line.get_xydata().tolist() for line in tokens.lines] == [[[1, 10.0], [8, 80.0]], [[8, 5.0]]]
    assert [line.get_xydata().tolist() for line in gaps.lines] == [[[1, 2.0], [8, 16.0]]]
    assert len(gaps.collections) == 1  # up to the 99th percentile


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    """Files of several runs are merged, and the chart is reproducible byte by byte."""
    for name, streams in (("one", 1), ("eight", 8)):
        (tmp_path / name).write_bytes(msgspec.json.encode([_summary("mlx-pool", streams, 10.0)]))
    pictures = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for path in pictures:
        assert (
            plot.main([str(tmp_path / "one"), str(tmp_path / "eight"), str(path), "--title", "<H200>"]) == 0
        )
    first, second = (path.read_text() for path in pictures)
    assert first == second
    assert "mlx-pool" in first


def test_machines_are_merged() -> None:
    """What several files have in common is drawn once, as the median."""
    found = [_summary("a", 8, rate) for rate in (70.0, 80.0, 100.0)]
    (one,) = plot.merged(found)
    assert (one.contender, one.num_streams, one.tokens_per_second) == ("a", 8, 80.0)
    (nothing,) = plot.merged([_summary("one after another", 8, 5.0)])
    assert math.isnan(nothing.gaps_ms[0])


def test_a_chart_has_one_kind_of_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file may have several mixes; the message names them, and `--conditions` chooses one."""
    found = [
        msgspec.structs.replace(_summary("mlx-pool", 8, 10.0), conditions=mix)
        for mix in ("greedy", "logprobs")
    ]
    figures, picture = tmp_path / "both.json", tmp_path / "picture.svg"
    results.write(figures, found)
    with pytest.raises(SystemExit):
        plot.main([str(figures), str(picture)])
    assert "greedy; logprobs" in capsys.readouterr().err
    assert plot.main([str(figures), str(picture), "--conditions", "logprobs"]) == 0
    assert picture.exists()
