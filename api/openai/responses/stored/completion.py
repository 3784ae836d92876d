"""Completes a request with what it refers to in the store, and says how its own response is stored.

The second step of parsing, for every request: `api.generation.endpoint` calls `complete`.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec

from api.generation.request import GenerationRequest, Retention
from api.generation.stored_answer import AnswerLookup
from api.openai.responses import names
from api.openai.responses.history.conversation import Item, kind_of
from api.openai.responses.request import ResponseRequest, build
from api.openai.responses.stored import lookup
from api.openai.responses.typed import Ignored, missing
from common.errors import RequestError, invalid

_MANY_ITEMS = 50
"""More are converted in a thread."""

_CONFLICT, _TOO_LARGE = 409, 413


async def complete(request: GenerationRequest, answers: AnswerLookup, owner: str) -> GenerationRequest:
    """The request with the conversation before it, and with its retention.

    Raises:
        RequestError: 404, a response or an item does not exist, or belongs to another key; 409, the response is still being
            generated; 413, all of it is too large; 400, it failed, or what the items are together is wrong.
    """
    asked, num_bytes = cast("ResponseRequest", request), 0
    if not asked.is_complete:
        asked, num_bytes = await _with_references(asked, answers, owner)
    given = asked.given
    if given.store is False:
        return msgspec.structs.replace(asked, extra_bytes=num_bytes)
    retention = Retention(
        ttl_seconds=answers.response_ttl_seconds,
        is_detached=bool(given.background),
        # Stored by default, as in OpenAI's API: a client that does not ask for it is served even if the store is full.
        is_optional=given.store is None and not given.background and given.previous_response_id is None,
        details=lookup.details_of(asked.earlier + asked.items),
    )
    return msgspec.structs.replace(asked, retention=retention, extra_bytes=num_bytes)


async def _with_references(
    asked: ResponseRequest, answers: AnswerLookup, owner: str
) -> tuple[ResponseRequest, int]:
    """The request with what it refers to, and the size of that."""
    given, earlier = asked.given, []
    own_bytes = await asyncio.to_thread(_num_bytes, asked.items)
    size = _Size(answers.max_conversation_bytes - own_bytes)
    if given.previous_response_id is not None:
        earlier = await _conversation(answers, owner, given.previous_response_id)
        size.add(await asyncio.to_thread(_num_bytes, earlier), "previous_response_id")
    items = await _resolved(asked.items, earlier, answers, owner, size)
    ignored = Ignored(asked.ignored)
    if len(items) + len(earlier) > _MANY_ITEMS or given.tools:
        return await asyncio.to_thread(build, given, items, ignored, earlier), size.num_bytes
    return build(given, items, ignored, earlier), size.num_bytes


_NOT_CONTINUED = {"failed": "it has failed", "cancelled": "it was cancelled"}
"""Why a response with this status cannot be continued."""


class _Size:
    """The bytes that a request takes from the store. A chain of responses, and references to one item, could be any number.

    Args:
        max_bytes: What its own items leave.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes

    def add(self, num_bytes: int, param: str) -> None:
        """Count more bytes.

        Args:
            param: The field that refers to them.

        Raises:
            RequestError: 413, they are more than is allowed.
        """
        self.num_bytes += num_bytes
        if self.num_bytes > self._max_bytes:
            raise RequestError(
                "The request is too large together with the stored responses and items that it refers to.",
                status=_TOO_LARGE,
                param=param,
                code="request_too_large",
            )


def _num_bytes(value: list[Item] | Item) -> int:
    return len(msgspec.json.encode(value))


async def _conversation(answers: AnswerLookup, owner: str, response_id: str) -> list[Item]:
    """The items and the output of a response that a request continues."""
    param = "previous_response_id"
    try:
        answer = await lookup.load(answers, owner, response_id)
    except RequestError as error:
        if error.code != "not_found":
            raise
        raise RequestError(
            f"Previous response with id '{response_id[:80]}' not found.",
            status=404,
            param=param,
            code="previous_response_not_found",
        ) from None
    state = await answers.state(answer)
    if not state.is_ended:
        raise RequestError(
            f"The response '{response_id[:80]}' is still being generated.",
            status=_CONFLICT,
            param=param,
            code="previous_response_in_progress",
            retry_after_seconds=1.0,
        )
    if (reason := _NOT_CONTINUED.get(state.status)) is not None:
        raise invalid(
            f"The response '{response_id[:80]}' cannot be continued: {reason}.",
            param,
            "previous_response_not_complete",
        )
    return lookup.input_items(answer) + lookup.output_items(answer, state)


async def _resolved(
    items: list[Item], earlier: list[Item], answers: AnswerLookup, owner: str, size: _Size
) -> list[Item]:
    """The items with each reference replaced by the item that it names."""
    known: dict[Any, Item] = {item.get("id"): item for item in earlier}
    sizes: dict[str, int] = {}
    resolved = []
    for i, item in enumerate(items):
        path = f"input[{i}]"
        if kind_of(item, path) != "item_reference":
            resolved.append(item)
            continue
        item_id = item.get("id")
        if not isinstance(item_id, str):
            raise missing(f"{path}.id", "it is the id of a stored item")
        if item_id not in known:
            known |= await _items_of(item_id, f"{path}.id", answers, owner)
        if item_id not in sizes:
            sizes[item_id] = _num_bytes(known[item_id])
        size.add(sizes[item_id], f"{path}.id")
        resolved.append(known[item_id])
    return resolved


async def _items_of(item_id: str, path: str, answers: AnswerLookup, owner: str) -> dict[str, Item]:
    """All items of the response that an item belongs to, by id."""
    absent = RequestError(
        f"Item with id '{item_id[:80]}' not found. Items are not kept if `store` is false.",
        status=404,
        param=path,
        code="item_not_found",
    )
    job_id = names.job_of_item(item_id)
    if job_id is None:
        raise absent
    try:
        answer = await lookup.load(answers, owner, names.response_id(job_id))
    except RequestError as error:
        if error.code != "not_found":
            raise
        raise absent from None
    items = lookup.input_items(answer) + lookup.output_items(answer, await answers.state(answer))
    found = {item["id"]: item for item in items}
    if item_id not in found:
        raise absent
    return found
