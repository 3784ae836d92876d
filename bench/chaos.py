"""Fault injection: streams run through a private pool while its processes are killed, paused, terminated and disconnected.

`python -m bench.chaos kills` repeatedly kills the worker that holds all streams, and reports how long each stream paused; `mixed`
injects faults of all kinds into three workers; `redis` stops Redis for a while. Every stream is checked token by token: a stream
that is not exact is an error, and the exit status is 1. `tests/chaos` runs shorter versions.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.harness.pool import Pool, synthetic_worker
from bench.harness.table import percentile, say
from bench.load.streams import Load, Stream, inexact
from common import connections, names

MODEL = "synthetic"
MAX_BATCH = 32
STEPS_PER_SECOND = 50
_POLL_SECONDS = 0.02
_TIMEOUT_SECONDS = 180.0


@dataclass
class Outcome:
    """The result of a scenario.

    Attributes:
        num_streams: Streams that were checked.
        wrong: One error for each stream that was not exact.
        pauses_seconds: The longest gap between two chunks of each stream.
        num_faults: Faults that were injected.
    """

    num_streams: int = 0
    wrong: list[str] = field(default_factory=list)
    pauses_seconds: list[float] = field(default_factory=list)
    num_faults: int = 0

    def add(self, streams: list[Stream], num_tokens: int) -> None:
        """Record streams that should have `num_tokens` tokens each."""
        self.num_streams += len(streams)
        self.wrong += inexact(streams, num_tokens)
        self.pauses_seconds += [max(stream.gaps_seconds, default=0.0) for stream in streams]

    def describe(self) -> str:
        """A one-line summary."""
        num_exact = self.num_streams - len(self.wrong)
        pauses = self.pauses_seconds
        return (
            f"{self.num_faults} faults, {num_exact} of {self.num_streams} streams exact, longest pause of a stream "
            f"{percentile(pauses, 50):.2f} s median, {max(pauses, default=0.0):.2f} s max"
        )


class Workers:
    """Synthetic workers of one pool, into which faults can be injected.

    Attributes:
        roles: The pool's names of the live workers, oldest first.

    Args:
        flags: More command-line flags of each worker.
    """

    def __init__(self, pool: Pool, flags: Sequence[str] = ()) -> None:
        self.pool = pool
        self.roles: list[str] = []
        self._flags = flags
        self._num_started = 0

    def start(self) -> str:
        """Start one more worker; returns its role once its model card is published."""
        self._num_started += 1
        role = f"worker {self._num_started}"
        steps = ("--steps-per-second", str(STEPS_PER_SECOND))
        self.pool.start_worker(synthetic_worker(MODEL, MAX_BATCH, *steps, *self._flags), MODEL, role)
        self.roles.append(role)
        return role

    def send(self, role: str, signum: int) -> None:
        """Send a signal to a worker."""
        self.pool.process(role).send_signal(signum)

    def kill(self, role: str) -> None:
        """Kill a worker with SIGKILL and forget it."""
        self.send(role, signal.SIGKILL)
        self.roles.remove(role)
        self.pool.stop(role)


@contextmanager
def running(
    load: Load, num_streams: int, num_tokens: int, outcome: Outcome, timeout_seconds: float = _TIMEOUT_SECONDS
) -> Iterator[list[Stream]]:
    """Run streams while the block injects faults; on exit, wait for them and record them in `outcome`."""
    streams = [Stream(load.request("go", num_tokens), check=True) for _ in range(num_streams)]
    thread = threading.Thread(target=load.run, args=(streams, timeout_seconds))
    thread.start()
    try:
        wait_until(lambda: all(stream.num_chunks or stream.is_done for stream in streams))
        yield streams
    finally:
        thread.join()
    outcome.add(streams, num_tokens)


def wait_until(is_true: Callable[[], object], seconds: float = 60.0) -> None:
    """Poll until `is_true()`.

    Raises:
        TimeoutError: It was not true within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition did not become true within {seconds:g} s")
        time.sleep(_POLL_SECONDS)


def kills(workers: Workers, num_kills: int, num_streams: int = 16) -> Outcome:
    """Kill the worker that holds all streams while a new one is idle; then kill the new one, and so on."""
    outcome, load = Outcome(), Load(workers.pool.url, MODEL)
    for _ in range(num_kills):
        victim = workers.roles[0]
        with running(load, num_streams, 4 * STEPS_PER_SECOND, outcome):
            workers.start()
            workers.kill(victim)
            outcome.num_faults += 1
    return outcome


