"""Real worker processes with the synthetic engine, and a client that uses them through Redis as the API does."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from rq.job import Retry

from common import connections, names
from common.protocol import (
    Cancel,
    Delta,
    Event,
    Failed,
    Finished,
    GenerationJob,
    SamplingParams,
    TextPrompt,
    decode_event,
    decode_step,
    encode,
)
from common.rq import JsonJob, JsonQueue

ROOT = Path(__file__).resolve().parent.parent.parent
LEASE_SECONDS = 1.0


def wait_until(is_true: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Wait until `is_true` returns something true, and return it; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := is_true()):
        assert time.monotonic() < deadline, f"still false after {seconds} s: {is_true}"
        time.sleep(0.02)
    return value


class Worker:
    """One `python -m bench.harness.synthetic_worker` process.

    Args:
        options: More of its command line.
        settings: `MLXPOOL_` variables, by their names in lower case.
    """

    def __init__(
        self, redis_url: str, model: str, steps_per_second: float, *options: str, **settings: Any
    ) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MLXPOOL_")}
        environ |= {"MLXPOOL_REDIS_URL": redis_url, "MLXPOOL_LEASE_SECONDS": str(LEASE_SECONDS)}
        environ |= {f"MLXPOOL_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-m", "bench.harness.synthetic_worker", "--name", model]
        command += ["--steps-per-second", str(steps_per_second), *options]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def end(self) -> int:
        """Send SIGTERM; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Workers:
    """Workers on one Redis, and a client.

    Attributes:
        client: Connected to the Redis.
    """

    def __init__(self, redis_url: str) -> None:
        self.url = redis_url
        self.client = connections.connect(redis_url)
        self.channel = names.api_channel("test")
        self.events: dict[str, list[Event]] = {}
        self._workers: list[Worker] = []
        self._pubsub = self.client.pubsub(ignore_subscribe_messages=True)

    def __enter__(self) -> Self:
        self._pubsub.subscribe(self.channel)
        self._pubsub.get_message(timeout=5)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.send(signal.SIGCONT)
                worker.process.kill()
            worker.process.wait()
            assert worker.process.stderr is not None
            worker.process.stderr.close()
        self._pubsub.close()
        self.client.close()

    def start(self, model: str = "m", steps_per_second: float = 50, *options: str, **settings: Any) -> Worker:
        """Start a worker and wait for its model card."""
        before = len(self.cards())
        worker = Worker(self.url, model, steps_per_second, *options, **settings)
        self._workers.append(worker)
        wait_until(lambda: len(self.cards()) > before or worker.process.poll() is not None)
        assert worker.process.poll() is None
        return worker

    def cards(self) -> list[dict[bytes, bytes]]:
        """The model cards of live workers."""
        listed: Any = self.client.zrange(names.WORKER_CARDS, 0, -1)
        cards: list[Any] = [self.client.hgetall(names.worker_card(name.decode())) for name in listed]
        return [card for card in cards if card]

    def free_slots(self) -> list[int]:
        return sorted(int(card[b"free_slots"]) for card in self.cards())

    def submit(
        self,
        model: str = "m",
        max_tokens: int = 20,
        retries: int = 3,
        text: str = "x",
        job_id: str | None = None,
        **job: Any,
    ) -> str:
        """Enqueue a request as the API does; returns its job id."""
        job_id = job_id or secrets.token_hex(12)
        request = GenerationJob(
            job_id=job_id,
            model=model,
            channel=self.channel,
            prompt=TextPrompt(text),
            max_tokens=max_tokens,
            sampling=SamplingParams(),
            submitted_at=time.time(),
            **job,
        )
        queue = JsonQueue(model, connection=self.client)
        queue.enqueue_job(
            queue.create_job(
                names.JOB_FUNCTION,
                kwargs=msgspec.to_builtins(request, str_keys=True),
                job_id=job_id,
                description="test",
                ttl=600,
                result_ttl=60,
                failure_ttl=3600,
                timeout=3600,
                retry=Retry(max=retries, enqueue_at_front=True) if retries else None,
            )
        )
        self.events[job_id] = []
        return job_id

    def cancel(self, job_id: str, model: str = "m") -> None:
        """Cancel a job as the API does when its client leaves."""
        with self.client.pipeline() as pipe:
            pipe.lrem(JsonQueue(model, connection=self.client).key, 1, job_id)
            pipe.set(names.cancelled(job_id), 1, ex=names.CANCEL_MARK_SECONDS)
            pipe.publish(names.control_channel(model), encode(Cancel([job_id])))
            pipe.execute()

    def listen(self) -> None:
        """Receive the events that were published since the last call."""
        while (message := self._pubsub.get_message(timeout=0)) is not None:
            for job_id, event in decode_step(message["data"]):
                if job_id in self.events:
                    self.events[job_id].append(event)

    def has_token(self, *job_ids: str, n: int = 1) -> bool:
        """Whether each job's n-th token was received."""
        self.listen()
        return all(any(isinstance(e, Delta) and e.n >= n for e in self.events[j]) for j in job_ids)

    def has_ended(self, *job_ids: str) -> bool:
        """Whether each job's terminal event was received."""
        self.listen()
        return all(any(isinstance(e, Finished | Failed) for e in self.events[j]) for j in job_ids)

    def text(self, job_id: str) -> str:
        """The text of a job's received events, each n counted once."""
        by_n = {event.n: event.text for event in self.events[job_id] if isinstance(event, Delta)}
        return "".join(by_n[n] for n in sorted(by_n))

    def terminal(self, job_id: str) -> Finished | Failed:
        [event] = [e for e in self.events[job_id] if isinstance(e, Finished | Failed)]
        return event

    def journal(self, job_id: str) -> list[Event]:
        entries: Any = self.client.xrange(names.journal(job_id))
        return [decode_event(fields[b"d"]) for _, fields in entries]

    def status(self, job_id: str) -> str:
        return str(JsonJob.fetch(job_id, connection=self.client).get_status().value)


def exact(num_tokens: int) -> str:
    """The synthetic engine's text of `num_tokens` tokens."""
    return "".join(f" {k}" for k in range(1, num_tokens + 1))
