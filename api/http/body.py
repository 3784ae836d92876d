"""A request's body: of the right type and size, and what is said of fields in it that nobody knows."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable

import falcon.asgi

from api.generation.request import GenerationRequest
from api.http.disconnect import CLIENT, Client
from common.errors import RequestError, invalid
from common.settings import Settings

log = logging.getLogger(__name__)

_LARGE_BYTES = 32 * 1024
_STRICT = b'"strict"'
"""Schemas of strict functions are compiled, to see whether they can be."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


async def read_json(req: falcon.asgi.Request, settings: Settings) -> bytes:
    """The body of a request that says it is JSON, or says nothing of it.

    Raises:
        RequestError: 415, it says that it is something else, or compressed; 413 and 408 as `Client.read_body`.
    """
    coding = (req.get_header("content-encoding") or "identity").strip().lower()
    if coding != "identity":
        raise RequestError(
            f"The content encoding `{coding[:64]}` is not supported; send the body as it is.",
            status=415,
            code="unsupported_media_type",
        )
    media_type = (req.content_type or "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise RequestError(
            f"The content type `{media_type}` is not supported; send `application/json`.",
            status=415,
            code="unsupported_media_type",
        )
    client: Client = req.scope[CLIENT]
    return await client.read_body(settings.max_body_bytes, settings.body_seconds)


async def parsed(body: bytes, parse: Callable[[bytes], GenerationRequest]) -> GenerationRequest:
    """The request; one that takes a while to read is read beside the event loop.

    Raises:
        RequestError: As `parse`.
    """
    if len(body) > _LARGE_BYTES or _STRICT in body:
        return await asyncio.to_thread(parse, body)
    return parse(body)


def report_ignored(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, names: list[str], *, strict: bool
) -> None:
    """Say which fields nobody knows, in a header and in the log.

    Raises:
        RequestError: 400 where `strict`.
    """
    if not names:
        return
    if strict:
        raise invalid(f"Unknown parameter: `{names[0][:64]}`.", names[0][:64], "unknown_parameter")
    listed = ", ".join(_UNSAFE.sub("?", name[:64]) for name in names)
    resp.set_header("x-ignored-parameters", listed)
    log.info("request %s: ignored %s", req.context.request_id, listed)