def mixed(workers: Workers, num_faults: int, *, seed: int = 1, num_streams: int = 24) -> Outcome:
    """Every 2.5 seconds kill, pause or terminate one of three workers, or drop all of Redis's connections."""
    rng = random.Random(seed)  # noqa: S311 (repeatable, not for security)
    outcome, load = Outcome(), Load(workers.pool.url, MODEL)
    while len(workers.roles) < 3:  # noqa: PLR2004
        workers.start()
    num_tokens = int(STEPS_PER_SECOND * (2.5 * num_faults + 3.0))
    with running(load, num_streams, num_tokens, outcome, _TIMEOUT_SECONDS + num_tokens):
        for _ in range(num_faults):
            _inject_fault(workers, rng)
            outcome.num_faults += 1
            time.sleep(2.5)
    return outcome


def _inject_fault(workers: Workers, rng: random.Random) -> None:
    role = rng.choice(workers.roles)
    match rng.choice(["kill", "kill", "pause", "end", "cut"]):
        case "kill":
            workers.kill(role)
            workers.start()
        case "pause":
            workers.send(role, signal.SIGSTOP)
            threading.Timer(4.5, workers.send, (role, signal.SIGCONT)).start()
        case "end":
            workers.send(role, signal.SIGTERM)
            workers.send(role, signal.SIGTERM)  # the second one skips the drain
            workers.roles.remove(role)
            workers.start()
        case "cut":
            with connections.connect(workers.pool.redis_url) as client:
                client.client_kill_filter(_type="normal", skipme=True)
                client.client_kill_filter(_type="pubsub", skipme=True)


def redis_away(workers: Workers, seconds: float, num_streams: int = 16) -> Outcome:
    """Stop Redis for `seconds`, then start it again with its data."""
    outcome, load, pool = Outcome(), Load(workers.pool.url, MODEL), workers.pool
    workers.start()
    with running(load, num_streams, 6 * STEPS_PER_SECOND, outcome):
        time.sleep(1.0)
        pool.stop("redis")
        time.sleep(seconds)
        pool.start_redis()
        outcome.num_faults += 1
    return outcome


def leftovers(pool: Pool) -> list[str]:
    """Keys that an idle pool should not have: queued jobs, executions, keys without a time to live. Empty if all is well."""
    found: list[str] = []
    with connections.connect(pool.redis_url) as client:
        expected_empty = (f"rq:queue:{MODEL}", f"rq:queue:{MODEL}:intermediate", f"rq:wip:{MODEL}")
        found += [key for key in expected_empty if client.exists(key)]
        found += [key.decode() for key in client.keys("rq:execution*")]
        found += [f"{key.decode()} has no time to live" for key in _without_ttl(client)]
    return found


def _without_ttl(client: object) -> list[bytes]:
    """Our own keys that never expire, but for those that are pruned."""
    lists = (names.WORKER_CARDS, names.KNOWN_MODELS, names.ANSWER_EXPIRIES, names.ANSWER_BYTES)
    keys: list[bytes] = client.keys(f"{names.PREFIX}:*")  # type: ignore[attr-defined]
    return [k for k in keys if k.decode() not in lists and client.ttl(k) == -1]  # type: ignore[attr-defined]


def main(argv: list[str] | None = None) -> int:
    """Run the scenarios; the exit status is 1 if a stream was not exact or keys were left behind."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("parts", nargs="*", default=["kills", "mixed", "redis"], metavar="kills|mixed|redis")
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--faults", "--blows", type=int, default=24, metavar="N")
    parser.add_argument("--away", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    options = parser.parse_args(argv)
    scenarios: dict[str, Callable[[Workers], Outcome]] = {
        "kills": lambda workers: kills(workers, options.kills),
        "mixed": lambda workers: mixed(workers, options.faults, seed=options.seed),
        "redis": lambda workers: redis_away(workers, options.away),
    }
    is_ok = True
    for part in options.parts:
        with Pool() as pool:
            workers = Workers(pool)
            workers.start()
            pool.start_api()
            outcome = scenarios[part](workers)
            time.sleep(5.0)
            left = leftovers(pool)
        say(f"{part}: {outcome.describe()}")
        for line in sorted(set(outcome.wrong))[:5] + left[:5]:
            say(f"  {line}")
        is_ok = is_ok and not outcome.wrong and not left
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
