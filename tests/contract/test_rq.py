"""RQ 3.0: what `common/rq.py`, `worker/jobs/` and `api/generation/job_queue.py` rely on. No Redis: commands are only recorded."""

from __future__ import annotations

import base64
import inspect
import os
import pickle
import re
import signal
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import rq.job
import rq.results
import rq.serializers
from rq.command import handle_command, parse_payload
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution, ExecutionRegistry
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus, Retry
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now
from rq.worker import SimpleWorker, WorkerStatus
from rq.worker.base import BaseWorker
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from common.rq import JsonJob, JsonQueue
from tests.contract.signatures import accepts, parameters

READS = {"GET", "EXISTS", "HGETALL", "HGET", "INFO", "WATCH", "SMEMBERS", "ZRANGE", "LRANGE"}


class UnreachableError(Exception):
    """A command was sent that should only be recorded."""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """A client that must never connect."""

    def get_connection(*_arguments: Any, **_options: Any) -> None:
        raise UnreachableError

    with redis.Redis() as unconnected:
        monkeypatch.setattr(unconnected.connection_pool, "get_connection", get_connection)
        yield unconnected


@pytest.fixture
def queue(client: redis.Redis) -> JsonQueue:
    created = JsonQueue("m", connection=client)
    created.redis_server_version = (7, 0, 0)
    return created


@pytest.fixture
def worker(queue: JsonQueue) -> BaseWorker:
    """A worker without a connection; its constructor would ask for the server's version."""
    created: BaseWorker = object.__new__(SimpleWorker)
    vars(created).update(
        name="w",
        connection=queue.connection,
        queues=[queue],
        executions={},
        log=SimpleNamespace(debug=lambda *_: None, info=lambda *_: None),
        worker_ttl=16,
        _stopped_job_id=None,
    )
    return created


def _job(queue: JsonQueue) -> Job:
    options = {"timeout": 60, "ttl": 60, "result_ttl": 60, "failure_ttl": 60, "retry": Retry(max=2)}
    return queue.create_job("f", kwargs={"job_id": "j"}, job_id="j", description="d", **options)


def _commands(pipe: Any) -> list[tuple[Any, ...]]:
    return [arguments for arguments, _ in pipe.command_stack]


def _recorded(client: redis.Redis, record: Callable[[Any], object]) -> list[tuple[Any, ...]]:
    """The commands that a call records on a pipeline; fails if the call sends any itself."""
    pipe = client.pipeline()
    record(pipe)
    return _commands(pipe)


def test_heartbeat_begins_with_hset(client: redis.Redis, worker: BaseWorker) -> None:
    """`Heartbeat.beat` relies on HSET's reply being first: 1 means that RQ's worker hash had expired and was created again.

    Otherwise a worker that lost its connection for long would be missing in `rq info`. Open worker/jobs/heartbeat.py.
    """
    commands = _recorded(client, lambda pipe: worker.heartbeat(10, pipeline=pipe))
    assert commands[0][:3] == ("HSET", "rq:worker:w", "last_heartbeat")
    assert {command[0] for command in commands[1:]} == {"EXPIRE"}


def test_enqueueing_only_writes(client: redis.Redis, queue: JsonQueue) -> None:
    """`JobQueue` records `enqueue_job` and sends it as one script: a read in between would block the API, or have no reply.

    Open api/generation/job_queue.py.
    """
    commands = _recorded(client, lambda pipe: queue.enqueue_job(_job(queue), pipeline=pipe))
    names = [command[0] for command in commands]
    assert not READS & set(names)
    assert ("RPUSH", "rq:queue:m", "j") in commands


def test_requeueing_only_writes(client: redis.Redis, queue: JsonQueue) -> None:
    """`JsonQueue.put_back` calls `Queue._enqueue_job` with a pipeline: takeover puts jobs at the front with it. Open common/rq.py."""
    commands = _recorded(client, lambda pipe: queue.put_back(_job(queue), pipe, 60))
    assert ("LPUSH", "rq:queue:m", "j") in commands
    assert not READS & {command[0] for command in commands}
    assert parameters(Queue._enqueue_job)[:3] == ["job", "pipeline", "at_front"]


