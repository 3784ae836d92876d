"""`POST` of every generating endpoint: body, parsing, checks, jobs, response. A protocol's front end supplies its part.

`api.app` makes one `Endpoint` for each path in `api.protocols`. Must not know any one protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

import falcon.asgi
import msgspec

from api.generation import delivery, overload
from api.generation.answer_store import AnswerStore, store_full
from api.generation.events.active_request import ActiveRequest
from api.generation.events.relay import Relay
from api.generation.front_end import FrontEnd
from api.generation.job_queue import JobQueue, QueueFullError, StoreFullError
from api.generation.model_directory import ModelDirectory
from api.generation.request import GenerationRequest, Retention, answer_record, check_size
from api.generation.served_model import ServedModel
from api.generation.stored_answer import owner_of
from api.http.body import parsed, read_json, report_ignored
from api.http.disconnect import CLIENT, Client
from api.http.headers import is_resumable, timeout_seconds
from common.errors import invalid
from common.protocol import GenerationJob
from common.settings import Settings


@dataclass(frozen=True)
class Services:
    """What all endpoints of a process share."""

    settings: Settings
    directory: ModelDirectory
    relay: Relay
    job_queue: JobQueue
    answers: AnswerStore


class Endpoint:
    """A falcon resource.

    Args:
        front_end: What is particular to its protocol.
    """

    def __init__(self, front_end: FrontEnd, services: Services) -> None:
        self._front_end = front_end
        self._services = services

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        front_end, services = self._front_end, self._services
        body = await read_json(req, services.settings)
        request = await parsed(body, front_end.parse)
        if front_end.complete is not None:
            request = await front_end.complete(request, services.answers, owner_of(req))
        report_ignored(req, resp, request.ignored, strict=services.settings.strict_parameters)
        request = _resumable(req, request, services.settings)
        model = await services.directory.resolve(request.model)
        if without_effect := request.without_effect(model):
            names = [*request.ignored, *without_effect]
            report_ignored(req, resp, names, strict=services.settings.strict_parameters)
        await front_end.check(request, model)
        jobs, active = await self._accept(req, request, model, len(body) + request.extra_bytes)
        # From the record and nothing else, as another process would render it.
        record, is_detached = answer_record(jobs[0]), jobs[0].is_detached
        if is_detached:
            resp.set_header("x-stream-id", jobs[0].job_id)
        if request.is_background and not request.stream and front_end.accepted is not None:
            resp.data = front_end.accepted(record)
            active.mark_accepted()
            return
        rendering = front_end.rendering(record)
        if request.stream:
            with_ids = True if is_detached else None
            await delivery.send_stream(resp, active, rendering, services.settings, with_ids=with_ids)
        else:
            await delivery.send_complete(resp, active, rendering)

    async def _accept(
        self, req: falcon.asgi.Request, request: GenerationRequest, model: ServedModel, num_bytes: int
    ) -> tuple[list[GenerationJob], ActiveRequest]:
        """As `_begin`; without storing the answer if the store is full and the client did not ask for it.

        Raises:
            RequestError: As `_begin`; 503, the store is full.
        """
        try:
            return await self._begin(req, request, model, num_bytes)
        except StoreFullError:
            if request.retention is None or not request.retention.is_optional:
                raise store_full() from None
        request = msgspec.structs.replace(request, retention=None)
        return await self._begin(req, request, model, num_bytes)

    async def _begin(
        self, req: falcon.asgi.Request, request: GenerationRequest, model: ServedModel, num_bytes: int
    ) -> tuple[list[GenerationJob], ActiveRequest]:
        """Subscribe, then submit.

        Args:
            num_bytes: The size of the request.

        Raises:
            StoreFullError: The store of answers is full; nothing was submitted.
            RequestError: 400, a header is wrong or the request is too large; 429, the queue is full; 503, Redis is
                unavailable.
        """
        services = self._services
        is_detached = request.retention is not None and request.retention.is_detached
        seconds: float | None = timeout_seconds(req, services.settings.request_seconds)
        check_size(request, num_bytes)
        if request.max_reasoning_tokens is None and services.settings.thinking_budget is not None:
            budget = services.settings.thinking_budget
            request = msgspec.structs.replace(request, max_reasoning_tokens=budget)
        jobs = request.jobs(
            self._front_end.name,
            model,
            services.relay.channel,
            [overload.estimated_tokens(request, prompt, model, num_bytes) for prompt in request.prompts],
            getattr(req.context, "api_key_name", None),
        )
        record = None
        if request.retention is not None:
            num_tokens = overload.estimated_answer_tokens(request, model)
            record = await services.answers.new_record(jobs, request.retention, owner_of(req), num_tokens)
        if is_detached and req.get_header("x-request-timeout") is None:
            seconds = None
        active = ActiveRequest(jobs, request.best_of, services.relay, services.job_queue, seconds)
        client: Client = req.scope[CLIENT]
        client.on_end(active.release)
        client.watch()
        try:
            await active.submit(num_bytes, record)
        except QueueFullError as full:
            raise overload.refusal(model, full.num_requests, is_tokens=full.is_tokens) from None
        return jobs, active


def _resumable(req: falcon.asgi.Request, request: GenerationRequest, settings: Settings) -> GenerationRequest:
    """The request as the header `X-Resumable` changes it.

    Raises:
        RequestError: 400, the header is wrong, or the request is not streamed.
    """
    if not is_resumable(req):
        return request
    retention = request.retention
    if not request.stream and (retention is None or not retention.is_detached):
        raise invalid(
            "The header X-Resumable needs `stream: true`: without a stream there is no id by which the client could come back.",
            "X-Resumable",
        )
    if retention is None:
        retention = Retention(ttl_seconds=settings.resumable_ttl_seconds, is_detached=True)
    else:
        ttl_seconds = max(retention.ttl_seconds, settings.resumable_ttl_seconds)
        retention = msgspec.structs.replace(
            retention, ttl_seconds=ttl_seconds, is_detached=True, is_optional=False
        )
    return msgspec.structs.replace(request, retention=retention)
