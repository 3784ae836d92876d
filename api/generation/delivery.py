"""A request's events as an HTTP response, streamed or complete, by whatever rendering its protocol has.

Called by the endpoint. The headers of a stream go out with the first event, so that a request that fails at once, such as
one with too long a prompt, is still answered with a status and an error body.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import falcon
import falcon.asgi

from api.generation.front_end import AnswerEvent, ChoiceEvents, Rendering
from api.generation.stored_answer import EventSource
from api.http import errors, sse
from common.errors import RequestError
from common.protocol import Failed
from common.settings import Settings

log = logging.getLogger(__name__)


async def send_complete(resp: falcon.asgi.Response, request: EventSource, rendering: Rendering) -> None:
    """Answer with one JSON object.

    Raises:
        RequestError: The request failed.
    """
    while not request.is_done:
        for index, events in await request.take():
            rendering.add(index, _shown(events))
    resp.data = rendering.body(request.finished())
    resp.status = falcon.HTTP_200


async def send_stream(
    resp: falcon.asgi.Response,
    request: EventSource,
    rendering: Rendering,
    settings: Settings,
    *,
    skip: int = 0,
    with_ids: bool | None = None,
    is_new: bool = True,
) -> None:
    """Answer with a stream, which falcon reads once this has returned.

    Args:
        skip: The number of frames that the client has already.
        with_ids: Whether frames have ids; None: as the settings say.
        is_new: Whether the answer is that of this request: if it fails before its first event, it has a status of its own. The
            stream of an earlier request's answer ends with an error frame.

    Raises:
        RequestError: The request failed without any event of its answer, and the client has nothing of it.
    """
    first = await _first_events(request, settings.sse_header_seconds)
    if request.is_done and is_new and not skip and not any(_shown(events) for _, events in first):
        request.finished()  # raises if it has failed
    if with_ids is None:
        with_ids = settings.sse_ids
    number = sse.FrameNumbers(request.job_id, skip).number if with_ids else _unnumbered
    resp.status = falcon.HTTP_200
    resp.content_type = "text/event-stream; charset=utf-8"
    resp.set_header("cache-control", "no-cache")
    resp.set_header("x-accel-buffering", "no")
    # Not `resp.sse`: falcon 4.4 would watch for a disconnect with a task of its own, and serialize what is bytes already.
    # An event that a client which comes back has already would confuse it; a comment does not.
    first_bytes = sse.KEEP_ALIVE if skip else None
    keep_alive_seconds = settings.sse_comment_seconds
    resp.stream = _frames(first, request, rendering, number, keep_alive_seconds, first_bytes=first_bytes)


def _unnumbered(frames: bytes) -> bytes:
    return frames


async def _first_events(request: EventSource, header_seconds: float) -> ChoiceEvents:
    """The first events; none if they do not come in time, when the headers have to go out."""
    try:
        async with asyncio.timeout(header_seconds):
            while not (taken := await request.take()):
                pass
    except TimeoutError:
        return []
    return taken


async def _frames(
    taken: ChoiceEvents,
    request: EventSource,
    rendering: Rendering,
    number: Callable[[bytes], bytes],
    keep_alive_seconds: float,
    *,
    first_bytes: bytes | None,
) -> AsyncIterator[bytes]:
    """The stream's bytes. A stream that fails ends with an error frame, it never just stops.

    What is part of the answer is numbered: everything but keep-alives, and errors of this process.
    """
    try:
        frames = number(rendering.opening() + _rendered(taken, rendering))
        # Always some bytes, since the headers go out with them.
        yield frames or first_bytes or rendering.keep_alive()
        sent_mono = time.monotonic()
        while not request.is_done:
            frames = number(_rendered(await request.take(), rendering))
            if not frames and time.monotonic() - sent_mono >= keep_alive_seconds:
                frames = rendering.keep_alive()
            if frames:
                yield frames
                sent_mono = time.monotonic()
        if frames := number(rendering.closing(request.finished())):
            yield frames
    except RequestError as error:
        frames = rendering.error(errors.masked_error(error))
        # An error of this process is not part of the answer, so it has no number.
        if frames := frames if request.is_aborted else number(frames):
            yield frames
    except Exception:
        log.exception("job %s: its stream failed", request.job_id)
        yield rendering.error(errors.internal())


def _rendered(taken: ChoiceEvents, rendering: Rendering) -> bytes:
    if len(taken) == 1:  # the usual case, once for each token
        [(index, events)] = taken
        return rendering.frames(index, _shown(events))
    return b"".join(rendering.frames(index, _shown(events)) for index, events in taken)


def _shown(events: list[AnswerEvent | Failed]) -> list[AnswerEvent]:
    """Without a last event that says that the answer is not complete: the error comes after what was generated."""
    if events and isinstance(events[-1], Failed):
        events = events[:-1]
    return events  # type: ignore[return-value]
