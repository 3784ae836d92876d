"""What the generation thread does between two engine steps: events, their encoding, the journal on a real Redis.

`python -m bench.micro.loop_overhead` runs the worker's generation loop with an engine whose steps sleep, as if a device computed. It
reports the time from the end of a step to the beginning of the next, by wall clock and in CPU time of the thread, and how much
of it each phase takes. A step of the real engine returns when the next one is launched already: this time is hidden if it is
shorter than the device's step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from rq.defaults import RQ_KEY_PREFIX

from bench.harness.meter import busy_seconds, wait_until_quiet
from bench.harness.pool import Pool
from bench.harness.synthetic_worker import SyntheticEngine
from bench.harness.table import Table, percentile, say
from common import connections, garbage
from common.protocol import GenerationJob, TextPrompt
from worker.jobs.redis_journal import RedisJournal
from worker.loop.engine import StepEvent
from worker.loop.generation_loop import GenerationLoop
from worker.loop.messages import Abort, AbortReason, Admit, Message, Shutdown

NUM_STREAMS = (1, 8, 32, 128)
PATIENCE_SECONDS = 60.0
PHASES = ("_collect", "_flush")
"""Methods of the loop whose time is listed; `_flush` includes `_collect` and `RedisJournal.send`."""

Times = tuple[float, float]
"""Wall clock, and CPU time of this thread."""


def now() -> Times:
    """The clocks, in seconds."""
    return time.perf_counter(), time.thread_time()


class TimedEngine(SyntheticEngine):
    """A step sleeps for a fixed time; `between` has the time from each step to the next."""

    def __init__(self, num_streams: int, step_seconds: float) -> None:
        super().__init__(num_streams, 0.0)
        self.between: list[Times] = []
        self._step_seconds = step_seconds
        self._ended: Times | None = None

    def step(self) -> list[StepEvent]:
        """As `SyntheticEngine.step`."""
        if self._ended is not None:
            self.between.append(_since(self._ended))
        time.sleep(self._step_seconds)
        events = super().step()
        self._ended = now()
        return events


def _since(began: Times) -> Times:
    ended = now()
    return ended[0] - began[0], ended[1] - began[1]


def time_method(owner: Any, name: str, taken: dict[str, list[Times]]) -> None:
    """Record the time of each call of `owner.name` in `taken`."""
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        began = now()
        result = method(*arguments)
        taken[name].append(_since(began))
        return result

    setattr(owner, name, timed)


def run(redis_url: str, num_streams: int, step_seconds: float, num_steps: int, *, by_phase: bool) -> Any:
    """Run that many streams for `num_steps`; returns the times between steps, and the times by phase."""
    engine = TimedEngine(num_streams, step_seconds)
    inbox: SimpleQueue[Message] = SimpleQueue()
    taken: dict[str, list[Times]] = defaultdict(list)
    with connections.connect(redis_url) as client:
        client.flushall()
        journal = RedisJournal(client)
        loop = GenerationLoop(engine=engine, journal=journal, inbox=inbox, on_job_end=lambda _: None)
        if by_phase:
            time_method(journal, "send", taken)
            for name in PHASES:
                time_method(loop, name, taken)
        jobs = [_job(i) for i in range(num_streams)]
        for job in jobs:
            client.hset(f"{RQ_KEY_PREFIX}:execution:{job.job_id}:run", "id", "run")
            inbox.put(Admit(job, "run", [0]))
        while loop.num_steps < num_steps:
            loop.run_once()
        for job in jobs:
            inbox.put(Abort(job.job_id, AbortReason.REQUEUED))
        inbox.put(Shutdown())
        loop.run()
        journal.close()
    return engine.between[10:], taken


def _job(number: int) -> GenerationJob:
    return GenerationJob(
        job_id=f"{number:032x}",
        model="m",
        channel="mlxpool:api:0123456789abcdef",
        prompt=TextPrompt("x"),
        is_detached=True,  # there is no subscriber
    )


def row(num_streams: int, between: list[Times], others: float) -> list[str]:
    """Table cells of the total."""
    wall = [1e6 * each[0] for each in between]
    cpu = [1e6 * each[1] for each in between]
    return [
        str(num_streams),
        *(f"{percentile(wall, percent):,.0f}" for percent in (50, 90, 99)),
        f"{max(wall):,.0f}",
        f"{statistics.median(cpu):,.0f}",
        f"{statistics.median(cpu) / num_streams:.1f}",
        f"{others:.2f}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro.loop_overhead", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=list(NUM_STREAMS), metavar="N")
    parser.add_argument("--step-ms", type=float, default=1.2, metavar="MS")
    parser.add_argument("--steps", type=int, default=1500, metavar="N")
    parser.add_argument("--phases", action="store_true", help="list the phases too, which costs some µs")
    parser.add_argument("--patience", type=float, default=PATIENCE_SECONDS, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    garbage.freeze_loaded_objects()
    garbage.collect_rarely()
    collections = [each["collections"] for each in gc.get_stats()]
    columns = ["streams", "µs between steps: median", "p90", "p99", "max", "CPU µs, median", "per token"]
    table = Table([*columns, "CPUs used by others"])
    with Pool() as pool:
        for num_streams in arguments.streams:
            wait_until_quiet(arguments.patience)
            began, busy, ours = time.monotonic(), busy_seconds(), time.process_time()
            redis_before = pool.cpu_seconds()["redis"]
            between, taken = run(
                pool.redis_url,
                num_streams,
                arguments.step_ms / 1000,
                arguments.steps,
                by_phase=arguments.phases,
            )
            used = time.process_time() - ours + pool.cpu_seconds()["redis"] - redis_before
            others = max(0.0, busy_seconds() - busy - used) / (time.monotonic() - began)
            table.add(row(num_streams, between, others))
            for name, times in taken.items():
                wall, cpu = (1e6 * statistics.median(each[k] for each in times) for k in (0, 1))
                say(f"<!-- {name}: {wall:,.0f} µs, {cpu:,.0f} of CPU -->")
    more = [each["collections"] - before for each, before in zip(gc.get_stats(), collections, strict=True)]
    say(f"garbage collections by generation: {more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