def test_recorded_words_can_be_sent(client: redis.Redis, queue: JsonQueue) -> None:
    """Recorded commands are sent as arguments of a script: each word has to be one that redis-py encodes.

    Open worker/jobs/scripts.py, api/generation/job_queue.py.
    """
    encode = redis.connection.Encoder("utf-8", "strict", decode_responses=False).encode
    commands = _recorded(client, lambda pipe: queue.enqueue_job(_job(queue), pipeline=pipe))
    words = [encode(word) for command in commands for word in command]
    assert b"queued" in words, "a status is its value"


def test_server_version_can_be_given(client: redis.Redis) -> None:
    """`JobQueue` sets `redis_server_version`, since RQ asks the server otherwise, blocking the API's event loop.

    Open api/generation/job_queue.py.
    """
    unknown = JsonQueue("m", connection=client)
    with pytest.raises(UnreachableError):
        unknown.get_redis_server_version()
    unknown.redis_server_version = (7, 0, 0)
    assert unknown.get_redis_server_version() == (7, 0, 0)


def test_execution_is_recorded(client: redis.Redis, queue: JsonQueue) -> None:
    """`Executions.start` creates executions in intake's MULTI; their keys are leases. Open worker/jobs/executions.py."""
    pipe = client.pipeline()
    execution = Execution.create(_job(queue), 60, pipeline=pipe, worker_name="w")
    assert execution.composite_key == f"j:{execution.id}"
    assert execution.key == f"{RQ_KEY_PREFIX}:execution:j:{execution.id}"  # takeover builds it by itself
    commands = _commands(pipe)
    keys = {(command[0], command[1]) for command in commands}
    assert {("HSET", execution.key), ("ZADD", "rq:wip:m"), ("SADD", "rq:worker:w:executions")} <= keys
    assert not READS & {command[0] for command in commands}


def test_execution_from_its_composite_key(client: redis.Redis) -> None:
    """Takeover creates an execution from an entry of RQ's registry; a malformed entry is a ValueError. Open worker/jobs/takeover.py."""
    assert Execution.from_composite_key("j:e", client).job_id == "j"
    assert Execution.from_composite_key("j:e", client).id == "e"
    with pytest.raises(ValueError, match="unpack"):
        Execution.from_composite_key("a:b:c", client)


def test_registries_renew_without_adding(client: redis.Redis, queue: JsonQueue) -> None:
    """The heartbeat renews registry entries with `xx=True`: one that another worker took over must not come back.

    Open worker/jobs/heartbeat.py.
    """
    execution = Execution("e", "j", client, worker_name="w")

    def record(pipe: Any) -> None:
        queue.started_job_registry.add_execution(execution, pipeline=pipe, ttl=60, xx=True)
        ExecutionRegistry(job_id="j", connection=client).add(
            execution=execution, ttl=60, pipeline=pipe, xx=True
        )

    added = [command for command in _recorded(client, record) if command[0] == "ZADD"]
    assert [b"XX" in command for command in added] == [True, True]


def test_execution_deletion_is_recorded(client: redis.Redis, queue: JsonQueue, worker: BaseWorker) -> None:
    """`Executions.drop` and `requeue` delete an execution in a MULTI or a script of their own. Open worker/jobs/executions.py."""
    job, execution = _job(queue), Execution("e", "j", client, worker_name="w")
    worker.executions["e"] = execution
    commands = _recorded(client, lambda pipe: worker.cleanup_execution(job, pipe, execution))
    assert ("DEL", execution.key) in commands
    assert ("SREM", "rq:worker:w:executions", "j:e") in commands
    assert worker.executions == {}
    assert commands == _recorded(client, lambda pipe: execution.delete(job=job, pipeline=pipe))


