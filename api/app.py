"""The ASGI application: wires stores, middleware, resources and routes, and starts and stops the background tasks.

Called by `api.asgi` and by tests. docs/architecture.md describes the path of a request.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import falcon.asgi
import redis.asyncio

from api.about import PATHS as ABOUT_PATHS
from api.about import Root
from api.anthropic.count_tokens import CountTokens
from api.auth import key_file
from api.auth.authentication import Authentication
from api.generation.answer_store import AnswerStore
from api.generation.command_batch import CommandBatch
from api.generation.endpoint import Endpoint, Services
from api.generation.events.relay import Relay
from api.generation.job_queue import JobQueue
from api.generation.model_directory import ModelDirectory
from api.generation.streams import Streams
from api.health import Health
from api.http.disconnect import App, with_disconnects
from api.http.errors import ErrorHandlers
from api.http.headers import ConnectionClose, RequestIds
from api.http.hosts import HostCheck, Hosts
from api.http.methods import UnknownMethods
from api.http.open_paths import HEALTH_PATHS, LIVE_PATH, READY_PATH, REPORT_PATH
from api.http.origins import CrossOrigin, Origins
from api.http.paths import NormalizedPaths, NotFound, NotServed
from api.model_resources import Model, Models
from api.openai.responses.stored.input_tokens import InputTokens
from api.openai.responses.stored.resources import InputItems, ResponseCancellation, StoredResponse
from api.openai.tokenize.resources import Detokenize, Tokenize
from api.openapi.document import Description
from api.openapi.paths import PATH as DESCRIPTION_PATH
from api.protocols import ERROR_FORMATS, FRONT_ENDS, MESSAGES_PATH, RESPONSES_PATH
from api.tokenizing.client import TokenizeClient
from common import connections
from common.models import model_aliases
from common.settings import Settings

log = logging.getLogger(__name__)


ENDPOINTS = (
    *(f"POST /v1{path}" for path in FRONT_ENDS),
    f"POST /v1{MESSAGES_PATH}/count_tokens",
    "POST /v1/tokenize",
    "POST /v1/detokenize",
    "GET /v1/models",
    "GET /v1/streams/{id}",
    f"GET {DESCRIPTION_PATH}",
    *(f"GET {path}" for path in HEALTH_PATHS),
)
"""For clients that ask for another one."""

FINAL_FRAMES_SECONDS = 0.1
"""Time for handlers to write the final frames of their streams at shutdown."""


class Lifespan:
    """Starts and stops the background tasks of a process (ASGI lifespan)."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        directory: ModelDirectory,
        relay: Relay,
        job_queue: JobQueue,
        tokenizing: TokenizeClient,
    ) -> None:
        self._client = client
        self._directory = directory
        self._relay = relay
        self._job_queue = job_queue
        self._tokenizing = tokenizing

    async def process_startup(self, _scope: dict[str, Any], _event: dict[str, Any]) -> None:
        await self._directory.start()
        await self._relay.start()
        if not self._relay.is_connected:
            log.warning("started without Redis; requests are answered 503 until it can be reached")

    async def process_shutdown(self, _scope: dict[str, Any], _event: dict[str, Any]) -> None:
        self._relay.end_all()
        await asyncio.sleep(FINAL_FRAMES_SECONDS)
        await self._job_queue.close()
        await self._tokenizing.stop()
        await self._directory.stop()
        await self._relay.stop()
        await self._client.aclose()


def create_app(settings: Settings) -> App:
    """The ASGI application.

    Raises:
        StartupError: The Redis URL, the origins or the aliases are malformed, or the key file cannot be read.
    """
    client = connections.connect_async(settings.redis_url)
    reads = CommandBatch(client, transaction=False)
    directory = ModelDirectory(reads, settings.default_model, model_aliases.parse(settings.model_aliases))
    relay = Relay(
        client, reads, max_events=settings.stream_buffer_events, queue_seconds=settings.queue_seconds
    )
    writes = CommandBatch(client, transaction=True)
    job_queue = JobQueue(settings, writes)
    answers = AnswerStore(settings, reads, writes, job_queue, relay)
    services = Services(settings, directory, relay, job_queue, answers)
    tokenizing = TokenizeClient(client, reads)
    middleware: list[Any] = [
        NormalizedPaths(),
        Lifespan(client, directory, relay, job_queue, tokenizing),
        RequestIds(),
        ConnectionClose(),
        UnknownMethods(),
    ]
    origins = Origins.from_settings(settings)
    if settings.api_keys_file is None:
        middleware += [HostCheck(Hosts(settings.host, origins)), CrossOrigin(origins)]
    else:
        key_path = Path(settings.api_keys_file).expanduser()
        middleware += [CrossOrigin(origins), Authentication(key_file.opened(key_path))]
    app: falcon.asgi.App[Any, Any] = falcon.asgi.App(media_type=falcon.MEDIA_JSON, middleware=middleware)
    ErrorHandlers(ERROR_FORMATS, NotFound(ENDPOINTS)).install(app)
    health = Health(directory, relay)
    app.add_route(LIVE_PATH, health, suffix="live")
    app.add_route(READY_PATH, health, suffix="ready")
    app.add_route(REPORT_PATH, health)
    app.add_route(DESCRIPTION_PATH, Description(settings))
    for path in ABOUT_PATHS:
        app.add_route(path, Root(ENDPOINTS, DESCRIPTION_PATH))
    streams = Streams(FRONT_ENDS.values(), answers, settings)
    for prefix in ("/v1", ""):
        for path, front_end in FRONT_ENDS.items():
            app.add_route(prefix + path, Endpoint(front_end, services))
        app.add_route(f"{prefix}/streams/{{stream_id}}", streams)
        app.add_route(f"{prefix}/tokenize", Tokenize(directory, tokenizing, settings))
        app.add_route(f"{prefix}/detokenize", Detokenize(directory, tokenizing, settings))
        app.add_route(f"{prefix}{MESSAGES_PATH}/count_tokens", CountTokens(directory, tokenizing, settings))
        responses = prefix + RESPONSES_PATH
        app.add_route(f"{responses}/input_tokens", InputTokens(directory, tokenizing, answers, settings))
        app.add_route(f"{responses}/compact", NotServed())
        app.add_route(f"{responses}/{{response_id}}", StoredResponse(answers, settings))
        app.add_route(f"{responses}/{{response_id}}/cancel", ResponseCancellation(answers))
        app.add_route(f"{responses}/{{response_id}}/input_items", InputItems(answers))
        app.add_route(f"{prefix}/models", Models(directory))
        app.add_route(f"{prefix}/models/{{model_id:path}}", Model(directory))
    return with_disconnects(app)
