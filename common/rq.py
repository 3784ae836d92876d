"""RQ with JSON only: the job and queue classes that API and workers use, and a safe way to run RQ's own tools.

By default RQ unpickles what it finds in Redis and imports callbacks by name, so anyone who can write to Redis could run code
on every Mac. Here a job is data: JSON only, of bounded size; callbacks are never resolved, functions never imported. Importing
this module also disables RQ's pickle and its unbounded decompression in this process. `python -m common.rq info` is RQ's
command line with these classes, and `python -m common.rq dashboard` is rq-dashboard's.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from types import SimpleNamespace
from typing import Any, NoReturn

import msgspec
import rq.job
import rq.results
import rq.serializers
from redis import Redis
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker import SimpleWorker

from common import names
from common.errors import MLXPoolError, StartupError
from common.protocol import GenerationJob
from common.settings import Settings


def _refuse(_data: bytes) -> NoReturn:
    raise ValueError("mlx-pool reads JSON only: this RQ job was written by something else")


rq.serializers.DefaultSerializer.loads = staticmethod(_refuse)  # RQ's default is pickle; ours is JSON

MAX_JOB_BYTES = 128 * 1024 * 1024
"""Limit of what RQ compresses: a job's data, an exception's text. JSON in ASCII is at most three times a body in UTF-8, and a
schema may be in a job twice, so a body of the default limit, 10 MiB, makes 60 MiB at most; this leaves room for larger limits."""


MAX_NUMBER = 2**40
"""Limit of the numbers in a job's hash, seconds and counts: what RQ and Redis compute from them stays in their range."""

_NUMBERS = (
    "timeout",
    "result_ttl",
    "failure_ttl",
    "ttl",
    "number_of_retries",
    "retries_left",
    "repeats_left",
)
"""Attributes of a job that are numbers or None."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class ForeignJobError(MLXPoolError):
    """A job in one of our queues that the API did not write."""


def _decompress(data: bytes) -> bytes:
    """As `zlib.decompress`, up to a limit: a megabyte may decompress to a gigabyte.

    Raises:
        ForeignJobError: There is more than MAX_JOB_BYTES.
        zlib.error: `data` is not compressed; RQ then uses it unchanged.
    """
    decompressor = zlib.decompressobj()
    text = decompressor.decompress(data, MAX_JOB_BYTES + 1)
    if len(text) > MAX_JOB_BYTES:
        raise ForeignJobError(f"not a job of mlx-pool (it is larger than {MAX_JOB_BYTES} bytes)")
    if not decompressor.eof:
        raise zlib.error("incomplete or truncated stream")
    return text


# RQ 3.0 has no setting for it. These two modules are the only ones that decompress.
rq.job.zlib = rq.results.zlib = SimpleNamespace(  # type: ignore[assignment,attr-defined]
    compress=zlib.compress, decompress=_decompress, error=zlib.error
)


class JsonJob(Job):
    """A job that is always JSON, whatever serializer a caller (`rq info`, a registry, `Execution.job`) passes."""

    # `id` and `serializer` are RQ's parameter names.
    def __init__(
        self,
        id: str | None = None,  # noqa: A002
        connection: Redis | None = None,
        serializer: Any = None,  # noqa: ARG002
    ) -> None:
        super().__init__(id, connection, JSONSerializer)

    # RQ's cleanup imports the module that a job names as its callback. A name from Redis is never resolved here.
    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None

    def restore(self, raw_data: Any) -> Any:
        """As RQ's, and check what RQ later computes with or sends.

        Raises:
            ForeignJobError: A number is out of range, or the job depends on others, as no job of the API does.
        """
        super().restore(raw_data)
        for name in _NUMBERS:
            number = getattr(self, name)
            if number is not None and not -1 <= number <= MAX_NUMBER:
                raise ForeignJobError(f"not a job of mlx-pool (its {name} is out of range)")
        if self._dependency_ids:
            raise ForeignJobError("not a job of mlx-pool (it depends on other jobs)")

    def request(self) -> GenerationJob:
        """Decode the request that the API wrote.

        Raises:
            ForeignJobError: Another program wrote this job.
        """
        try:
            request = msgspec.convert(self.kwargs, GenerationJob, str_keys=True)
            if _SURROGATE.search(self.data):
                json.dumps(self.kwargs, ensure_ascii=False).encode()  # fails on a surrogate without its pair
        except Exception as error:
            raise ForeignJobError(f"not a job of mlx-pool ({type(error).__name__}: {error})") from error
        if request.job_id != self.id:
            raise ForeignJobError("not a job of mlx-pool (its request has another id)")
        return request

    def send_webhooks(self, *_args: Any, **_options: Any) -> None:
        """Do nothing: an address from Redis is not called."""

    def get_call_string(self) -> str:
        """What RQ's tools show of a job: never its arguments, which contain the prompt."""
        return names.JOB_FUNCTION

    def perform(self) -> NoReturn:
        """Refuse: jobs of this project are data."""
        raise ValueError("jobs of mlx-pool are data, not code; its own workers run them")