def test_preparation_is_recorded(client: redis.Redis, queue: JsonQueue) -> None:
    """`prepare_for_execution` writes the status by which takeover recognizes a started job. Open worker/jobs/executions.py."""
    job = _job(queue)
    (command,) = _recorded(client, lambda pipe: job.prepare_for_execution("w", pipeline=pipe))
    assert command[:2] == ("HSET", "rq:job:j")
    assert job.get_status(refresh=False) == JobStatus.STARTED


def test_state_is_recorded(client: redis.Redis, worker: BaseWorker) -> None:
    """`set_state` writes one field and keeps it in `_state`, which `_show_state` compares. Open worker/jobs/batch_worker.py."""
    commands = _recorded(client, lambda pipe: worker.set_state(WorkerStatus.BUSY, pipeline=pipe))
    assert commands == [("HSET", "rq:worker:w", "state", WorkerStatus.BUSY)]
    assert worker._state == WorkerStatus.BUSY


def test_failure_is_recorded(client: redis.Redis, queue: JsonQueue) -> None:
    """Takeover fails a job that has no tries left with `Job._handle_failure` in its own transaction. Open worker/jobs/takeover.py."""
    job = _job(queue)
    commands = _recorded(client, lambda pipe: job._handle_failure("gone", pipe))
    assert {("ZADD", "rq:failed:m"), ("XADD", "rq:results:j")} <= {command[:2] for command in commands}
    assert not READS & {command[0] for command in commands}
    (status,) = _recorded(client, lambda pipe: job.set_status(JobStatus.FAILED, pipeline=pipe))
    assert status[:4] == ("HSET", "rq:job:j", "status", JobStatus.FAILED)


def test_result_comes_from_a_private_attribute(client: redis.Redis, queue: JsonQueue) -> None:
    """`Executions.finish` sets `Job._result`; otherwise RQ's tools would show no result of a finished request. Open worker/jobs/executions.py."""
    job = _job(queue)
    job.ended_at = now()
    job._result = {"finish_reason": "stop"}

    def record(pipe: Any) -> None:
        job._handle_success(60, pipeline=pipe, worker_name="w")

    (added,) = [command for command in _recorded(client, record) if command[0] == "XADD"]
    value = added[added.index("return_value") + 1]
    assert base64.b64decode(value) == b'{"finish_reason": "stop"}'


def test_handlers_of_job_ends() -> None:
    """`Executions.finish` and `fail` call RQ's handlers, which use `_stopped_job_id` and `should_retry`. Open worker/jobs/executions.py."""
    assert accepts(BaseWorker.handle_job_success, None, "job", "queue", "registry", "execution")
    assert accepts(BaseWorker.handle_job_failure, None, "job", "queue", exc_string="", execution=None)
    failure = inspect.getsource(BaseWorker.handle_job_failure)
    assert "self._stopped_job_id == job.id" in failure
    assert "job.should_retry" in failure
    job = JsonJob("j", connection=redis.Redis())
    job.retries_left = None
    assert not job.should_retry


@pytest.mark.parametrize(
    "name",
    [
        "_install_signal_handlers",
        "bootstrap",
        "cleanup_execution",
        "get_heartbeat_ttl",
        "get_state",
        "handle_payload",
        "heartbeat",
        "request_stop",
        "request_stop_execution",
        "run_maintenance_tasks",
        "serialize",
        "set_state",
        "subscribe",
        "teardown",
        "work",
        "_pubsub_exception_handler",
    ],
)
def test_worker_has(name: str) -> None:
    """`BatchWorker` calls or overrides this method of RQ's worker. Open worker/jobs/batch_worker.py."""
    assert callable(getattr(BaseWorker, name))


