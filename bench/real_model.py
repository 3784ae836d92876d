"""The real model through everything, against the same model with nothing around it, in one run.

`python -m bench.real_model` interleaves rounds, so that all contenders meet the same machine: mlx-lm's `BatchGenerator`
alone in a process of its own; the pool, over HTTP, as users have it; and, at 16 streams, a stock RQ `SimpleWorker` that
answers one job after another. The same prompts, greedy, the same number of tokens, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

from rq import Queue
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from bench.load import Load, Stream, errors
from bench.meter import Meter, Usage, in_quiet
from bench.pool import Pool
from bench.raw_generator import RawGenerator
from bench.table import Table, say
from common import connections

MODEL = "demo"
MAX_TOKENS = 64
NUM_STREAMS = (1, 8, 16, 32)
ONE_AT_A_TIME_STREAMS = 16
ONE_AT_A_TIME_QUEUE = "one-at-a-time"

_SUBJECTS = (
    "the sea|a clever fox|an old clock|winter mornings|a lost letter|the city of Paris|a garden robot|mountain villages|"
    "the first train|a quiet library|a brave sailor|the northern lights|a talking tree|ancient Rome|an honest thief|"
    "the deep forest|a paper boat|desert nights|a broken violin|the last dragon|a busy market|the moon landing|"
    "a lighthouse|wild horses|a secret door|the jazz age|a kind giant|thunderstorms|a chess master|the silk road|"
    "a tiny island|coffee farms"
)
PROMPTS = [f"Write a long story about {subject}." for subject in _SUBJECTS.split("|")]


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender's round.

    Attributes:
        tokens_per_second: From the start of the requests to the last token, reading the prompts included.
        first_token_seconds: To the first token of any stream.
        cpu_seconds: Of all its processes, the client's not.
    """

    tokens_per_second: float
    first_token_seconds: float
    cpu_seconds: float


class Contest:
    """The contenders, all loaded and warm; only one works at a time."""

    def __init__(self, pool: Pool, raw: RawGenerator, max_tokens: int) -> None:
        self._pool = pool
        self._raw = raw
        self._max_tokens = max_tokens
        self._load = Load(pool.url, MODEL)
        self._redis = connections.connect(pool.redis_url)
        self._queue = Queue(ONE_AT_A_TIME_QUEUE, connection=self._redis, serializer=JSONSerializer)

    def raw(self, num_streams: int) -> tuple[Figures, Usage]:
        """`BatchGenerator` alone."""
        meter = Meter(self._pool, {"raw": self._raw.pid})
        result = self._raw.generate(PROMPTS[:num_streams], self._max_tokens)
        usage = meter.usage()
        self._check(sum(result.num_tokens), num_streams)
        rate = sum(result.num_tokens) / result.seconds
        return Figures(rate, result.first_token_seconds, usage.cpu_seconds["raw"]), usage

    def pool(self, num_streams: int) -> tuple[Figures, Usage]:
        """Through the API."""
        requests = [
            self._load.request(
                prompt, self._max_tokens, temperature=0, stream_options={"include_usage": True}
            )
            for prompt in PROMPTS[:num_streams]
        ]
        meter = Meter(self._pool)
        streams = self._load.run([Stream(request) for request in requests], timeout_seconds=600)
        usage = meter.usage()
        if wrong := errors(streams):
            raise RuntimeError(f"{len(wrong)} streams failed, such as: {wrong[0]}")
        num_tokens = sum(stream.completion_tokens for stream in streams)
        self._check(num_tokens, num_streams)
        began = min(stream.began_at for stream in streams)
        rate = num_tokens / (max(stream.last_at for stream in streams) - began)
        first = min(stream.first_at for stream in streams) - began
        return Figures(
            rate, first, sum(usage.cpu_seconds[role] for role in ("api", "redis", "worker"))
        ), usage

    def one_at_a_time(self, num_streams: int) -> tuple[Figures, Usage]:
        """A stock RQ worker, one job after another."""
        meter = Meter(self._pool)
        began = time.monotonic()
        jobs = [
            self._queue.enqueue("bench.one_at_a_time.generate", prompt, self._max_tokens)
            for prompt in PROMPTS[:num_streams]
        ]
        while not all(job.get_status() in (JobStatus.FINISHED, JobStatus.FAILED) for job in jobs):
            time.sleep(0.05)
        seconds = time.monotonic() - began
        usage = meter.usage()
        num_tokens = sum(job.return_value() or 0 for job in jobs)
        self._check(num_tokens, num_streams)
        return Figures(num_tokens / seconds, 0.0, usage.cpu_seconds["rq"] + usage.cpu_seconds["redis"]), usage

    def _check(self, num_tokens: int, num_streams: int) -> None:
        if num_tokens != num_streams * self._max_tokens:
            raise RuntimeError(f"{num_tokens} tokens instead of {num_streams} × {self._max_tokens}")


