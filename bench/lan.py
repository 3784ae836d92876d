"""What a network costs: everything reaches Redis through a proxy that holds up each piece of data, as a LAN does.

`python -m bench.lan` compares the same pool with Redis at no distance and at 2 ms there and back: the time to the first token
of one request after another, in round trips, and the tokens a second of many streams.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench.harness.meter import in_quiet
from bench.harness.pool import Pool
from bench.harness.table import Table, percentile
from bench.load.streams import Load
from bench.transport import MODEL, carried, run_checked, worker
from common import connections

NUM_REQUESTS = 100
NUM_PINGS = 200
NUM_STREAMS = 64
STEPS_PER_SECOND = 100
REST_SECONDS = 0.03

COLUMNS = (
    "Redis is away, ms",
    "PING, ms",
    "first token ms, p50",
    "p99",
    "round trips more",
    "offered tokens/s",
    "carried",
)


@contextmanager
def distant(pool: Pool, delay_ms: float) -> Iterator[None]:
    """The pool's processes that are started now reach Redis through a proxy."""
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
        near, pool.redis_url = pool.redis_url, f"redis://127.0.0.1:{int(proxy.stdout.readline())}/0"
        try:
            yield
        finally:
            pool.redis_url = near
            proxy.kill()


def ping_ms(url: str) -> float:
    """How long a command takes there and back, in the median."""
    times = []
    with connections.connect(url) as client:
        for _ in range(NUM_PINGS):
            began = time.perf_counter()
            client.ping()
            times.append(1000 * (time.perf_counter() - began))
    return percentile(times, 50)


def measure(delay_ms: float, seconds: float) -> tuple[float, list[float], float]:
    """Milliseconds of a PING, and to each first token; tokens a second that were carried."""
    with Pool() as pool, distant(pool, delay_ms / 2):
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
        streams, _ = in_quiet(lambda: run_checked(pool, load, NUM_STREAMS, round(STEPS_PER_SECOND * seconds)))
        for role in ("api", "worker"):  # before the proxy goes
            pool.stop(role)
    return trip_ms, waits, carried(streams)


def main(argv: list[str] | None = None) -> int:
    """Compare; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.lan", description=__doc__)
    parser.add_argument("--delay-ms", type=float, default=2.0, metavar="MS", help="there and back")
    parser.add_argument("--seconds", type=float, default=6.0, metavar="S")
    arguments = parser.parse_args(argv)
    table = Table(COLUMNS)
    near_ms, near_first_ms = 0.0, 0.0
    for delay_ms in (0.0, arguments.delay_ms):
        trip_ms, waits, rate = measure(delay_ms, arguments.seconds)
        first_ms = percentile(waits, 50)
        if not delay_ms:
            near_ms, near_first_ms = trip_ms, first_ms
        trips = (first_ms - near_first_ms) / (trip_ms - near_ms) if delay_ms else 0.0
        figures = (f"{delay_ms:g}", f"{trip_ms:.2f}", f"{first_ms:.1f}", f"{percentile(waits, 99):.1f}")
        more = f"{trips:.1f}" if delay_ms else ""
        table.add([*figures, more, f"{NUM_STREAMS * STEPS_PER_SECOND:,}", f"{rate:,.0f}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
