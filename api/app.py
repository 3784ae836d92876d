"""The application: stores, resources and routes put together; started and stopped with its process.

Called by `api.asgi` and by tests. What a request goes through is told in docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import falcon.asgi
import redis.asyncio

from api.auth import key_file
from api.auth.authentication import Authentication
from api.generation.command_batch import CommandBatch
from api.generation.generation import Generations
from api.generation.job_queue import JobQueue
from api.generation.model_directory import ModelDirectory
from api.generation.relay import Relay
from api.http import errors
from api.http.disconnect import App, with_disconnects
from api.http.headers import Connections, CrossOrigin, KnownMethods, RequestIds
from api.http.health import Health
from api.openai.chat.resource import ChatCompletions
from api.openai.completions.resource import Completions
from api.openai.models import Model, Models
from api.openai.openapi import PATH as DESCRIPTION_PATH
from api.openai.openapi import Description
from common import connections
from common.settings import Settings

log = logging.getLogger(__name__)


LAST_FRAMES_SECONDS = 0.1
"""What handlers get to write their streams' last frames when the process ends."""


class Lifespan:
    """What runs beside requests, as long as the process does."""

    def __init__(
        self, client: redis.asyncio.Redis, directory: ModelDirectory, relay: Relay, job_queue: JobQueue
    ) -> None:
        self._client = client
        self._directory = directory
        self._relay = relay
        self._job_queue = job_queue

    async def process_startup(self, _scope: dict[str, Any], _event: dict[str, Any]) -> None:
        await self._directory.start()
        await self._relay.start()
        if not self._relay.is_connected:
            log.warning("started without Redis; requests are answered 503 until it is there")

    async def process_shutdown(self, _scope: dict[str, Any], _event: dict[str, Any]) -> None:
        self._relay.end_all()
        await asyncio.sleep(LAST_FRAMES_SECONDS)
        await self._job_queue.close()
        await self._directory.stop()
        await self._relay.stop()
        await self._client.aclose()


def create_app(settings: Settings) -> App:
    """The ASGI application.

    Raises:
        StartupError: The settings name no Redis, or a key file that cannot be read.
    """
    client = connections.connect_async(settings.redis_url)
    reads = CommandBatch(client, transaction=False)
    directory = ModelDirectory(reads, settings.default_model)
    relay = Relay(
        client, reads, max_events=settings.stream_buffer_events, queue_seconds=settings.queue_seconds
    )
    job_queue = JobQueue(settings, CommandBatch(client, transaction=True))
    generations = Generations(settings, relay, job_queue)
    middleware: list[Any] = [
        Lifespan(client, directory, relay, job_queue),
        RequestIds(),
        Connections(),
        KnownMethods(),
        CrossOrigin(settings.cors_origins),
    ]
    if settings.api_keys_file is not None:
        middleware.append(Authentication(key_file.opened(Path(settings.api_keys_file).expanduser())))
    app: falcon.asgi.App[Any, Any] = falcon.asgi.App(media_type=falcon.MEDIA_JSON, middleware=middleware)
    errors.install(app)
    health = Health(directory, relay)
    app.add_route("/livez", health, suffix="live")
    app.add_route("/readyz", health, suffix="ready")
    app.add_route("/health", health)
    app.add_route(DESCRIPTION_PATH, Description(settings))
    for prefix in ("/v1", ""):
        app.add_route(f"{prefix}/chat/completions", ChatCompletions(settings, directory, generations))
        app.add_route(f"{prefix}/completions", Completions(settings, directory, generations))
        app.add_route(f"{prefix}/models", Models(directory))
        app.add_route(f"{prefix}/models/{{model_id:path}}", Model(directory))
    return with_disconnects(app)
