"""Heartbeat: what a worker says of itself several times a lease, in one trip to Redis.

Called by the worker's main thread. Renews RQ's worker entry, the lease of every execution, the journals' time to live and
the model card; learns whether `rq suspend` is in force and which leases were lost.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution, ExecutionRegistry

from common import names
from common.protocol import ModelCard
from common.rq import JsonJob

if TYPE_CHECKING:
    from redis.client import Pipeline

    from worker.jobs.batch_worker import BatchWorker
    from worker.loop.engine import ModelInfo
    from worker.loop.generation_loop import GenerationLoop

RQ_WORKER_TTL_SECONDS = 10
"""How long `rq info` lists a worker that was killed."""

BACKSTOP_SECONDS = 3600
"""What RQ's registries believe an execution lives: so far away that stock cleaners, which go by local clocks, never
declare one abandoned. The real lease is the time to live of the execution's key."""

_LONGEST_RENEWAL_SECONDS = 600.0


class Heartbeat:
    """See the module.

    Attributes:
        is_suspended: Whether `rq suspend` was in force at the last beat.
        num_workers: How many workers the model had then, this one included.

    Args:
        lease_ms: How long a lease lasts without a beat.
        live_ttl_seconds: What a job and its journal have to live while it goes on.
    """

    def __init__(
        self,
        worker: BatchWorker,
        loop: GenerationLoop,
        info: ModelInfo,
        *,
        lease_ms: int,
        live_ttl_seconds: int,
    ) -> None:
        self.is_suspended = False
        self.num_workers = 1
        self._worker = worker
        self._loop = loop
        self._info = info
        self._lease_ms = lease_ms
        self._live_ttl_seconds = live_ttl_seconds
        self._renewal_seconds = min(_LONGEST_RENEWAL_SECONDS, live_ttl_seconds / 4)
        self._books_renewed_at = time.monotonic()
        self._created_at = int(time.time())
        self._rate = BusyRate()

    def beat(self, *, draining: bool) -> list[Execution]:
        """Renew everything; a worker that drains shows no card, since it takes nothing more.

        Returns:
            Executions whose lease was lost: they are another worker's now.

        Raises:
            redis.RedisError: Redis is away; some of it may have been renewed.
        """
        worker = self._worker
        executions = list(worker.executions.values())
        with worker.connection.pipeline(transaction=False) as pipe:
            worker.heartbeat(RQ_WORKER_TTL_SECONDS, pipeline=pipe)
            pipe.scard(f"{RQ_KEY_PREFIX}:workers:{worker.queue.name}")
            pipe.exists(f"{RQ_KEY_PREFIX}:suspended")
            num_before = len(pipe)
            for execution in executions:
                # NOTE: never anything that creates the key: 0 means that the lease ran out, and it stays so.
                pipe.pexpire(execution.key, self._lease_ms)
            if draining:
                self.withdraw_card(pipe)
            else:
                self._show_card(pipe)
            answers = pipe.execute()
        if answers[0] == 1:  # HSET made RQ's hash anew: it had run out while we were away
            self._register_again()
        self.num_workers, self.is_suspended = int(answers[num_before - 2]), bool(answers[num_before - 1])
        renewed = dict(zip(executions, answers[num_before : num_before + len(executions)], strict=True))
        if time.monotonic() - self._books_renewed_at >= self._renewal_seconds:
            self._renew_books([e for e in executions if renewed[e]])
        return [e for e in executions if not renewed[e] and e.id in worker.executions]

    def withdraw_card(self, pipe: Pipeline) -> None:
        """Record on `pipe` that this worker takes no more requests."""
        pipe.delete(names.worker_card(self._worker.name))
        pipe.zrem(names.WORKER_CARDS, self._worker.name)

    def _register_again(self) -> None:
        worker = self._worker
        with worker.connection.pipeline() as pipe:
            pipe.hset(worker.key, mapping=worker.serialize() | {"state": worker.get_state()})
            pipe.expire(worker.key, RQ_WORKER_TTL_SECONDS)
            pipe.sadd(worker.redis_workers_keys, worker.key)
            pipe.sadd(f"{RQ_KEY_PREFIX}:workers:{worker.queue.name}", worker.key)
            pipe.execute()

    def _renew_books(self, executions: list[Execution]) -> None:
        """What lives long without a worker: the backstops, the journals and the jobs, of executions that are ours."""
        registry = self._worker.queue.started_job_registry
        with self._worker.connection.pipeline(transaction=False) as pipe:
            for execution in executions:
                registry.add_execution(execution, pipeline=pipe, ttl=BACKSTOP_SECONDS, xx=True)
                of_job = ExecutionRegistry(job_id=execution.job_id, connection=self._worker.connection)
                of_job.add(execution=execution, ttl=BACKSTOP_SECONDS, pipeline=pipe, xx=True)
                pipe.expire(names.journal(execution.job_id), self._live_ttl_seconds)
                pipe.expire(JsonJob.key_for(execution.job_id), self._live_ttl_seconds)
            pipe.execute()
        self._books_renewed_at = time.monotonic()

    def _show_card(self, pipe: Pipeline) -> None:
        name, model, unix_now = self._worker.name, self._worker.queue.name, time.time()
        pipe.hset(names.worker_card(name), mapping=self._card().to_hash())
        pipe.expire(names.worker_card(name), names.CARD_SECONDS)
        # RQ lists a queue from its first job on, and `rq info` only the workers of queues that are listed.
        pipe.sadd(self._worker.queue.redis_queues_keys, self._worker.queue.key)
        pipe.zadd(names.WORKER_CARDS, {name: unix_now})
        pipe.zremrangebyscore(names.WORKER_CARDS, 0, unix_now - names.CARD_NAME_SECONDS)
        pipe.zadd(names.KNOWN_MODELS, {model: unix_now})
        pipe.zremrangebyscore(names.KNOWN_MODELS, 0, unix_now - names.KNOWN_MODEL_SECONDS)

    def _card(self) -> ModelCard:
        num_executions = len(self._worker.executions)
        self._rate.look(time.monotonic(), self._loop.num_tokens, is_busy=num_executions > 0)
        return ModelCard(
            id=self._worker.queue.name,
            worker=self._worker.name,
            created=self._created_at,
            context_length=self._info.context_length,
            vocab_size=self._info.vocab_size,
            max_batch=self._info.max_batch,
            free_slots=max(0, self._info.max_batch - num_executions),
            quantization=self._info.quantization,
            has_chat_template=self._info.has_chat_template,
            can_fill=self._info.can_fill,
            tokens_per_second=round(self._rate.per_second, 1),
            mean_tokens=round(self._loop.mean_tokens, 1),
            step=self._loop.num_steps,
        )


class BusyRate:
    """Tokens per second while there was something to do; what is idle says nothing of how fast it could be.

    Attributes:
        per_second: Smoothed over some seconds; 0: not known.
    """

    MIN_SECONDS = 1.0
    NEW_SHARE = 0.3

    def __init__(self) -> None:
        self.per_second = 0.0
        self._since: tuple[float, int] | None = None  # when, and tokens by then

    def look(self, now: float, num_tokens: int, *, is_busy: bool) -> None:
        """Once a heartbeat; `now` in monotonic seconds."""
        if self._since is None or not is_busy:
            self._since = (now, num_tokens) if is_busy else None
            return
        at, num_before = self._since
        if now - at < self.MIN_SECONDS:
            return
        rate = (num_tokens - num_before) / (now - at)
        self.per_second += (rate - self.per_second) * (self.NEW_SHARE if self.per_second else 1.0)
        self._since = (now, num_tokens)
