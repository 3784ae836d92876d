"""A chart of the results of `bench.contest --json FILE`: `python -m bench.contest.plot FILE PICTURE.svg`.

Three panels by number of streams: tokens per second, time to first token, and gaps between tokens. Lines are medians; the
shaded area above reaches to the 99th percentile.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.contest import results
from bench.contest.contenders import Alone
from bench.contest.results import Summary
from bench.contest.rounds import POOL, STOCK

_COLORS = {Alone.name: "#555555", POOL: "#0072b2", STOCK: "#d55e00"}
_OTHERS = ("#009e73", "#cc79a7", "#e69f00")
"""Okabe and Ito's palette, which is safe for color-blind readers."""

_WIDTH_INCHES, _HEIGHT_INCHES = 11.0, 3.8

Value = Callable[[Summary], float]

_PANELS: tuple[tuple[str, Value, Value | None], ...] = (
    ("tokens/s", lambda each: each.tokens_per_second, None),
    ("first token, ms", lambda each: each.first_ms[0], lambda each: each.first_ms[1]),
    ("gap between tokens, ms", lambda each: each.gaps_ms[0], lambda each: each.gaps_ms[1]),
)


def chart(found: list[Summary], title: str) -> Figure:
    """A chart of all contenders of one contest.

    Args:
        found: In any order; a contender may be missing at some numbers of streams.
    """
    names = list(dict.fromkeys(each.contender for each in found))
    others = iter(_OTHERS * len(names))
    colors = {name: _COLORS.get(name) or next(others) for name in names}
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, (label, median, p99) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for name in names:
            summaries = sorted(
                (each for each in found if each.contender == name), key=lambda each: each.num_streams
            )
            _line(axes, summaries, median, p99, colors[name])
        _format_axes(axes, label, sorted({each.num_streams for each in found}))
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )
    return figure


def merged(found: list[Summary]) -> list[Summary]:
    """One summary for each contender and number of streams: what is drawn is the median of all files that have it."""
    groups: dict[tuple[str, int], list[Summary]] = {}
    for each in found:
        groups.setdefault((each.contender, each.num_streams), []).append(each)
    return [
        msgspec.structs.replace(
            group[0],
            tokens_per_second=statistics.median(each.tokens_per_second for each in group),
            first_ms=_medians([each.first_ms for each in group]),
            gaps_ms=_medians([each.gaps_ms for each in group]),
        )
        for group in groups.values()
    ]


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def _line(axes: Axes, found: list[Summary], median: Value, p99: Value | None, color: str) -> None:
    measured = [each for each in found if math.isfinite(median(each))]
    if not measured:
        return
    streams, medians = [each.num_streams for each in measured], [median(each) for each in measured]
    axes.plot(streams, medians, color=color, marker="o", markersize=4, label=measured[0].contender)
    if p99 is not None:
        axes.fill_between(
            streams, medians, [p99(each) for each in measured], color=color, alpha=0.12, linewidth=0
        )


def _format_axes(axes: Axes, label: str, streams: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(streams, [str(num) for num in streams])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel("streams")
    axes.set_title(label, fontsize=10)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> int:
    """Draw the chart; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.contest.plot", description=__doc__)
    parser.add_argument(
        "figures", type=Path, nargs="+", help="files that `bench.contest --json` wrote; medians are drawn"
    )
    parser.add_argument("picture", type=Path, help="output file: .svg or .png")
    parser.add_argument("--title", default="")
    parser.add_argument(
        "--conditions", default="", metavar="PART", help="of the files' conditions, if there are several"
    )
    arguments = parser.parse_args(argv)
    found = [each for path in arguments.figures for each in results.read(path)]
    conditions = sorted({each.conditions for each in found if arguments.conditions in each.conditions})
    if len(conditions) != 1:
        known = "; ".join(sorted({each.conditions for each in found}))
        parser.error(f"--conditions has to choose one of: {known}")
    found = merged([each for each in found if each.conditions == conditions[0]])
    mpl.rcParams["svg.hashsalt"] = "mlx-pool"  # equal results give equal files
    mpl.rcParams["svg.fonttype"] = "none"
    is_svg = arguments.picture.suffix == ".svg"
    chart(found, arguments.title).savefig(
        arguments.picture, facecolor="white", metadata={"Date": None} if is_svg else None
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
