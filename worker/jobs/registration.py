"""This worker's entry in RQ: what `rq info` lists. Written with each heartbeat, and again when Redis has lost it.

Wraps RQ's worker (`rq.worker.base.BaseWorker`) for the heartbeat, which is independent of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rq.defaults import RQ_KEY_PREFIX
from rq.worker.base import BaseWorker

from common.rq import JsonQueue

if TYPE_CHECKING:
    from redis.client import Pipeline

RQ_WORKER_TTL_SECONDS = 10
"""How long `rq info` lists a worker that was killed."""


class Registration:
    """See the module.

    Attributes:
        name: The worker's; never used again.
    """

    def __init__(self, worker: BaseWorker, queue: JsonQueue) -> None:
        self.name: str = worker.name
        self._worker = worker
        self._queue = queue
        self._members_key = f"{RQ_KEY_PREFIX}:workers:{queue.name}"

    def renew(self, pipe: Pipeline) -> None:
        """Record RQ's heartbeat on `pipe`. Its first reply is 1 if the entry had expired: then `restore` it."""
        self._worker.heartbeat(RQ_WORKER_TTL_SECONDS, pipeline=pipe)

    def count_workers(self, pipe: Pipeline) -> None:
        """Record on `pipe` a read of the number of workers of the queue."""
        pipe.scard(self._members_key)

    def list_queue(self, pipe: Pipeline) -> None:
        """Record on `pipe` that the queue is added to RQ's set of queues.

        RQ itself adds it with its first job, and `rq info` shows only the workers of queues in that set.
        """
        pipe.sadd(self._queue.redis_queues_keys, self._queue.key)

    def restore(self) -> None:
        """Write the complete entry again."""
        worker = self._worker
        with worker.connection.pipeline() as pipe:
            pipe.hset(worker.key, mapping=worker.serialize() | {"state": worker.get_state()})
            pipe.expire(worker.key, RQ_WORKER_TTL_SECONDS)
            pipe.sadd(worker.redis_workers_keys, worker.key)
            pipe.sadd(self._members_key, worker.key)
            pipe.execute()