def test_worker_attributes() -> None:
    """`BatchWorker` sets or reads these; setting a renamed one would have no effect. Open worker/jobs/batch_worker.py."""
    source = inspect.getsource(BaseWorker)
    for name in (
        "_shutdown_requested_date",
        "_stop_requested",
        "_stopped_job_id",
        "last_cleaned_at",
        "_state",
    ):
        assert f"self.{name}" in source, name
    for name in (
        "pubsub_channel_name",
        "should_run_maintenance_tasks",
        "executions_key",
        "redis_workers_keys",
        "key",
    ):
        assert hasattr(BaseWorker, name), name
    wanted = {
        "queues",
        "name",
        "connection",
        "serializer",
        "worker_ttl",
        "maintenance_interval",
        "log_job_description",
    }
    assert wanted <= set(parameters(BaseWorker.__init__))


def test_worker_keys(worker: BaseWorker) -> None:
    """The heartbeat builds these keys itself: workers of a queue, and whether `rq suspend` is in force. Open worker/jobs/heartbeat.py."""
    assert f"{RQ_KEY_PREFIX}:workers:m" == WORKERS_BY_QUEUE_KEY % "m"
    assert f"{RQ_KEY_PREFIX}:suspended" == WORKERS_SUSPENDED
    assert worker.executions_key == Execution("e", "j", worker.connection, "w").worker_executions_key
    assert worker.key == "rq:worker:w"


def test_bootstrap_subscribes() -> None:
    """RQ's `bootstrap` calls `BatchWorker.subscribe`. Otherwise stop commands and cancellations would reach no worker. Open worker/jobs/batch_worker.py."""
    assert "self.subscribe()" in inspect.getsource(BaseWorker.bootstrap)
    assert "self._pubsub_exception_handler" in inspect.getsource(BaseWorker.subscribe)


def test_working_time_is_a_difference(queue: JsonQueue) -> None:
    """RQ sums `ended_at - started_at` of jobs; `Executions` sets the first. Open worker/jobs/executions.py."""
    job = _job(queue)
    job.started_at = now()
    job.ended_at = now()
    assert job.ended_at - job.started_at < timedelta(seconds=5)


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """`handle_payload` leaves two commands to RQ: stop-execution, and shutdown, which is a SIGINT. Open worker/jobs/batch_worker.py."""
    stopped: list[str] = []
    signals: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _pid, signum: signals.append(signum))
    log = SimpleNamespace(debug=lambda *_: None, info=lambda *_: None)
    worker: Any = SimpleNamespace(log=log, request_stop_execution=stopped.append)
    handle_command(worker, {"command": "stop-execution", "job_id": "j", "execution_id": "e"})
    handle_command(worker, {"command": "shutdown"})
    assert stopped == ["e"]
    assert signals == [signal.SIGINT]
    assert parse_payload({"data": b'{"command": "stop-job", "job_id": "j"}'}) == {
        "command": "stop-job",
        "job_id": "j",
    }


def test_jobs_are_read_as_rq_wrote_them(client: redis.Redis, queue: JsonQueue) -> None:
    """`records.restore_job` reads a job from its hash as intake got it: compressed JSON of four parts. Open worker/jobs/records.py."""
    encode = redis.connection.Encoder("utf-8", "strict", decode_responses=False).encode
    fields = {encode(name): encode(value) for name, value in _job(queue).to_dict().items()}
    assert zlib.decompress(fields[b"data"]) == b'["f", null, [], {"job_id": "j"}]'
    job = JsonJob("j", connection=client)
    job.restore(fields)
    assert job.kwargs == {"job_id": "j"}
    assert job.retries_left == 2


def test_pickle_is_closed_by_rebinding() -> None:
    """`common.rq` rebinds `DefaultSerializer.loads`. Otherwise RQ would unpickle what it finds in Redis. Open common/rq.py."""
    default = rq.serializers.resolve_serializer(None)
    assert default is rq.serializers.DefaultSerializer
    with pytest.raises(ValueError, match="reads JSON only"):
        default.loads(pickle.dumps(1))


