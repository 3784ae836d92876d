"""Misfortune on purpose: streams run through a private pool while its processes are killed, paused, ended and cut off.

`python -m bench.chaos kills` kills the only worker that has streams, again and again, and says how long each stream was
silent; `mixed` does all kinds of harm to several workers at once; `redis` takes Redis away for a while. Every stream is
checked token by token: one that is not exact is an error, and the exit status is 1. `tests/chaos` runs the same, shorter.
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

from bench.harness.pool import Pool
from bench.harness.table import percentile, say
from bench.load.streams import Load, Stream, errors
from common import connections, names

MODEL = "synthetic"
STEPS_PER_SECOND = 50
_POLL_SECONDS = 0.02
_TIMEOUT_SECONDS = 180.0


@dataclass
class Outcome:
    """What came of some streams.

    Attributes:
        num_streams: All of them.
        wrong: What was wrong with those that were not exact.
        silences_seconds: The longest gap of each stream.
        num_blows: How often something was done to the pool.
    """

    num_streams: int = 0
    wrong: list[str] = field(default_factory=list)
    silences_seconds: list[float] = field(default_factory=list)
    num_blows: int = 0

    def add(self, streams: list[Stream], num_tokens: int) -> None:
        """Account for streams that were to have so many tokens."""
        self.num_streams += len(streams)
        self.wrong += errors(streams)
        self.wrong += [
            f"{stream.num_checked} of {num_tokens} tokens"
            for stream in streams
            if stream.error is None and stream.num_checked != num_tokens
        ]
        self.silences_seconds += [max(stream.gaps_seconds, default=0.0) for stream in streams]

    def describe(self) -> str:
        """One line."""
        num_exact = self.num_streams - len(self.wrong)
        silences = self.silences_seconds
        return (
            f"{self.num_blows} blows, {num_exact} of {self.num_streams} streams exact, longest silence of a stream "
            f"{percentile(silences, 50):.2f} s in the median, {max(silences, default=0.0):.2f} s at worst"
        )


class Workers:
    """Synthetic workers of one pool, that can be hit.

    Attributes:
        roles: What the pool calls those that live, oldest first.

    Args:
        flags: More of each one's command line.
    """

    def __init__(self, pool: Pool, flags: Sequence[str] = ()) -> None:
        self.pool = pool
        self.roles: list[str] = []
        self._flags = flags
        self._num_started = 0

    def start(self) -> str:
        """One more; returns when it shows its card."""
        self._num_started += 1
        role = f"worker {self._num_started}"
        command = ["bench.harness.synthetic_worker", "--name", MODEL, "--log-level", "WARNING"]
        command += ["--steps-per-second", str(STEPS_PER_SECOND), *self._flags]
        self.pool.start_worker(command, MODEL, role)
        self.roles.append(role)
        return role

    def send(self, role: str, signum: int) -> None:
        """A signal to one."""
        self.pool.process(role).send_signal(signum)

    def kill(self, role: str) -> None:
        """SIGKILL, and it is gone from the list."""
        self.send(role, signal.SIGKILL)
        self.roles.remove(role)
        self.pool.stop(role)


@contextmanager
def running(
    load: Load, num_streams: int, num_tokens: int, outcome: Outcome, timeout_seconds: float = _TIMEOUT_SECONDS
) -> Iterator[list[Stream]]:
    """Streams run while the block does harm; at its end they are waited for and accounted for."""
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
    """Return when it is.

    Raises:
        TimeoutError: It never was.
    """
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError("it never came to that")
        time.sleep(_POLL_SECONDS)


def kills(workers: Workers, num_kills: int, num_streams: int = 16) -> Outcome:
    """The worker with all the streams dies, another one waits beside it; then that one is the next victim."""
    outcome, load = Outcome(), Load(workers.pool.url, MODEL)
    for _ in range(num_kills):
        victim = workers.roles[0]
        with running(load, num_streams, 4 * STEPS_PER_SECOND, outcome):
            workers.start()
            workers.kill(victim)
            outcome.num_blows += 1
    return outcome


def mixed(workers: Workers, num_blows: int, *, seed: int = 1, num_streams: int = 24) -> Outcome:
    """Every two and a half seconds one of three workers is killed, stopped and woken, ended, or all connections are cut."""
    chance = random.Random(seed)  # noqa: S311 (to repeat a run)
    outcome, load = Outcome(), Load(workers.pool.url, MODEL)
    while len(workers.roles) < 3:  # noqa: PLR2004
        workers.start()
    num_tokens = int(STEPS_PER_SECOND * (2.5 * num_blows + 3.0))
    with running(load, num_streams, num_tokens, outcome, _TIMEOUT_SECONDS + num_tokens):
        for _ in range(num_blows):
            _strike(workers, chance)
            outcome.num_blows += 1
            time.sleep(2.5)
    return outcome


def _strike(workers: Workers, chance: random.Random) -> None:
    role = chance.choice(workers.roles)
    match chance.choice(["kill", "kill", "pause", "end", "cut"]):
        case "kill":
            workers.kill(role)
            workers.start()
        case "pause":
            workers.send(role, signal.SIGSTOP)
            threading.Timer(4.5, workers.send, (role, signal.SIGCONT)).start()
        case "end":
            workers.send(role, signal.SIGTERM)
            workers.send(role, signal.SIGTERM)  # hurry
            workers.roles.remove(role)
            workers.start()
        case "cut":
            with connections.connect(workers.pool.redis_url) as client:
                client.client_kill_filter(_type="normal", skipme=True)
                client.client_kill_filter(_type="pubsub", skipme=True)


def redis_away(workers: Workers, seconds: float, num_streams: int = 16) -> Outcome:
    """Redis is stopped, stays away, and is started again with what it had written."""
    outcome, load, pool = Outcome(), Load(workers.pool.url, MODEL), workers.pool
    workers.start()
    with running(load, num_streams, 6 * STEPS_PER_SECOND, outcome):
        time.sleep(1.0)
        pool.stop("redis")
        time.sleep(seconds)
        pool.start_redis()
        outcome.num_blows += 1
    return outcome


def leftovers(pool: Pool) -> list[str]:
    """What a pool that has come to rest still has in its books: nothing, if all is well."""
    found: list[str] = []
    with connections.connect(pool.redis_url) as client:
        books = (f"rq:queue:{MODEL}", f"rq:queue:{MODEL}:intermediate", f"rq:wip:{MODEL}")
        found += [key for key in books if client.exists(key)]
        found += [key.decode() for key in client.keys("rq:execution*")]
        found += [f"{key.decode()} lives for ever" for key in _immortal(client)]
    return found


def _immortal(client: object) -> list[bytes]:
    """Our own keys without a time to live."""
    lists = (names.WORKER_CARDS, names.KNOWN_MODELS)
    keys: list[bytes] = client.keys(f"{names.PREFIX}:*")  # type: ignore[attr-defined]
    return [k for k in keys if k.decode() not in lists and client.ttl(k) == -1]  # type: ignore[attr-defined]


def main(argv: list[str] | None = None) -> int:
    """Do it; the exit status is 1 where a stream was not exact or something was left behind."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("parts", nargs="*", default=["kills", "mixed", "redis"], metavar="kills|mixed|redis")
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--blows", type=int, default=24, metavar="N")
    parser.add_argument("--away", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    options = parser.parse_args(argv)
    scenarios: dict[str, Callable[[Workers], Outcome]] = {
        "kills": lambda workers: kills(workers, options.kills),
        "mixed": lambda workers: mixed(workers, options.blows, seed=options.seed),
        "redis": lambda workers: redis_away(workers, options.away),
    }
    is_well = True
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
        is_well = is_well and not outcome.wrong and not left
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
