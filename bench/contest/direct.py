"""A client that bypasses the API: enqueues jobs in a model's RQ queue and subscribes to the pub/sub channel itself.

`python -m bench.contest.direct` measures what a worker and Redis cost without HTTP, with the synthetic worker.
"""

from __future__ import annotations

import argparse
import re
import secrets
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from redis.client import PubSub

from bench.harness.pool import Pool, synthetic_worker
from bench.harness.table import Table, percentile
from common import connections, names
from common.protocol import ChatPrompt, Delta, Failed, Finished, GenerationJob, SamplingParams, decode_step
from common.rq import JsonQueue

_MARK = re.compile(r" (\d+)@(\d+)")


@dataclass(slots=True)
class Received:
    """The events of some jobs.

    Attributes:
        num_tokens: By job id.
        latencies_us: From the end of a step to its arrival here, if the worker adds time stamps.
        first_at: Monotonic seconds of the first token of any job.
        wrong: Jobs that failed, or whose tokens were out of order, and why.
    """

    num_tokens: dict[str, int]
    latencies_us: list[int] = field(default_factory=list)
    began_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """From submission to the last token."""
        return sum(self.num_tokens.values()) / (self.last_at - self.began_at)


class Direct:
    """Submits jobs for one model and receives their events."""

    def __init__(self, redis_url: str, model: str) -> None:
        self._redis = connections.connect(redis_url)
        self._queue = JsonQueue(model, connection=self._redis)
        self._model = model
        self._channel = names.api_channel(secrets.token_hex(8))
        self._pubsub: PubSub = self._redis.pubsub(ignore_subscribe_messages=True)
        self._pubsub.subscribe(self._channel)
        self._pubsub.get_message(timeout=5.0)

    def close(self) -> None:
        """Close the connections."""
        self._pubsub.close()
        self._redis.close()

    def generate(self, prompts: list[str], max_tokens: int, sampling: SamplingParams) -> Received:
        """Submit all prompts at once and wait until the last job has ended."""
        jobs = [self._job(prompt, max_tokens, sampling) for prompt in prompts]
        received = Received({job.job_id: 0 for job in jobs}, began_at=time.monotonic())
        with self._redis.pipeline() as pipe:
            for job in jobs:
                self._queue.enqueue_call(
                    names.JOB_FUNCTION,
                    kwargs=msgspec.to_builtins(job),
                    job_id=job.job_id,
                    description="benchmark",
                    result_ttl=60,
                    pipeline=pipe,
                )
            pipe.execute()
        num_open = len(jobs)
        while num_open:
            message: Any = self._pubsub.get_message(timeout=30.0)
            if message is None:
                raise TimeoutError(f"{num_open} of {len(jobs)} jobs sent no event for 30 s")
            if message["type"] == "message":
                num_open -= _take(received, message["data"])
        return received

    def _job(self, prompt: str, max_tokens: int, sampling: SamplingParams) -> GenerationJob:
        return GenerationJob(
            job_id=secrets.token_hex(16),
            model=self._model,
            channel=self._channel,
            prompt=ChatPrompt([{"role": "user", "content": prompt}]),
            max_tokens=max_tokens,
            sampling=sampling,
            submitted_at=time.time(),
        )


def _take(received: Received, data: bytes) -> int:
    """Record one message; returns how many jobs ended in it."""
    now_us = time.time_ns() // 1000
    received.last_at = time.monotonic()
    num_ended = 0
    for job_id, event in decode_step(data):
        if isinstance(event, Delta):
            received.first_at = received.first_at or received.last_at
            received.num_tokens[job_id] += 1
            if event.n != received.num_tokens[job_id]:
                received.wrong.append(f"{job_id}: {event.n} after {received.num_tokens[job_id] - 1}")
            if mark := _MARK.fullmatch(event.text):
                received.latencies_us.append(now_us - int(mark[2]))
        elif isinstance(event, Finished | Failed):
            num_ended += 1
            if isinstance(event, Failed):
                received.wrong.append(f"{job_id}: {event.message}")
    return num_ended


def measure(
    num_streams: int, steps_per_second: float, seconds: float, *, timestamps: bool = True
) -> list[str]:
    """One row of the table: the synthetic worker with `num_streams` sequences."""
    rate = steps_per_second or 150_000 / num_streams
    flags = ["--steps-per-second", str(steps_per_second), *(["--timestamps"] if timestamps else [])]
    worker = synthetic_worker("direct", num_streams, *flags)
    with Pool() as pool:
        pool.start_worker(worker, "direct")
        direct = Direct(pool.redis_url, "direct")
        prompts = ["go"] * num_streams
        direct.generate(prompts, 50, SamplingParams())
        cpu_before, own_before, began = pool.cpu_seconds(), time.process_time(), time.monotonic()
        received = direct.generate(prompts, max(1, round(rate * seconds)), SamplingParams())
        elapsed_seconds = time.monotonic() - began
        cpu, own = pool.cpu_seconds(), time.process_time() - own_before
        direct.close()
    if received.wrong:
        raise RuntimeError(f"{len(received.wrong)} wrong: {received.wrong[:3]}")
    num_tokens = sum(received.num_tokens.values())
    used = {role: cpu[role] - cpu_before[role] for role in cpu} | {"client": own}
    return [
        str(num_streams),
        f"{steps_per_second:.0f}" if steps_per_second else "flat out",
        f"{num_tokens / elapsed_seconds:,.0f}",
        f"{statistics.median(received.latencies_us) / 1000:.2f}" if received.latencies_us else "-",
        f"{percentile(received.latencies_us, 99) / 1000:.2f}" if received.latencies_us else "-",
        *(f"{used[role] / num_tokens * 1e6:.1f}" for role in ("worker", "redis", "client")),
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure the given loads and print a table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.contest.direct", description=__doc__)
    parser.add_argument("loads", nargs="*", default=["64x100", "64x400", "64x0", "256x100"], metavar="NxR")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="length of each load")
    arguments = parser.parse_args(argv)
    table = Table(
        [
            "streams",
            "steps/s",
            "tokens/s",
            "step to client, median ms",
            "p99 ms",
            "worker µs/token",
            "Redis",
            "client",
        ]
    )
    for load in arguments.loads:
        num_streams, steps = load.split("x")
        table.add(measure(int(num_streams), float(steps), arguments.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
