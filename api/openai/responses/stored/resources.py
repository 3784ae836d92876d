"""The falcon resources of stored responses: read, stream again, delete, cancel, and their input items.

Made by `api.app`. https://platform.openai.com/docs/api-reference/responses/get
"""

from __future__ import annotations

import falcon
import falcon.asgi
import msgspec

from api.generation import delivery
from api.generation.stored_answer import AnswerLookup, StoredAnswer, owner_of
from api.generation.streams import frames_to_skip
from api.http.disconnect import CLIENT, Client
from api.openai.responses.rendering import ResponseRendering
from api.openai.responses.request import THOUGHTS
from api.openai.responses.stored import lookup, pages
from common.errors import invalid
from common.settings import Settings


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of a response."""

    id: str
    object: str = "response"
    deleted: bool = True


class StoredResponse:
    """`GET` and `DELETE /v1/responses/{id}`."""

    def __init__(self, answers: AnswerLookup, settings: Settings) -> None:
        self._answers = answers
        self._settings = settings

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, response_id: str) -> None:
        with_stream = _flag(req, "stream")
        answer = await lookup.load(self._answers, owner_of(req), response_id)
        if with_stream:
            await self._send_stream(req, resp, answer)
            return
        if req.get_param("starting_after") is not None:
            raise invalid("`starting_after` is only allowed with `stream=true`.", "starting_after")
        state = await self._answers.state(answer)
        resp.data = lookup.body(answer, state, with_thoughts=THOUGHTS in _includes(req))

    async def _send_stream(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, answer: StoredAnswer
    ) -> None:
        """The events after the number `starting_after`, or after the frame `Last-Event-ID`: each frame is one event, so they are numbered alike."""
        skip = frames_to_skip(req, answer.id)
        if not answer.retention.is_detached and not (await self._answers.state(answer)).is_ended:
            raise invalid(
                "Only a response with `background: true` can be streamed while it is generated.", "stream"
            )
        source = self._answers.follow(answer)
        client: Client = req.scope[CLIENT]
        client.on_end(source.release)
        client.watch()
        rendering = ResponseRendering(answer.record)
        await delivery.send_stream(
            resp, source, rendering, self._settings, skip=skip, with_ids=True, is_new=False
        )

    async def on_delete(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, response_id: str) -> None:
        answer = await lookup.load(self._answers, owner_of(req), response_id)
        await self._answers.delete(answer)
        resp.data = msgspec.json.encode(DeletedResponse(id=response_id))


class ResponseCancellation:
    """`POST /v1/responses/{id}/cancel`; may be repeated."""

    def __init__(self, answers: AnswerLookup) -> None:
        self._answers = answers

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, response_id: str) -> None:
        answer = await lookup.load(self._answers, owner_of(req), response_id)
        if not lookup.is_background(answer):
            raise invalid("Only a response with `background: true` can be cancelled.", "response_id")
        state = await self._answers.state(answer)
        if not state.is_ended:
            await self._answers.cancel(answer)
            state = await self._answers.state(answer)
        resp.data = lookup.body(answer, state)


class InputItems:
    """`GET /v1/responses/{id}/input_items`."""

    def __init__(self, answers: AnswerLookup) -> None:
        self._answers = answers

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, response_id: str) -> None:
        limit = _limit(req)
        order = req.get_param("order", default="desc")
        if order not in ("asc", "desc"):
            raise invalid("`order` must be `asc` or `desc`.", "order")
        answer = await lookup.load(self._answers, owner_of(req), response_id)
        listed = pages.page(
            lookup.input_items(answer),
            limit=limit,
            is_descending=order == "desc",
            after=req.get_param("after"),
        )
        resp.data = msgspec.json.encode(listed)


def _flag(req: falcon.asgi.Request, name: str) -> bool:
    given = req.get_param(name, default="false").lower()
    if given not in ("true", "false"):
        raise invalid(f"`{name}` must be `true` or `false`.", name)
    return given == "true"


def _limit(req: falcon.asgi.Request) -> int:
    given = req.get_param("limit", default=str(pages.DEFAULT_LIMIT))
    limit = (
        int(given) if given.isascii() and given.isdigit() and len(given) <= len(str(pages.MAX_LIMIT)) else 0
    )
    if not 1 <= limit <= pages.MAX_LIMIT:
        raise invalid(f"`limit` must be a number from 1 to {pages.MAX_LIMIT}.", "limit")
    return limit


def _includes(req: falcon.asgi.Request) -> list[str]:
    """OpenAI's SDKs write lists as ``include[]=a&include[]=b``."""
    return [*(req.get_param_as_list("include[]") or []), *(req.get_param_as_list("include") or [])]
