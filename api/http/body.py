"""The request body: checks of its type, parsing off the event loop, and the report of ignored parameters.

Called by the endpoints. Limits of size and time are enforced by `api.http.disconnect.Client`. Independent of protocols.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import TypeVar

import falcon.asgi

from api.http.disconnect import CLIENT, Client
from api.http.unknown_keys import MAX_NAME_CHARACTERS, UnknownKey
from common.errors import RequestError, invalid
from common.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

_LARGE_BYTES = 32 * 1024
_STRICT_FIELD = b'"strict"'
"""Parsing compiles the schemas of strict functions, which takes long."""

_UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9_.\[\]-]")


async def read_json(req: falcon.asgi.Request, settings: Settings) -> bytes:
    """The body of a request whose content type is JSON or missing.

    Raises:
        RequestError: 415 for another content type or a compressed body; 413 and 408 as `Client.read_body`.
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
    """The parsed body; one that takes long to parse is parsed in a thread, not on the event loop.

    Raises:
        RequestError: As `parse`.
    """
    if len(body) > _LARGE_BYTES or _STRICT_FIELD in body:
        return await asyncio.to_thread(parse, body)
    return parse(body)


def report_ignored(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, names: list[str], *, strict: bool
) -> None:
    """Name the ignored parameters in a response header and in the log.

    Args:
        names: Paths of unknown keys (`UnknownKey`), and of parameters that have no effect here.

    Raises:
        RequestError: 400 if `strict`.
    """
    if not names:
        return
    if strict:
        name = names[0][:MAX_NAME_CHARACTERS]
        is_unknown = isinstance(names[0], UnknownKey)
        message = f"Unknown parameter: `{name}`." if is_unknown else f"`{name}` has no effect here."
        raise invalid(message, name, "unknown_parameter")
    listed = ", ".join(_UNSAFE_CHARACTERS.sub("?", name[:MAX_NAME_CHARACTERS]) for name in names)
    resp.set_header("x-ignored-parameters", listed)
    log.info("request %s: ignored the parameters %s", req.context.request_id, listed)
