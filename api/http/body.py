"""A request's body: its media type and size, and the report of its unknown fields.

Used by the endpoint. Must not know what a body contains.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import TypeVar

import falcon.asgi

from api.http.disconnect import CLIENT, Client
from common.errors import RequestError, invalid
from common.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

_LARGE_BYTES = 32 * 1024
_STRICT = b'"strict"'
"""Schemas of strict functions are compiled while parsing, to find those that cannot be."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


async def read_json(req: falcon.asgi.Request, settings: Settings) -> bytes:
    """The body of a request whose content type is JSON, or missing.

    Raises:
        RequestError: 415, its content type or encoding is another one; 413 and 408 as `Client.read_body`.
    """
    coding = (req.get_header("content-encoding") or "identity").strip().lower()
    if coding != "identity":
        raise RequestError(
            f"The content encoding `{coding[:64]}` is not supported; send the body uncompressed.",
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


async def parsed(body: bytes, parse: Callable[[bytes], T]) -> T:
    """The parsed body; one that takes long to parse is parsed in a thread.

    Raises:
        RequestError: As `parse`.
    """
    if len(body) > _LARGE_BYTES or _STRICT in body:
        return await asyncio.to_thread(parse, body)
    return parse(body)


def report_ignored(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, names: list[str], *, strict: bool
) -> None:
    """Report unknown fields, in a response header and in the log.

    Raises:
        RequestError: 400, if `strict`.
    """
    if not names:
        return
    if strict:
        raise invalid(f"Unknown parameter: `{names[0][:64]}`.", names[0][:64], "unknown_parameter")
    listed = ", ".join(_UNSAFE.sub("?", name[:64]) for name in names)
    resp.set_header("x-ignored-parameters", listed)
    log.info("request %s: ignored the unknown parameters %s", req.context.request_id, listed)
