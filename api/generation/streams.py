"""`GET /v1/streams/{id}`: continues a resumable stream after the frame that the client saw last, whichever process began it.

The answer is rendered again from its journals' start, and the frames that the client has are skipped, so what it gets is byte
for byte what it missed. A falcon resource, made by `api.app`. Must not know any one protocol.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import falcon.asgi

from api.generation import delivery
from api.generation.front_end import FrontEnd
from api.generation.stored_answer import AnswerLookup, owner_of
from api.http.disconnect import CLIENT, Client
from common.errors import RequestError, invalid
from common.settings import Settings

_NUMBER = re.compile(r"[0-9]{1,9}")


class Streams:
    """See the module.

    Args:
        front_ends: Those that render streams.
    """

    def __init__(self, front_ends: Iterable[FrontEnd], answers: AnswerLookup, settings: Settings) -> None:
        self._front_ends = {front_end.name: front_end for front_end in front_ends}
        self._answers = answers
        self._settings = settings

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, stream_id: str) -> None:
        answer = await self._answers.load(stream_id, owner_of(req))
        skip = frames_to_skip(req, stream_id)
        front_end = self._front_ends.get(answer.record.front_end)
        if not answer.retention.is_detached or not answer.record.stream or front_end is None:
            raise RequestError(
                f"The answer `{stream_id}` is not a resumable stream.", status=404, code="not_resumable"
            )
        source = self._answers.follow(answer)
        client: Client = req.scope[CLIENT]
        client.on_end(source.release)
        client.watch()
        rendering = front_end.rendering(answer.record)
        resp.set_header("x-stream-id", stream_id)
        await delivery.send_stream(resp, source, rendering, self._settings, skip=skip, with_ids=True)


def frames_to_skip(req: falcon.asgi.Request, stream_id: str) -> int:
    """The number of frames that the client has, by the header `Last-Event-ID` or the query `starting_after`, each the last one's.

    Raises:
        RequestError: 400, it is malformed, or the header is of another stream.
    """
    last_id = req.get_header("last-event-id")
    if last_id:
        of_stream, _, number = last_id.rpartition(":")
        if not _NUMBER.fullmatch(number) or not of_stream:
            raise invalid(
                f"The header Last-Event-ID must be the `id` of a frame, such as 0123abcd:17, not '{last_id[:120]}'.",
                "Last-Event-ID",
            )
        if of_stream != stream_id:
            raise invalid("The header Last-Event-ID is of another stream.", "Last-Event-ID")
        return int(number) + 1
    number = req.get_param("starting_after", default="")
    if not number:
        return 0
    if not _NUMBER.fullmatch(number):
        raise invalid(
            f"`starting_after` must be the number of a frame, from 0, not '{number[:40]}'.", "starting_after"
        )
    return int(number) + 1
