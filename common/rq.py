"""RQ with JSON for good: the job and queue classes that both sides use, and the safe way to run RQ's own tools.

RQ's defaults unpickle what they find in Redis and import callbacks by name, so that whoever reaches Redis could run code
on every Mac. Here a job is data: JSON only, no callback is ever resolved, no function is ever imported. Importing this
module also closes RQ's pickle in this process. `python -m common.rq info` is RQ's command line with these classes, and
`python -m common.rq dashboard` is rq-dashboard's.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import msgspec
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


rq.serializers.DefaultSerializer.loads = staticmethod(_refuse)  # closes RQ's pickle; ours is JSON


class ForeignJobError(MLXPoolError):
    """A job in one of our queues that the API did not write."""


class JsonJob(Job):
    """A job whose serializer is not negotiable, whatever a caller (`rq info`, a registry, `Execution.job`) passes."""

    # `id` and `serializer` are RQ's names for them.
    def __init__(
        self,
        id: str | None = None,  # noqa: A002
        connection: Redis | None = None,
        serializer: Any = None,  # noqa: ARG002
    ) -> None:
        super().__init__(id, connection, JSONSerializer)

    # Stock cleanup imports the module that a job names as its callback: a name read from Redis is never resolved here.
    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None

    def request(self) -> GenerationJob:
        """What the API asked for.

        Raises:
            ForeignJobError: Some other program wrote this job.
        """
        try:
            request = msgspec.convert(self.kwargs, GenerationJob, str_keys=True)
        except Exception as error:
            raise ForeignJobError(f"not a job of mlx-pool ({type(error).__name__}: {error})") from error
        if request.job_id != self.id:
            raise ForeignJobError("not a job of mlx-pool (its request has another id)")
        return request

    def send_webhooks(self, *_args: Any, **_options: Any) -> None:
        """Nothing: an address read from Redis is not called."""

    def get_call_string(self) -> str:
        """What tools show of a job: never its arguments, which hold the prompt."""
        return names.JOB_FUNCTION

    def perform(self) -> NoReturn:
        """Refuses: jobs of this project are data."""
        raise ValueError("jobs of mlx-pool are data, not code; its own workers run them")


class _UncleanedIntermediateQueue(IntermediateQueue):
    """Stock cleanup fails a job that lay here for a minute; our workers put it back in front after two seconds."""

    def cleanup(self, worker: Any, queue: Any) -> None:
        pass


class JsonQueue(Queue):
    """A queue of `JsonJob`s."""

    job_class = JsonJob

    def __init__(self, name: str = "default", connection: Redis | None = None, **options: Any) -> None:
        super().__init__(name, connection, **(options | {"serializer": JSONSerializer, "job_class": JsonJob}))

    def put_back(self, job: Job, pipeline: Any, ttl_seconds: int) -> None:
        """Record on `pipeline` that a job that was begun is in front of the queue again, for at most so long."""
        self._enqueue_job(job, pipeline=pipeline, at_front=True)  # as Job.retry does
        pipeline.expire(job.key, ttl_seconds)  # RQ gives it only as long as a new one

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        return _UncleanedIntermediateQueue(self.key, connection=self.connection)

    def acquire_maintenance_lock(self) -> bool:
        """As RQ's, but held for seconds: stock holds 899 s, also when its holder was killed."""
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=5))


class JsonWorker(SimpleWorker):
    """For RQ's tools, which read workers through a class; it never works."""

    queue_class: type[Queue] = JsonQueue
    job_class = JsonJob

    def work(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuses: `python -m worker` is what runs the jobs."""
        raise SystemExit("python -m common.rq does not run jobs; python -m worker does")


def main(argv: list[str] | None = None) -> None:
    """RQ's own command line, or rq-dashboard's, with the classes of this module; they take `--url`, or MLXPOOL_REDIS_URL."""
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
    """rq-dashboard 0.9 knows `--json` for jobs, but reads a worker's job by RQ's default: its page fails while one works."""
    import rq

    rq.Worker = JsonWorker  # type: ignore[misc,assignment]  # it takes the class from here
    try:
        from rq_dashboard.cli import run as rq_dashboard
    except ImportError as error:
        sys.exit(f"mlx-pool: rq-dashboard cannot be imported ({error}); pip install rq-dashboard six")
    has_url = any(a in ("-u", "--redis-url") or a.startswith("--redis-url=") for a in arguments)
    # It has no password of its own, and would listen on all addresses. `--bind` wins over the variable.
    os.environ.setdefault("RQ_DASHBOARD_BIND", "127.0.0.1")
    options = ["--json", *([] if has_url else ["--redis-url", url]), *arguments]
    rq_dashboard.main(
        args=options, prog_name="python -m common.rq dashboard", auto_envvar_prefix="RQ_DASHBOARD"
    )


if __name__ == "__main__":
    main()
