"""Ten times what a pool can do, for a minute: who is served, who is told so, how soon, and how good the advice is.

`python -m bench.overload` offers requests at a fixed rate, whatever the pool does. Each must be whole, or refused with a
Retry-After. The advice is compared with what happened: how long the last request that was let in before it had to wait.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from dataclasses import dataclass

from bench.harness.pool import Pool
from bench.harness.table import percentile, say
from bench.load.streams import Load, Stream

MODEL = "synthetic"
MAX_BATCH = 8
STEPS_PER_SECOND = 50
NUM_TOKENS = 50
REQUESTS_PER_SECOND = MAX_BATCH * STEPS_PER_SECOND / NUM_TOKENS
"""What the worker can do."""

MAX_QUEUED = 40

_TOO_MANY = 429
_WITHIN_FACTOR = 2.0


@dataclass
class Overload:
    """What came of it.

    Attributes:
        wrong: Requests that were neither whole nor refused as they should.
        refusal_ms: From a connection's begin to the refusal.
        advice_ratios: Retry-After ÷ the wait of the last request that was let in before.
        grown_bytes: What each role's memory grew by, from the tenth second on.
    """

    num_whole: int
    num_refused: int
    wrong: list[str]
    refusal_ms: list[float]
    advice_ratios: list[float]
    grown_bytes: dict[str, int]

    def describe(self) -> str:
        """A few lines."""
        ratios = self.advice_ratios
        good = sum(1 / _WITHIN_FACTOR <= ratio <= _WITHIN_FACTOR for ratio in ratios)
        grown = ", ".join(f"{role} {num / 2**20:+.1f} MiB" for role, num in self.grown_bytes.items())
        return (
            f"{self.num_whole} requests whole, {self.num_refused} refused, {len(self.wrong)} wrong\n"
            f"refused after {percentile(self.refusal_ms, 50):.1f} ms in the median, "
            f"{percentile(self.refusal_ms, 99):.1f} ms p99, {max(self.refusal_ms, default=0.0):.1f} ms at most\n"
            f"Retry-After ÷ what then happened: {percentile(ratios, 50):.2f} in the median, "
            f"{percentile(ratios, 5):.2f} to {percentile(ratios, 95):.2f} for nine of ten, "
            f"{good / max(1, len(ratios)):.0%} within a factor of two\n"
            f"memory: {grown}"
        )


def overload(pool: Pool, factor: float, seconds: float) -> Overload:
    """Offer `factor` times the capacity."""
    load = Load(pool.url, MODEL)
    request = load.request("go", NUM_TOKENS)
    rate = factor * REQUESTS_PER_SECOND

    def offer(for_seconds: float) -> list[Stream]:
        streams = [Stream(request, check=True) for _ in range(round(rate * for_seconds))]
        return load.run(streams, for_seconds + 120.0, apart_seconds=1 / rate)

    offer(min(10.0, seconds / 2))  # speed and length of answers are known, and memory has its size
    before = pool.rss_bytes()
    streams = offer(seconds)
    after = pool.rss_bytes()
    refused = [stream for stream in streams if stream.status == _TOO_MANY]
    served = [stream for stream in streams if stream.status != _TOO_MANY]
    wrong = [
        stream.error or "too short" for stream in served if stream.error or stream.num_checked != NUM_TOKENS
    ]
    wrong += ["a refusal without advice" for stream in refused if stream.retry_after_seconds is None]
    return Overload(
        num_whole=len(served) - len(wrong),
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
    """The worker and the API."""
    command = ["bench.harness.synthetic_worker", "--name", MODEL, "--max-batch", str(MAX_BATCH)]
    command += ["--steps-per-second", str(STEPS_PER_SECOND), "--log-level", "WARNING"]
    pool.start_worker(command, MODEL)
    pool.start_api()


def main(argv: list[str] | None = None) -> int:
    """Measure; the exit status is 1 where a request was neither whole nor refused."""
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
