"""Overload: ten times a pool's capacity for a minute. How many requests are served, how fast others are refused, and how good Retry-After is.

`python -m bench.overload` sends requests at a fixed rate. Each must complete, or be refused with a Retry-After, which is
compared with how long the last request admitted before it waited.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from dataclasses import dataclass

from bench.harness.pool import Pool, synthetic_worker
from bench.harness.table import percentile, say
from bench.load.streams import Load, Stream, inexact

MODEL = "synthetic"
MAX_BATCH = 8
STEPS_PER_SECOND = 50
NUM_TOKENS = 50
REQUESTS_PER_SECOND = MAX_BATCH * STEPS_PER_SECOND / NUM_TOKENS
"""The worker's capacity."""

MAX_QUEUED = 40

_TOO_MANY = 429
_WITHIN_FACTOR = 2.0


@dataclass
class Overload:
    """The result.

    Attributes:
        wrong: Requests that neither completed nor were refused correctly.
        refusal_ms: From opening the connection to the response headers.
        advice_ratios: Retry-After ÷ the wait of the last request that was admitted before.
        grown_bytes: Growth of each role's memory after a warm-up of at most ten seconds.
    """

    num_completed: int
    num_refused: int
    wrong: list[str]
    refusal_ms: list[float]
    advice_ratios: list[float]
    grown_bytes: dict[str, int]

    def describe(self) -> str:
        """A summary in four lines."""
        ratios = self.advice_ratios
        good = sum(1 / _WITHIN_FACTOR <= ratio <= _WITHIN_FACTOR for ratio in ratios)
        grown = ", ".join(f"{role} {num / 2**20:+.1f} MiB" for role, num in self.grown_bytes.items())
        return (
            f"{self.num_completed} requests completed, {self.num_refused} refused, {len(self.wrong)} wrong\n"
            f"refused after {percentile(self.refusal_ms, 50):.1f} ms median, "
            f"{percentile(self.refusal_ms, 99):.1f} ms p99, {max(self.refusal_ms, default=0.0):.1f} ms max\n"
            f"Retry-After ÷ actual wait: {percentile(ratios, 50):.2f} median, "
            f"{percentile(ratios, 5):.2f} to {percentile(ratios, 95):.2f} for 90 %, "
            f"{good / max(1, len(ratios)):.0%} within a factor of two\n"
            f"memory: {grown}"
        )


def overload(pool: Pool, factor: float, seconds: float) -> Overload:
    """Send requests at `factor` times the capacity."""
    load = Load(pool.url, MODEL)
    request = load.request("go", NUM_TOKENS)
    rate = factor * REQUESTS_PER_SECOND

    def send(for_seconds: float) -> list[Stream]:
        streams = [Stream(request, check=True) for _ in range(round(rate * for_seconds))]
        return load.run(streams, for_seconds + 120.0, apart_seconds=1 / rate)

    send(min(10.0, seconds / 2))  # warm-up: the estimates have data, and memory its steady size
    before = pool.rss_bytes()
    streams = send(seconds)
    after = pool.rss_bytes()
    refused = [stream for stream in streams if stream.status == _TOO_MANY]
    served = [stream for stream in streams if stream.status != _TOO_MANY]
    wrong = inexact(served, NUM_TOKENS)
    wrong += ["a 429 without Retry-After" for stream in refused if stream.retry_after_seconds is None]
    return Overload(
        num_completed=len(served) - len(wrong),
        num_refused=len(refused),
        wrong=wrong,
        refusal_ms=[1000 * (stream.answered_at - stream.began_at) for stream in refused],
        advice_ratios=_advice_ratios(served, refused),
        grown_bytes={role: after[role] - before[role] for role in before},
    )


def _advice_ratios(served: list[Stream], refused: list[Stream]) -> list[float]:
    began = [stream.began_at for stream in served]
    ratios = []
    for stream in refused:
        last = bisect_right(began, stream.began_at) - 1
        if last >= 0 and stream.retry_after_seconds is not None and served[last].first_at:
            ratios.append(stream.retry_after_seconds / (served[last].first_at - served[last].began_at))
    return ratios


def start(pool: Pool) -> None:
    """Start the worker and the API."""
    steps = ("--steps-per-second", str(STEPS_PER_SECOND))
    pool.start_worker(synthetic_worker(MODEL, MAX_BATCH, *steps), MODEL)
    pool.start_api()


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit status is 1 if a request neither completed nor was refused correctly."""
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    parser.add_argument("--factor", type=float, default=10.0, metavar="F")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S")
    options = parser.parse_args(argv)
    with Pool({"MLXPOOL_MAX_QUEUED_REQUESTS": str(MAX_QUEUED)}) as pool:
        start(pool)
        result = overload(pool, options.factor, options.seconds)
    say(result.describe())
    for line in sorted(set(result.wrong))[:5]:
        say(line)
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