class _IntermediateQueueWithoutCleanup(IntermediateQueue):
    """RQ's cleanup fails a job that is here for a minute; our workers put it back in front after two seconds."""

    def cleanup(self, worker: Any, queue: Any) -> None:
        pass


class JsonQueue(Queue):
    """A queue of `JsonJob`s."""

    job_class = JsonJob

    def __init__(self, name: str = "default", connection: Redis | None = None, **options: Any) -> None:
        super().__init__(name, connection, **(options | {"serializer": JSONSerializer, "job_class": JsonJob}))

    def put_back(self, job: Job, pipeline: Any, ttl_seconds: int) -> None:
        """Record on `pipeline` that a job is in front of the queue again, with `ttl_seconds` to live."""
        self._enqueue_job(job, pipeline=pipeline, at_front=True)  # as Job.retry does
        pipeline.expire(job.key, ttl_seconds)  # RQ gives it a new job's

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        return _IntermediateQueueWithoutCleanup(self.key, connection=self.connection)

    def acquire_maintenance_lock(self) -> bool:
        """As RQ's, but for 5 s: RQ's own expires after 899 s, also if its holder was killed."""
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=5))


class JsonWorker(SimpleWorker):
    """For RQ's tools, which read workers through a class; it runs no jobs."""

    queue_class: type[Queue] = JsonQueue
    job_class = JsonJob

    def work(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuse: `python -m worker` runs the jobs."""
        raise SystemExit("python -m common.rq does not run jobs; python -m worker does")


def main(argv: list[str] | None = None) -> None:
    """Run RQ's command line, or rq-dashboard's, with the classes of this module, on `--url` or MLXPOOL_REDIS_URL."""
    arguments = argv if argv is not None else sys.argv[1:]
    try:
        url = Settings.load().redis_url
    except StartupError as error:
        sys.exit(f"mlx-pool: {error}")
    os.environ.setdefault("RQ_REDIS_URL", url)
    os.environ |= {
        "RQ_JOB_CLASS": "common.rq.JsonJob",
        "RQ_QUEUE_CLASS": "common.rq.JsonQueue",
        "RQ_WORKER_CLASS": "common.rq.JsonWorker",
    }
    if arguments[:1] == ["dashboard"]:
        _dashboard(arguments[1:], url)
    else:
        from rq.cli.cli import main as rq_main

        rq_main(args=arguments, prog_name="python -m common.rq")


def _dashboard(arguments: list[str], url: str) -> None:
    """Run rq-dashboard. 0.9 has `--json` for jobs, but reads a busy worker's job with RQ's default classes, which fails."""
    import rq

    rq.Worker = JsonWorker  # type: ignore[misc,assignment]  # where it takes the class from
    try:
        from rq_dashboard.cli import run as rq_dashboard
    except ImportError as error:
        sys.exit(f"mlx-pool: rq-dashboard cannot be imported ({error}); pip install rq-dashboard six")
    has_url = any(a in ("-u", "--redis-url") or a.startswith("--redis-url=") for a in arguments)
    # It has no password by default, and would listen on all addresses. `--bind` takes precedence over the variable.
    os.environ.setdefault("RQ_DASHBOARD_BIND", "127.0.0.1")
    options = ["--json", *([] if has_url else ["--redis-url", url]), *arguments]
    rq_dashboard.main(
        args=options, prog_name="python -m common.rq dashboard", auto_envvar_prefix="RQ_DASHBOARD"
    )


if __name__ == "__main__":
    main()