@pytest.mark.parametrize("name", ["success_callback", "failure_callback", "stopped_callback"])
def test_callbacks_are_properties(name: str) -> None:
    """`JsonJob` overrides each property through which RQ imports a callback by name. Open common/rq.py."""
    assert isinstance(inspect.getattr_static(Job, name), property)
    others = {each for each in vars(Job) if each.endswith("_callback")}
    assert others == {"success_callback", "failure_callback", "stopped_callback"}, (
        "a new one is not overridden"
    )


def test_job_is_constructed_with_a_serializer() -> None:
    """`JsonJob` ignores the serializer that callers pass, by position or by name. Open common/rq.py."""
    assert parameters(Job.__init__)[:3] == ["id", "connection", "serializer"]
    for name in ("send_webhooks", "get_call_string", "perform", "key_for", "fetch"):
        assert callable(getattr(Job, name)), name


def test_intermediate_queue_is_a_property(queue: JsonQueue) -> None:
    """`JsonQueue` gives RQ's maintenance an intermediate queue without cleanup, which would fail jobs after a minute. Open common/rq.py."""
    assert isinstance(inspect.getattr_static(Queue, "intermediate_queue"), property)
    assert parameters(IntermediateQueue.cleanup) == ["worker", "queue"]
    assert "queue.intermediate_queue.cleanup(self, queue)" in inspect.getsource(BaseWorker.clean_registries)
    assert queue.intermediate_queue_key == queue.intermediate_queue.key


def test_maintenance_takes_a_lock() -> None:
    """`JsonQueue.acquire_maintenance_lock` replaces one of 899 seconds that outlives its killed holder. Open common/rq.py."""
    assert "acquire_maintenance_lock()" in inspect.getsource(BaseWorker)
    assert isinstance(inspect.getattr_static(Queue, "registry_cleaning_key"), property)


def test_registry_entries_are_composite_keys() -> None:
    """Takeover reads `StartedJobRegistry` itself and parses its members as `job_id:execution_id`. Open worker/jobs/takeover.py."""
    recorded: list[Any] = []
    pipe: Any = SimpleNamespace(zadd=lambda key, members, **_: recorded.append((key, members)))
    execution = Execution("e", "j", redis.Redis())
    StartedJobRegistry("m", connection=redis.Redis()).add_execution(execution, pipeline=pipe, ttl=1)
    [(key, members)] = recorded
    assert key == "rq:wip:m"
    assert list(members) == ["j:e"]


def test_dashboard_takes_the_worker_class_from_rq(monkeypatch: pytest.MonkeyPatch) -> None:
    """rq-dashboard 0.9 imports `rq.Worker`, which `common.rq dashboard` rebinds before. Open common/rq.py."""
    web, cli = import_module("rq_dashboard.web"), import_module("rq_dashboard.cli")
    assert web.Worker is rq.Worker
    names = {option for parameter in cli.run.params for option in parameter.opts}
    assert {"--json", "--redis-url", "-u", "--bind"} <= names


def test_command_line_takes_classes_from_the_environment() -> None:
    """`python -m common.rq` passes its classes to RQ through RQ_JOB_CLASS and others. Otherwise RQ would unpickle. Open common/rq.py."""
    from rq.cli import cli

    options = {option.envvar for option in cli.info.params}
    assert {"RQ_REDIS_URL", "RQ_JOB_CLASS", "RQ_QUEUE_CLASS", "RQ_WORKER_CLASS"} <= options


def test_decompression_is_bounded_by_rebinding() -> None:
    """Only two modules of RQ decompress, through the name `zlib` that `common.rq` rebinds. Open common/rq.py.

    Decompressed elsewhere, or through another name, a small job could fill a worker's memory.
    """
    folder = Path(rq.__file__).parent
    users = {path.name for path in folder.rglob("*.py") if "decompress" in path.read_text()}
    assert users == {"job.py", "results.py"}
    for module in (rq.job, rq.results):
        source = inspect.getsource(module)
        assert source.count("decompress(") == source.count("zlib.decompress(")
        assert set(re.findall(r"\bzlib\.(\w+)", source)) <= {"compress", "decompress", "error"}
