"""`/livez`, `/readyz` and `/health`, for probes, load balancers and operators; answered from memory, without a call to Redis."""

from __future__ import annotations

from typing import Literal

import falcon
import falcon.asgi
import msgspec

from api.generation.events.relay import Relay
from api.generation.model_directory import ModelDirectory


class Alive(msgspec.Struct, frozen=True, tag_field="status", tag="ok"):
    """The body of a 200."""


class Unready(msgspec.Struct, frozen=True, tag_field="status", tag="unavailable"):
    """The body of a 503: requests would fail."""

    reason: str


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the pool, as one API process sees it.

    Attributes:
        status: `degraded` while Redis is unavailable: the process runs, but requests would fail.
        suspended: `rq suspend` is in force: requests are accepted and wait in the queue.
        running_requests: Choices that the workers generate now, as of their last heartbeats.
        open_requests: Choices that this API process waits for, queued ones included.
    """

    status: Literal["ok", "degraded"]
    redis: bool
    suspended: bool
    models: int
    workers: int
    free_slots: int
    running_requests: int
    open_requests: int


class Health:
    """The resource of all three paths."""

    def __init__(self, directory: ModelDirectory, relay: Relay) -> None:
        self._directory = directory
        self._relay = relay

    async def on_get_live(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """200 if this process runs."""
        resp.data = msgspec.json.encode(Alive())

    async def on_get_ready(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """200 if Redis answers and at least one model has a worker, otherwise 503."""
        if not (self._relay.is_connected and self._directory.is_fresh):
            self._render_unready(resp, "Redis does not answer")
        elif not self._directory.served:
            self._render_unready(resp, "no model has a live worker")
        else:
            resp.data = msgspec.json.encode(Alive())

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """200 with a `HealthReport`, also while Redis is unavailable."""
        models = self._directory.served
        has_redis = self._relay.is_connected and self._directory.is_fresh
        resp.data = msgspec.json.encode(
            HealthReport(
                status="ok" if has_redis else "degraded",
                redis=has_redis,
                suspended=self._directory.is_suspended,
                models=len(models),
                workers=sum(model.num_workers for model in models),
                free_slots=sum(model.free_slots for model in models),
                running_requests=sum(model.busy_slots for model in models),
                open_requests=self._relay.num_subscriptions,
            )
        )

    on_head = on_get
    on_head_live = on_get_live
    on_head_ready = on_get_ready

    @staticmethod
    def _render_unready(resp: falcon.asgi.Response, reason: str) -> None:
        resp.status = falcon.HTTP_503
        resp.set_header("retry-after", "1")
        resp.data = msgspec.json.encode(Unready(reason))
