"""The transport without a model: everything as in production, except for a synthetic engine.

`python -m bench.transport` starts a private pool (Redis, one API process, one synthetic worker) and measures, with a client
that checks each stream token by token: offered and delivered load, and the latency from the end of a step to the client; maximum
throughput; time to first token at an idle pool.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

from bench.harness.meter import Meter, Usage, measure_when_quiet
from bench.harness.pool import Pool, synthetic_worker
from bench.harness.table import Table, percentile, say
from bench.load.protocols import PROTOCOLS, Protocol
from bench.load.streams import Load, Stream, inexact

MODEL = "synthetic"
ROLES = ("api", "redis", "worker", "client")
MAX_BATCH = 256

OFFERED: tuple[tuple[int, int], ...] = ((64, 100), (64, 200), (64, 400), (256, 50), (256, 100))
FLAT_OUT = (1, 16, 64, 256)
FLAT_OUT_TOKENS_PER_SECOND = 60_000
"""An estimate, which determines the length of the streams."""

BURSTS = (16, 64, 256)
NUM_BURSTS = 9
NUM_SEQUENTIAL = 200


def worker(*flags: str) -> list[str]:
    """The command line of the synthetic worker."""
    return synthetic_worker(MODEL, MAX_BATCH, *flags)


def run_checked(pool: Pool, load: Load, num_streams: int, num_tokens: int) -> tuple[list[Stream], Usage]:
    """Run concurrent streams and check that each is exact.

    Raises:
        RuntimeError: A stream was not exact.
    """
    request = load.request("go", num_tokens)
    meter = Meter(pool)
    streams = load.run(Stream(request, check=True, protocol=load.protocol) for _ in range(num_streams))
    usage = meter.usage()
    if wrong := inexact(streams, num_tokens):
        raise RuntimeError(f"{len(wrong)} of {num_streams} streams are not exact; the first: {wrong[0]}")
    return streams, usage


def delivered_rate(streams: list[Stream]) -> float:
    """Tokens per second while all streams were running; of streams that did not overlap, over the whole time."""
    began = max(stream.first_at for stream in streams)
    ended = min(stream.last_at for stream in streams)
    if ended <= began:  # too short to overlap
        began, ended = min(stream.began_at for stream in streams), max(stream.last_at for stream in streams)
        return sum(stream.num_checked for stream in streams) / (ended - began)
    rates = [(stream.num_checked - 1) / (stream.last_at - stream.first_at) for stream in streams]
    return sum(rates)


def costs(usage: Usage, num_tokens: int) -> list[str]:
    """Table cells: CPU microseconds per token of each role, their CPU shares, and CPUs used by other processes."""
    return [
        *(f"{usage.us_per(role, num_tokens):.1f}" for role in ROLES),
        " ".join(f"{100 * usage.share(role):.0f}" for role in ROLES),
        f"{usage.others:.2f}",
    ]


COST_COLUMNS = (
    "API µs/token",
    "Redis",
    "worker",
    "client",
    "% of a CPU, the same four",
    "CPUs used by others",
)


def measure_offered(seconds: float, loads: tuple[tuple[int, int], ...], protocol: Protocol) -> None:
    """(a) Streams × steps per second, offered and delivered."""
    table = Table(
        [
            "streams × steps/s",
            "offered tokens/s",
            "delivered",
            "step to client, median ms",
            "p99 ms",
            *COST_COLUMNS,
        ]
    )
    for num_streams, steps in loads:
        with Pool() as pool:
            pool.start_worker(worker("--steps-per-second", str(steps), "--timestamps"), MODEL)
            pool.start_api()
            load = Load(pool.url, MODEL, protocol=protocol)
            run_checked(pool, load, num_streams, steps)  # warm-up, one second
            streams, usage = measure_when_quiet(
                partial(run_checked, pool, load, num_streams, round(steps * seconds))
            )
        latencies = [latency for stream in streams for latency in stream.latencies_us]
        row = [
            f"{num_streams} × {steps}",
            f"{num_streams * steps:,}",
            f"{delivered_rate(streams):,.0f}",
            f"{percentile(latencies, 50) / 1000:.2f}",
            f"{percentile(latencies, 99) / 1000:.2f}",
        ]
        table.add(row + costs(usage, len(latencies)))


def measure_flat_out(seconds: float, protocol: Protocol) -> None:
    """(b) Maximum throughput."""
    table = Table(["streams", "tokens/s", "chunks/token", *COST_COLUMNS])
    with Pool() as pool:
        pool.start_worker(worker("--steps-per-second", "0"), MODEL)
        pool.start_api()
        load = Load(pool.url, MODEL, protocol=protocol)
        run_checked(pool, load, 16, 100)
        for num_streams in FLAT_OUT:
            rate = min(FLAT_OUT_TOKENS_PER_SECOND, 4000 * num_streams)
            num_tokens = round(rate * seconds / num_streams)
            streams, usage = measure_when_quiet(
                lambda num=num_streams, tokens=num_tokens: run_checked(pool, load, num, tokens)  # type: ignore[misc]
            )
            num_all = num_tokens * num_streams
            num_chunks = sum(stream.num_chunks for stream in streams)
            row = [str(num_streams), f"{delivered_rate(streams):,.0f}", f"{num_chunks / num_all:.2f}"]
            table.add(row + costs(usage, num_all))


def measure_first_token(protocol: Protocol) -> None:
    """(c) Time to first token with an engine that generates it immediately."""
    table = Table(["requests", "median ms", "p99 ms", "max", "CPUs used by others"])
    with Pool() as pool:
        flags = ("--steps-per-second", "50", "--first-token-at-once")
        pool.start_worker(worker(*flags), MODEL)
        pool.start_api()
        load = Load(pool.url, MODEL, protocol=protocol)

        def ask(num_requests: int, *, rest_seconds: float) -> list[float]:
            streams, _ = run_checked(pool, load, num_requests, 1)
            time.sleep(rest_seconds)  # until RQ's bookkeeping is done and the pool is idle
            return [1000 * (stream.first_at - stream.began_at) for stream in streams]

        def measure(label: str, ask_all: Callable[[], list[float]]) -> None:
            def ask_metered() -> tuple[list[float], Usage]:
                meter = Meter(pool)
                waits = ask_all()
                return waits, meter.usage()

            waits, usage = measure_when_quiet(ask_metered)
            figures = (percentile(waits, 50), percentile(waits, 99), max(waits))
            table.add([label, *(f"{figure:.1f}" for figure in figures), f"{usage.others:.2f}"])

        ask(16, rest_seconds=1.0)
        measure(
            "sequential",
            lambda: [wait for _ in range(NUM_SEQUENTIAL) for wait in ask(1, rest_seconds=0.02)],
        )
        for size in BURSTS:
            measure(
                f"{size} concurrent",
                lambda size=size: [wait for _ in range(NUM_BURSTS) for wait in ask(size, rest_seconds=0.5)],  # type: ignore[misc]
            )


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.transport", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", default=["offered", "flat", "first"], metavar="offered|flat|first"
    )
    parser.add_argument("--seconds", type=float, default=6.0, metavar="S", help="length of each load")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="chat")
    parser.add_argument("--loads", nargs="*", metavar="NxR", help="loads for `offered`, such as 64x400")
    arguments = parser.parse_args(argv)
    protocol = PROTOCOLS[arguments.protocol]
    loads = OFFERED
    if arguments.loads:
        loads = tuple((int(n), int(r)) for n, r in (load.split("x") for load in arguments.loads))
    if "offered" in arguments.parts:
        say("\nOffered load\n")
        measure_offered(arguments.seconds, loads, protocol)
    if "flat" in arguments.parts:
        say("\nFlat out\n")
        measure_flat_out(arguments.seconds, protocol)
    if "first" in arguments.parts:
        say("\nFirst token at an idle pool\n")
        measure_first_token(protocol)
    return 0


if __name__ == "__main__":
    sys.exit(main())
