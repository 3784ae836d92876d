"""Cost of network latency: all processes reach Redis through a proxy that delays data, as a LAN does.

`python -m bench.lan` compares a pool without added latency and with a round-trip time of 2 ms: time to first token of sequential
requests, also in round trips, and tokens per second of many concurrent streams.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench.harness.meter import measure_when_quiet
from bench.harness.pool import Pool
from bench.harness.table import Table, percentile
from bench.load.streams import Load
from bench.transport import MODEL, delivered_rate, run_checked, worker
from common import connections

NUM_REQUESTS = 100
NUM_PINGS = 200
NUM_STREAMS = 64
STEPS_PER_SECOND = 100
REST_SECONDS = 0.03

COLUMNS = (
    "added RTT, ms",
    "PING, ms",
    "first token ms, p50",
    "p99",
    "extra round trips",
    "offered tokens/s",
    "delivered",
)


@contextmanager
def behind_proxy(pool: Pool, delay_ms: float) -> Iterator[None]:
    """Processes that the block starts reach Redis through a proxy."""
    command = [
        sys.executable,
        "-m",
        "bench.harness.proxy",
        "--to",
        str(pool.redis_port),
        "--delay-ms",
        str(delay_ms),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        direct_url, pool.redis_url = pool.redis_url, f"redis://127.0.0.1:{int(proxy.stdout.readline())}/0"
        try:
            yield
        finally:
            pool.redis_url = direct_url
            proxy.kill()


def ping_ms(url: str) -> float:
    """Median round-trip time of a PING, in milliseconds."""
    times = []
    with connections.connect(url) as client:
        for _ in range(NUM_PINGS):
            began = time.perf_counter()
            client.ping()
            times.append(1000 * (time.perf_counter() - began))
    return percentile(times, 50)


def measure(delay_ms: float, seconds: float) -> tuple[float, list[float], float]:
    """Median PING time in ms, times to first token in ms, and tokens per second that were delivered."""
    with Pool() as pool, behind_proxy(pool, delay_ms / 2):
        trip_ms = ping_ms(pool.redis_url)
        pool.start_worker(worker("--steps-per-second", str(STEPS_PER_SECOND), "--first-token-at-once"), MODEL)
        pool.start_api()
        load = Load(pool.url, MODEL)
        run_checked(pool, load, 16, 5)
        waits = []
        for _ in range(NUM_REQUESTS):
            time.sleep(REST_SECONDS)
            streams, _ = run_checked(pool, load, 1, 1)
            waits += [1000 * (stream.first_at - stream.began_at) for stream in streams]
        run_checked(pool, load, NUM_STREAMS, STEPS_PER_SECOND)
        streams, _ = measure_when_quiet(
            lambda: run_checked(pool, load, NUM_STREAMS, round(STEPS_PER_SECOND * seconds))
        )
        for role in ("api", "worker"):  # before the proxy ends
            pool.stop(role)
    return trip_ms, waits, delivered_rate(streams)


def main(argv: list[str] | None = None) -> int:
    """Measure both and print a table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.lan", description=__doc__)
    parser.add_argument("--delay-ms", type=float, default=2.0, metavar="MS", help="round trip")
    parser.add_argument("--seconds", type=float, default=6.0, metavar="S")
    arguments = parser.parse_args(argv)
    table = Table(COLUMNS)
    base_trip_ms, base_first_ms = 0.0, 0.0
    for delay_ms in (0.0, arguments.delay_ms):
        trip_ms, waits, rate = measure(delay_ms, arguments.seconds)
        first_ms = percentile(waits, 50)
        if not delay_ms:
            base_trip_ms, base_first_ms = trip_ms, first_ms
        trips = (first_ms - base_first_ms) / (trip_ms - base_trip_ms) if delay_ms else 0.0
        figures = (f"{delay_ms:g}", f"{trip_ms:.2f}", f"{first_ms:.1f}", f"{percentile(waits, 99):.1f}")
        extra = f"{trips:.1f}" if delay_ms else ""
        table.add([*figures, extra, f"{NUM_STREAMS * STEPS_PER_SECOND:,}", f"{rate:,.0f}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