def compare(
    contest: Contest, num_streams: int, num_rounds: int, table: Table, patience_seconds: float
) -> None:
    """Interleaved rounds at one number of streams, and the medians of their ratios.

    Who is first changes from round to round: a machine that was busy for long may have become slower. For the same reason
    the one that takes its time, one job after another, comes after all rounds.
    """
    ratios: list[float] = []
    cpu_ratios: list[float] = []
    rates: list[float] = []
    for number in range(1, num_rounds + 1):
        kinds = [contest.raw, contest.pool]
        measured = {}
        for kind in kinds if number % 2 else reversed(kinds):
            measured[kind] = in_quiet(lambda kind=kind: kind(num_streams), patience_seconds)  # type: ignore[misc]
        (raw, raw_usage), (pool, pool_usage) = measured[contest.raw], measured[contest.pool]
        ratios.append(pool.tokens_per_second / raw.tokens_per_second)
        cpu_ratios.append(raw.cpu_seconds / pool.cpu_seconds)
        rates.append(pool.tokens_per_second)
        table.add(
            [
                f"{num_streams}, round {number}",
                f"{raw.tokens_per_second:.1f}",
                f"{pool.tokens_per_second:.1f}",
                f"{ratios[-1]:.3f}",
                f"{cpu_ratios[-1]:.3f}",
                "",
                f"{1000 * (pool.first_token_seconds - raw.first_token_seconds):+.0f}",
                f"{raw_usage.others:.2f}, {pool_usage.others:.2f}",
            ]
        )
    medians = [f"**{statistics.median(values):.3f}**" for values in (ratios, cpu_ratios)]
    table.add(
        [f"**{num_streams}, median**", "", f"{statistics.median(rates):.1f}", *medians, "", "", ""],
    )
    if num_streams == ONE_AT_A_TIME_STREAMS:
        alone, usage = in_quiet(lambda: contest.one_at_a_time(num_streams), patience_seconds)
        rate = alone.tokens_per_second
        speedup = f"{rate:.1f}, pool ÷ it **{statistics.median(rates) / rate:.1f}**"
        table.add([f"{num_streams}, one after another", "", "", "", "", speedup, "", f"{usage.others:.2f}"])


def main(argv: list[str] | None = None) -> int:
    """Compare; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.real_model", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="*", default=list(NUM_STREAMS), metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="SECONDS", help="wait for a quiet machine"
    )
    arguments = parser.parse_args(argv)
    say(f"\nThe demo model, {arguments.max_tokens} tokens a stream\n")
    table = Table(
        [
            "streams",
            "alone, tokens/s",
            "pool",
            "pool ÷ alone",
            "the same in CPU time",
            "one at a time",
            "first token, ms later than alone",
            "CPUs others used",
        ]
    )
    with RawGenerator() as raw, Pool() as pool:
        pool.start_worker(["worker", "--model", MODEL, "--log-level", "WARNING"], MODEL)
        pool.start_api()
        if ONE_AT_A_TIME_STREAMS in arguments.streams:
            rq = ["rq.cli", "worker", "--worker-class", "rq.SimpleWorker", "--serializer", "json", "--quiet"]
            pool.start("rq", [*rq, "--url", pool.redis_url, ONE_AT_A_TIME_QUEUE])
        contest = Contest(pool, raw, arguments.max_tokens)
        contest.raw(8)
        contest.pool(8)
        if ONE_AT_A_TIME_STREAMS in arguments.streams:
            contest.one_at_a_time(1)
        for num_streams in arguments.streams:
            compare(contest, num_streams, arguments.rounds, table, arguments.patience)
    return 0


if __name__ == "__main__":
    sys.exit(main())
