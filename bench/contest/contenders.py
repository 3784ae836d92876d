"""The contenders of `bench.contest`: each answers the same prompts and reports its timings.

`Alone` is mlx-lm's `BatchGenerator` in a process of its own; `Served` is any server with OpenAI's streaming chat API, ours
included; `OneAtATime` is a stock RQ worker that processes one job after another. Each is loaded and warm before anything is
measured, and idle while the others run.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2
from rq import Queue
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from bench.contest.mixes import RequestKind
from bench.contest.raw_generator import RawGenerator
from bench.harness.pool import Pool, cpu_seconds_of_family, family_pids, free_port
from bench.harness.table import percentile
from bench.load.streams import Load, Stream, errors
from common import connections

START_SECONDS = 300.0
STREAM_SECONDS = 600.0
ONE_AT_A_TIME_QUEUE = "one-at-a-time"

STOCK_SERVER = (
    "-c 'import worker.mlx, sys; from mlx_lm.server import main; "
    'sys.argv[0] = "mlx_lm.server"; main()\' --model {model} --port {port} --log-level ERROR '
    "--decode-concurrency {streams} --prompt-concurrency 8"
)
"""mlx_lm.server, with OpenBLAS if it is installed, and with the same maximum batch size as our worker."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One round of one contender.

    Attributes:
        num_tokens: Of the complete streams.
        seconds: From the first request to the last token, prefill included.
        first_seconds: Time to first token of each stream.
        gaps_ms: Between the tokens of a stream: the median and the 99th percentile.
        cpu_seconds: By process.
        errors: Of the streams that were not complete.
    """

    num_tokens: int
    seconds: float
    first_seconds: list[float]
    gaps_ms: tuple[float, float]
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


class Contender(Protocol):
    """Answers prompts."""

    name: str

    def run(self, prompts: Sequence[str], max_tokens: int, kinds: Sequence[RequestKind]) -> Figures:
        """One round.

        Args:
            prompts: One for each stream.
            max_tokens: Of each answer.
            kinds: What each stream's request asks for; a contender ignores what it does not support.
        """

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time used so far, by process."""

    def model_pids(self) -> list[int]:
        """Ids of the processes that run the model."""


class Alone:
    """`BatchGenerator`, always greedy."""

    name = "BatchGenerator alone"

    def __init__(self, generator: RawGenerator) -> None:
        self._generator = generator

    def run(self, prompts: Sequence[str], max_tokens: int, _kinds: Sequence[RequestKind]) -> Figures:
        result = self._generator.generate(list(prompts), max_tokens)
        return Figures(sum(result.num_tokens), result.seconds, [result.first_token_seconds], result.gaps_ms)

    def cpu_seconds(self) -> dict[str, float]:
        return {"alone": cpu_seconds_of_family(self._generator.pid)}

    def model_pids(self) -> list[int]:
        return family_pids(self._generator.pid)


class Served:
    """A server, over HTTP.

    Args:
        cpu_seconds: Returns the CPU time of its processes.
        model_pids: Returns the ids of the processes that run the model.
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        cpu_seconds: Callable[[], dict[str, float]],
        model_pids: Callable[[], list[int]],
    ) -> None:
        self.name = name
        self.model_pids = model_pids
        self._load = Load(url, model)
        self._cpu_seconds = cpu_seconds

    def run(self, prompts: Sequence[str], max_tokens: int, kinds: Sequence[RequestKind]) -> Figures:
        asked: dict[str, Any] = {"temperature": 0, "stream_options": {"include_usage": True}}
        requests = [
            Stream(
                self._load.request(prompt, max_tokens, kind.protocol, **(asked | kind.fields)),
                protocol=kind.protocol,
            )
            for prompt, kind in zip(prompts, kinds, strict=True)
        ]
        streams = self._load.run(requests, STREAM_SECONDS)
        complete = [stream for stream in streams if stream.error is None]
        began = min(stream.began_at for stream in streams)
        gaps = [1000 * gap for stream in complete for gap in stream.gaps_seconds]
        return Figures(
            # Not every server reports usage; count each chunk as one token then.
            sum(stream.completion_tokens or stream.num_chunks for stream in complete),
            max((stream.last_at for stream in complete), default=began) - began or STREAM_SECONDS,
            [stream.first_at - stream.began_at for stream in complete if stream.first_at],
            (percentile(gaps, 50), percentile(gaps, 99)),
            errors=errors(streams),
        )

    def cpu_seconds(self) -> dict[str, float]:
        return self._cpu_seconds()


class OneAtATime:
    """A stock RQ `SimpleWorker`: one job after another, without streaming."""

    name = "one after another"

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        rq = ["rq.cli", "worker", "--worker-class", "rq.SimpleWorker", "--serializer", "json", "--quiet"]
        pool.start("rq", [*rq, "--url", pool.redis_url, ONE_AT_A_TIME_QUEUE])
        connection = connections.connect(pool.redis_url)
        self._queue = Queue(ONE_AT_A_TIME_QUEUE, connection=connection, serializer=JSONSerializer)

    def run(self, prompts: Sequence[str], max_tokens: int, _kinds: Sequence[RequestKind]) -> Figures:
        began = time.monotonic()
        jobs = [
            self._queue.enqueue("bench.contest.one_at_a_time.generate", prompt, max_tokens)
            for prompt in prompts
        ]
        while not all(job.get_status() in (JobStatus.FINISHED, JobStatus.FAILED) for job in jobs):
            time.sleep(0.05)
        nan = float("nan")
        return Figures(sum(job.return_value() or 0 for job in jobs), time.monotonic() - began, [], (nan, nan))

    def cpu_seconds(self) -> dict[str, float]:
        return {"rq": self._pool.cpu_seconds().get("rq", 0.0)}

    def model_pids(self) -> list[int]:
        return self._pool.pids("rq")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        model: What requests have to name.
        pid: Of its parent process.
    """

    url: str
    model: str
    pid: int


@contextmanager
def server(name: str, command: str, model: str, num_streams: int) -> Iterator[Server]:
    """Start a server, and end it on exit.

    Args:
        command: A command with placeholders {port}, {model} and {streams}; one that begins with a dash gets Python in front.
        model: A folder. Requests name the first model that the server lists.
    """
    port = free_port()
    words = shlex.split(command.format(port=port, model=shlex.quote(model), streams=num_streams))
    if words[0].startswith("-"):
        words = [sys.executable, *words]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        listed = _wait_for_models(process, name, url)
        # mlx_lm.server lists the models of the hub's cache; the one that it was started with is `default_model`.
        requested = listed[0] if listed and "mlx_lm" not in command else "default_model"
        yield Server(url, requested, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def started(name: str, command: str, model: str, num_streams: int) -> Iterator[Served]:
    """The contender on a server that is started by `server`."""
    with server(name, command, model, num_streams) as running:
        yield Served(
            name,
            running.url,
            running.model,
            lambda: {name: cpu_seconds_of_family(running.pid)},
            lambda: family_pids(running.pid),
        )


def _wait_for_models(process: subprocess.Popen[bytes], name: str, url: str) -> list[str]:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            answer = httpx2.get(f"{url}/v1/models", timeout=5)
            if answer.is_success:
                return [str(model["id"]) for model in answer.json()["data"]]
        except ValueError:
            return []  # mlx_lm.server without a hub cache
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{name} did not answer at {url}")
