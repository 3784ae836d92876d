"""Heartbeat: everything a worker renews several times per lease, in one round trip to Redis.

Called by the worker's main thread. Renews RQ's worker entry, the lease of each execution, the journals' time to live and the
model card; reads whether `rq suspend` is in force and which leases were lost.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution, ExecutionRegistry

from common import names
from common.models import sampling_defaults
from common.models.model_card import ModelCard
from common.rq import JsonJob
from worker.jobs.executions import BACKSTOP_SECONDS, Executions
from worker.jobs.registration import Registration
from worker.loop.engine import ModelInfo
from worker.loop.generation_loop import GenerationLoop

if TYPE_CHECKING:
    from redis.client import Pipeline

_MAX_RENEWAL_SECONDS = 600.0


_BEATS_PER_EXPIRY = 4
"""Heartbeats in the time after which something that they renew expires."""


def beat_interval_seconds(lease_seconds: float) -> float:
    """The time between two heartbeats, which renew leases and the model card; a long lease does not let the card expire."""
    return min(lease_seconds, names.CARD_SECONDS) / _BEATS_PER_EXPIRY


class Heartbeat:
    """See the module.

    Attributes:
        is_suspended: Whether `rq suspend` was in force at the last beat.
        num_workers: The model's workers at the last beat, this one included.

    Args:
        loop: Read for the counters of the model card.
        live_ttl_seconds: Time to live of a job and its journal while it runs.
    """

    def __init__(
        self,
        registration: Registration,
        executions: Executions,
        loop: GenerationLoop,
        info: ModelInfo,
        *,
        live_ttl_seconds: int,
    ) -> None:
        self.is_suspended = False
        self.num_workers = 1
        self._registration = registration
        self._executions = executions
        self._redis = executions.connection
        self._queue = executions.queue
        self._loop = loop
        self._info = info
        self._live_ttl_seconds = live_ttl_seconds
        self._renewal_seconds = min(_MAX_RENEWAL_SECONDS, live_ttl_seconds / 4)
        self._renewed_mono = time.monotonic()
        self._created_at = int(time.time())
        self._rate = BusyRate()

    def beat(self, *, draining: bool) -> list[Execution]:
        """Renew everything; a draining worker shows no card, since it takes no more jobs.

        Returns:
            Executions whose lease was lost: other workers have their jobs.

        Raises:
            redis.RedisError: Redis is away; some of it may have been renewed.
        """
        executions = self._executions.held()
        with self._redis.pipeline(transaction=False) as pipe:
            self._registration.renew(pipe)
            self._registration.count_workers(pipe)
            pipe.exists(f"{RQ_KEY_PREFIX}:suspended")
            num_before = len(pipe)
            for execution in executions:
                self._executions.renew(execution, pipe)
            if draining:
                self.remove_card(pipe)
            else:
                self._show_card(pipe)
            replies = pipe.execute()
        if replies[0] == 1:  # HSET created RQ's hash: it had expired while we were away
            self._registration.restore()
        self.num_workers, self.is_suspended = int(replies[num_before - 2]), bool(replies[num_before - 1])
        is_renewed = dict(zip(executions, replies[num_before : num_before + len(executions)], strict=True))
        if time.monotonic() - self._renewed_mono >= self._renewal_seconds:
            self._renew_backstops([e for e in executions if is_renewed[e]])
        return [e for e in executions if not is_renewed[e] and e in self._executions]

    def remove_card(self, pipe: Pipeline) -> None:
        """Record on `pipe` that this worker takes no more requests."""
        pipe.delete(names.worker_card(self._registration.name))
        pipe.zrem(names.WORKER_CARDS, self._registration.name)

    def _renew_backstops(self, executions: list[Execution]) -> None:
        """Renew what outlives a worker by far: RQ's entries, the journals and the jobs of executions that are ours."""
        registry = self._queue.started_job_registry
        with self._redis.pipeline(transaction=False) as pipe:
            for execution in executions:
                registry.add_execution(execution, pipeline=pipe, ttl=BACKSTOP_SECONDS, xx=True)
                job_executions = ExecutionRegistry(job_id=execution.job_id, connection=self._redis)
                job_executions.add(execution=execution, ttl=BACKSTOP_SECONDS, pipeline=pipe, xx=True)
                pipe.expire(names.journal(execution.job_id), self._live_ttl_seconds)
                pipe.expire(JsonJob.key_for(execution.job_id), self._live_ttl_seconds)
            pipe.execute()
        self._renewed_mono = time.monotonic()

    def _show_card(self, pipe: Pipeline) -> None:
        name, model, now_at = self._registration.name, self._queue.name, time.time()
        pipe.hset(names.worker_card(name), mapping=self._card().to_hash())
        pipe.expire(names.worker_card(name), names.CARD_SECONDS)
        self._registration.list_queue(pipe)
        pipe.zadd(names.WORKER_CARDS, {name: now_at})
        pipe.zremrangebyscore(names.WORKER_CARDS, 0, now_at - names.CARD_NAME_SECONDS)
        pipe.zadd(names.KNOWN_MODELS, {model: now_at})
        pipe.zremrangebyscore(names.KNOWN_MODELS, 0, now_at - names.KNOWN_MODEL_SECONDS)

    def _card(self) -> ModelCard:
        num_executions = len(self._executions)
        self._rate.observe(time.monotonic(), self._loop.num_tokens, is_busy=num_executions > 0)
        return ModelCard(
            id=self._queue.name,
            worker=self._registration.name,
            created=self._created_at,
            context_length=self._info.context_length,
            vocab_size=self._info.vocab_size,
            max_batch=self._info.max_batch,
            free_slots=max(0, self._info.max_batch - num_executions),
            quantization=self._info.quantization,
            has_chat_template=self._info.has_chat_template,
            can_fill=self._info.can_fill,
            can_tokenize=True,
            can_reason=self._info.can_reason,
            sampling_defaults=sampling_defaults.to_text(self._info.sampling_defaults),
            tokens_per_second=round(self._rate.per_second, 1),
            mean_tokens=round(self._loop.mean_tokens, 1),
            step=self._loop.num_steps,
        )


class BusyRate:
    """Tokens per second while requests were running: an idle worker's rate says nothing about its speed.

    Attributes:
        per_second: Smoothed over some seconds; 0: unknown.
    """

    MIN_SECONDS = 1.0
    NEW_SHARE = 0.3

    def __init__(self) -> None:
        self.per_second = 0.0
        self._last: tuple[float, int] | None = None  # monotonic seconds, and tokens by then

    def observe(self, now_mono: float, num_tokens: int, *, is_busy: bool) -> None:
        """Called once a heartbeat.

        Args:
            num_tokens: Generated so far, in total.
        """
        if self._last is None or not is_busy:
            self._last = (now_mono, num_tokens) if is_busy else None
            return
        last_mono, num_before = self._last
        if now_mono - last_mono < self.MIN_SECONDS:
            return
        rate = (num_tokens - num_before) / (now_mono - last_mono)
        self.per_second += (rate - self.per_second) * (self.NEW_SHARE if self.per_second else 1.0)
        self._last = (now_mono, num_tokens)
