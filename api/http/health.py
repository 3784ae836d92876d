"""`/livez`, `/readyz` and `/health`, for whoever supervises the pool. Answered from what is known, in no time."""

from __future__ import annotations

from typing import Literal

import falcon
import falcon.asgi
import msgspec

from api.generation.model_directory import ModelDirectory
from api.generation.relay import Relay


class Alive(msgspec.Struct, frozen=True, tag_field="status", tag="ok"):
    """All is well."""


class Unready(msgspec.Struct, frozen=True, tag_field="status", tag="unavailable"):
    """Requests would fail."""

    reason: str


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one API process sees.

    Attributes:
        status: `degraded` while Redis is away: the process lives, and requests would fail.
        suspended: `rq suspend` is in force: requests are taken, and wait.
    """

    status: Literal["ok", "degraded"]
    redis: bool
    suspended: bool
    models: int
    workers: int
    free_slots: int
    running_requests: int


class Health:
    """See the module."""

    def __init__(self, directory: ModelDirectory, relay: Relay) -> None:
        self._directory = directory
        self._relay = relay

    async def on_get_live(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """This process runs."""
        resp.data = msgspec.json.encode(Alive())

    async def on_get_ready(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Redis answers, and at least one model has a worker."""
        if not (self._relay.is_connected and self._directory.is_fresh):
            self._not_ready(resp, "Redis does not answer")
        elif not self._directory.served:
            self._not_ready(resp, "no model has a live worker")
        else:
            resp.data = msgspec.json.encode(Alive())

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """This process runs, and what it sees."""
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
                running_requests=self._relay.num_subscriptions,
            )
        )

    on_head = on_get
    on_head_live = on_get_live
    on_head_ready = on_get_ready

    @staticmethod
    def _not_ready(resp: falcon.asgi.Response, reason: str) -> None:
        resp.status = falcon.HTTP_503
        resp.set_header("retry-after", "1")
        resp.data = msgspec.json.encode(Unready(reason))
