"""Stored responses as conversations: their items, their output, and their body as the API shows it.

Used by `completion` and by the resources. An answer in the store that is not a response does not exist here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from api.generation.request import AnswerRecord
from api.generation.stored_answer import AnswerLookup, AnswerState, StoredAnswer
from api.openai.responses import names
from api.openai.responses.history.conversation import Item, kind_of
from api.openai.responses.options import ResponseOptions
from api.openai.responses.rendering import ResponseRendering
from common.errors import RequestError
from common.protocol import Failed

FRONT_END = "openai.responses"

_ITEMS = "items"

_CANCELLED = RequestError("The response was cancelled.", status=503, code="cancelled")


def details_of(items: list[Item]) -> dict[str, Any]:
    """What the store keeps with an answer (`Retention.details`): the items that it was generated from."""
    return {_ITEMS: items}


async def load(answers: AnswerLookup, owner: str, response_id: str) -> StoredAnswer:
    """The stored answer of a response.

    Raises:
        RequestError: 404, there is none with this id, or it is another key's.
    """
    job_id = names.job_of_response(response_id)
    if job_id is None:
        raise not_found(response_id)
    try:
        answer = await answers.load(job_id, owner)
    except RequestError as error:
        if error.code != "not_found":
            raise
        raise not_found(response_id) from None
    if answer.record.front_end != FRONT_END or answer.retention.details is None:
        raise not_found(response_id)
    return answer


def not_found(response_id: str) -> RequestError:
    """OpenAI's 404."""
    return RequestError(
        f"Response with id '{response_id[:80]}' not found. It may have expired, or belong to another API key.",
        status=404,
        param="response_id",
        code="not_found",
    )


def is_background(answer: StoredAnswer) -> bool:
    """Whether the request said `background: true`."""
    return msgspec.convert(answer.record.options, ResponseOptions).is_background


def input_items(answer: StoredAnswer) -> list[Item]:
    """The items that a response was generated from, each with an id."""
    details: Mapping[str, Any] = answer.retention.details or {}
    return [
        item
        if isinstance(item.get("id"), str) and item["id"]
        else item | {"id": names.input_id(answer.id, kind_of(item, ""), i)}
        for i, item in enumerate(details.get(_ITEMS, []))
    ]


def output_items(answer: StoredAnswer, state: AnswerState) -> list[Item]:
    """The output so far."""
    rendering = _rendering(answer.record, state)
    return rendering.output_items()


def body(answer: StoredAnswer, state: AnswerState, *, with_thoughts: bool = False) -> bytes:
    """A response as it stands.

    Args:
        with_thoughts: Whether the client asks for `reasoning.encrypted_content`, whatever the request said.
    """
    record = answer.record
    if with_thoughts:
        record = msgspec.structs.replace(record, options=record.options | {"is_encoded": True})
    rendering = _rendering(record, state)
    match state.status:
        case "queued" | "in_progress":
            return rendering.unfinished_body(state.status)
        case "failed":
            assert state.error is not None
            return rendering.failed_body(state.error)
        case "cancelled":
            return rendering.failed_body(_CANCELLED)
        case _:
            return rendering.body(state.finished)


def _rendering(record: AnswerRecord, state: AnswerState) -> ResponseRendering:
    rendering = ResponseRendering(record)
    events = [event for event in state.choices[0] if not isinstance(event, Failed)]
    rendering.add(0, events)
    return rendering
