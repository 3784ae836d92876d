"""Scaling of the transport: more API processes, more workers, more streams.

`python -m bench.scaling` runs synthetic workers on one Redis, at a given rate and flat out, with as many client processes as API
processes, each stream checked token by token: 1, 2 and 4 workers and API processes; then many slow concurrent streams, with the
memory of each. The last column of the first table shows whether the machine's CPUs are the limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from bench.harness.meter import Meter, Usage, wait_until_quiet
from bench.harness.pool import Pool, synthetic_worker
from bench.harness.table import Table, percentile, say
from bench.load.streams import Load, Stream, inexact
from bench.transport import MODEL, worker

SIZES = (1, 2, 4)
STREAMS_PER_WORKER = 64
SECONDS = 6.0
EXPECTED_TOKENS_PER_SECOND = 60_000
"""Per worker; determines the length of the streams when running flat out."""

MANY_STREAMS = 1000
MANY_WORKERS = 4
SLOW_STEPS_PER_SECOND = 2
SLOW_TOKENS = 20
TIMEOUT_SECONDS = 300.0

COLUMNS = (
    "workers",
    "API processes",
    "tokens/s",
    "÷ linear",
    "worker, % of a CPU each",
    "API, each",
    "Redis",
    "clients, each",
    "% of the machine",
)


MEMORY_ROLES = ("api", "worker", "redis")
MANY_COLUMNS = (
    "streams",
    "API processes",
    "failed",
    "first token ms, p50",
    "p99",
    *(f"KiB per stream, {role}" for role in MEMORY_ROLES),
)


class Part(NamedTuple):
    """What one client process measured.

    Attributes:
        began_at: First token of the last stream to begin, in monotonic seconds, which a machine's processes share.
        ended_at: Last token of the first stream to end.
        num_tokens: Of all streams.
        per_second: Sum of the streams' rates, each between its first and its last token.
    """

    began_at: float
    ended_at: float
    num_tokens: int
    per_second: float
    first_seconds: list[float]
    errors: list[str]


def client(url: str, num_streams: int, num_tokens: int) -> Part:
    """Run concurrent streams in this process and check each."""
    _allow_open_files()
    load = Load(url, MODEL)
    request = load.request("go", num_tokens)
    streams = load.run([Stream(request, check=True) for _ in range(num_streams)], TIMEOUT_SECONDS)
    rates = [(each.num_checked - 1) / max(1e-9, each.last_at - each.first_at) for each in streams]
    return Part(
        max(each.first_at for each in streams),
        min(each.last_at for each in streams),
        sum(each.num_checked for each in streams),
        sum(rates),
        [each.first_at - each.began_at for each in streams],
        inexact(streams, num_tokens),
    )


def run_clients(url: str, num_clients: int, num_streams: int, num_tokens: int) -> list[Part]:
    """Run concurrent streams, divided among client processes.

    Raises:
        RuntimeError: A stream was not exact.
    """
    shares = [
        num_streams // num_clients + (index < num_streams % num_clients) for index in range(num_clients)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_clients, mp_context=context) as executor:
        parts = list(executor.map(client, [url] * num_clients, shares, [num_tokens] * num_clients))
    wrong = [error for part in parts for error in part.errors]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {num_streams} streams are not exact; the first: {wrong[0]}")
    return parts


def measure_size(num_workers: int, num_api: int, steps: float, seconds: float) -> tuple[float, list[str]]:
    """Tokens per second, and the CPU shares of each role."""
    with Pool() as pool:
        for _ in range(num_workers):
            pool.start_worker(worker("--steps-per-second", str(steps)), MODEL)
        pool.start_api(num_api)
        num_streams = STREAMS_PER_WORKER * num_workers
        run_clients(pool.url, num_api, num_streams, 200)
        wait_until_quiet(20.0)
        num_tokens = round(seconds * (steps or EXPECTED_TOKENS_PER_SECOND / STREAMS_PER_WORKER))
        meter = Meter(pool)
        parts = run_clients(pool.url, num_api, num_streams, num_tokens)
        usage = meter.usage()
        return sum(part.per_second for part in parts), _shares(usage, num_workers, num_api)


def _shares(usage: Usage, num_workers: int, num_api: int) -> list[str]:
    clients = usage.others + usage.share("client")  # clients run in other processes
    busy = clients + sum(usage.share(role) for role in ("worker", "api", "redis"))
    return [
        f"{100 * usage.share('worker') / num_workers:.0f}",
        f"{100 * usage.share('api') / num_api:.0f}",
        f"{100 * usage.share('redis'):.0f}",
        f"{100 * clients / num_api:.0f}",
        f"{100 * busy / (os.cpu_count() or 1):.0f}",
    ]


def measure_sizes(sizes: Sequence[tuple[int, int]], steps: float, seconds: float) -> None:
    """One table row per size."""
    table = Table(COLUMNS)
    base = 0.0
    for num_workers, num_api in sizes:
        per_second, shares = measure_size(num_workers, num_api, steps, seconds)
        base = base or per_second / num_workers
        ratio = per_second / base / num_workers
        table.add([str(num_workers), str(num_api), f"{per_second:,.0f}", f"{ratio:.2f}", *shares])


def measure_many(num_streams: int, num_api: int, table: Table) -> None:
    """Many slow concurrent streams: none may fail. Reports how much memory each role holds per stream."""
    max_batch = -(-num_streams // MANY_WORKERS)
    with Pool({"MLXPOOL_MAX_QUEUED_REQUESTS": str(num_streams)}) as pool:
        flags = ("--steps-per-second", str(SLOW_STEPS_PER_SECOND), "--first-token-at-once")
        for _ in range(MANY_WORKERS):
            pool.start_worker(synthetic_worker(MODEL, max_batch, *flags), MODEL)
        pool.start_api(num_api)
        run_clients(pool.url, 1, 64, 2)
        before = pool.rss_bytes()
        max_bytes = dict(before)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as executor:
            future = executor.submit(client, pool.url, num_streams, SLOW_TOKENS)
            while not future.done():
                time.sleep(0.5)
                max_bytes = {role: max(num, max_bytes[role]) for role, num in pool.rss_bytes().items()}
            part = future.result()
    first = [1000 * seconds for seconds in part.first_seconds]
    figures = f"{percentile(first, 50):,.0f}", f"{percentile(first, 99):,.0f}"
    added = [f"{(max_bytes[role] - before[role]) / 1024 / num_streams:.1f}" for role in MEMORY_ROLES]
    table.add([str(num_streams), str(num_api), str(len(part.errors)), *figures, *added])
    for error in sorted(set(part.errors))[:3]:
        say(f"<!-- {error} -->")


def _allow_open_files() -> None:
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[f"{size}x{size}" for size in SIZES],
        metavar="WORKERSxAPI",
        help="such as 1x1 2x1 4x1 4x2 4x4",
    )
    parser.add_argument(
        "--steps-per-second", type=float, nargs="+", default=[400.0, 0.0], metavar="R", help="0: flat out"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S")
    parser.add_argument("--streams", type=int, default=MANY_STREAMS, metavar="N", help="0: skip this part")
    arguments = parser.parse_args(argv)
    sizes = [(int(w), int(a)) for w, _, a in (size.partition("x") for size in arguments.sizes)]
    for steps in arguments.steps_per_second:
        say(f"\n{STREAMS_PER_WORKER} streams per worker, {f'{steps:g} steps/s' if steps else 'flat out'}\n")
        measure_sizes(sizes, steps, arguments.seconds)
    if arguments.streams:
        say("\nMany concurrent streams\n")
        table = Table(MANY_COLUMNS)
        for num_api in (1, 2):
            measure_many(arguments.streams, num_api, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
