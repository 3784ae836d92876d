"""Who is compared by `bench.contest`: each answers the same prompts, and says what it took.

`Alone` is mlx-lm's `BatchGenerator` in a process of its own; `Served` is any server with OpenAI's streaming chat API, ours
among them; `OneAtATime` is a stock RQ worker that answers one job after another. Each is loaded and warm before anything is
measured, and idles while the others work.
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

from bench.contest.raw_generator import RawGenerator
from bench.harness.pool import Pool, cpu_seconds_of_family, family_pids, free_port
from bench.harness.table import percentile
from bench.load.streams import Load, Stream, errors
from common import connections

START_SECONDS = 180.0
STREAM_SECONDS = 600.0
ONE_AT_A_TIME_QUEUE = "one-at-a-time"

STOCK_SERVER = (
    "-c 'from worker.mlx.model import preload_blas; preload_blas(); import sys; from mlx_lm.server import main; "
    'sys.argv[0] = "mlx_lm.server"; main()\' --model {model} --port {port} --log-level ERROR '
    "--decode-concurrency {streams} --prompt-concurrency 8"
)
"""mlx_lm.server as it comes, with OpenBLAS where that is there and as many streams in its batch as ours has."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One round of one contender.

    Attributes:
        num_tokens: Of the streams that were whole.
        seconds: From the first request to the last token, reading the prompts included.
        first_seconds: To the first token, by stream.
        gaps_ms: Between the tokens of a stream: the median, and the 99th percentile.
        cpu_seconds: By process.
        errors: What went wrong, by stream that was not whole.
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

    def run(self, prompts: Sequence[str], max_tokens: int, fields: Sequence[dict[str, Any]]) -> Figures:
        """One round.

        Args:
            prompts: One for each stream.
            max_tokens: Each is to have.
            fields: More fields of the requests, by stream; what cannot be asked for is left out.
        """

    def cpu_seconds(self) -> dict[str, float]:
        """Used so far, by process."""

    def model_pids(self) -> list[int]:
        """The processes that run the model."""


class Alone:
    """`BatchGenerator`, greedy, whatever the others are asked for."""

    name = "BatchGenerator alone"

    def __init__(self, generator: RawGenerator) -> None:
        self._generator = generator

    def run(self, prompts: Sequence[str], max_tokens: int, _fields: Sequence[dict[str, Any]]) -> Figures:
        result = self._generator.generate(list(prompts), max_tokens)
        return Figures(sum(result.num_tokens), result.seconds, [result.first_token_seconds], result.gaps_ms)

    def cpu_seconds(self) -> dict[str, float]:
        return {"alone": cpu_seconds_of_family(self._generator.pid)}

    def model_pids(self) -> list[int]:
        return family_pids(self._generator.pid)


class Served:
    """A server, over HTTP.

    Args:
        cpu_seconds: Reads what its processes have used.
        model_pids: Says which processes run the model.
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

    def run(self, prompts: Sequence[str], max_tokens: int, fields: Sequence[dict[str, Any]]) -> Figures:
        asked = {"temperature": 0, "stream_options": {"include_usage": True}}
        requests = [
            self._load.request(prompt, max_tokens, **(asked | more))
            for prompt, more in zip(prompts, fields, strict=True)
        ]
        streams = self._load.run([Stream(request) for request in requests], STREAM_SECONDS)
        whole = [stream for stream in streams if stream.error is None]
        began = min(stream.began_at for stream in streams)
        gaps = [1000 * gap for stream in whole for gap in stream.gaps_seconds]
        return Figures(
            # Not every server counts: a chunk is a token then.
            sum(stream.completion_tokens or stream.num_chunks for stream in whole),
            max((stream.last_at for stream in whole), default=began) - began or STREAM_SECONDS,
            [stream.first_at - stream.began_at for stream in whole],
            (percentile(gaps, 50), percentile(gaps, 99)),
            errors=errors(streams),
        )

    def cpu_seconds(self) -> dict[str, float]:
        return self._cpu_seconds()


class OneAtATime:
    """A stock RQ `SimpleWorker`, one job after another, without any streaming."""

    name = "one after another"

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        rq = ["rq.cli", "worker", "--worker-class", "rq.SimpleWorker", "--serializer", "json", "--quiet"]
        pool.start("rq", [*rq, "--url", pool.redis_url, ONE_AT_A_TIME_QUEUE])
        connection = connections.connect(pool.redis_url)
        self._queue = Queue(ONE_AT_A_TIME_QUEUE, connection=connection, serializer=JSONSerializer)

    def run(self, prompts: Sequence[str], max_tokens: int, _fields: Sequence[dict[str, Any]]) -> Figures:
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


@contextmanager
def started(name: str, command: str, model: str, num_streams: int) -> Iterator[Served]:
    """A server that is started here, and ended.

    Args:
        command: What to run, with {port}, {model} and {streams} in it; what begins with a dash is Python's.
        model: A folder; the server's first listed model is asked for.
    """
    port = free_port()
    words = shlex.split(command.format(port=port, model=shlex.quote(model), streams=num_streams))
    if words[0].startswith("-"):
        words = [sys.executable, *words]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        listed = _wait_for_models(process, name, f"http://127.0.0.1:{port}")
        # mlx_lm.server lists what is in the hub's cache; this is its name for the one it was started with.
        asked = listed[0] if listed and "mlx_lm" not in command else "default_model"
        yield Served(
            name,
            f"http://127.0.0.1:{port}",
            asked,
            lambda: {name: cpu_seconds_of_family(process.pid)},
            lambda: family_pids(process.pid),
        )
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_models(process: subprocess.Popen[bytes], name: str, url: str) -> list[str]:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            answer = httpx2.get(f"{url}/v1/models", timeout=5)
            if answer.is_success:
                return [str(model["id"]) for model in answer.json()["data"]]
        except ValueError:
            return []  # mlx_lm.server, where there is no hub's cache
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{name} does not answer at {url}")
