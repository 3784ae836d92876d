"""The items of a response as a list with pages, in the form of OpenAI's.

https://platform.openai.com/docs/api-reference/responses/input-items. Used by the resource.
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.openai.responses.history.conversation import Item, kind_of
from common.errors import invalid

MAX_LIMIT, DEFAULT_LIMIT = 100, 20


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of items; `first_id` and `last_id` are null if it is empty."""

    object: str = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(items: list[Item], *, limit: int, is_descending: bool, after: str | None) -> ItemList:
    """A page of a response's items, each of which has an id.

    Raises:
        RequestError: 400, there is no item with the id `after`.
    """
    listed = [_complete(item) for item in items]
    if is_descending:
        listed.reverse()
    start = 0
    if after is not None:
        ids = [item["id"] for item in listed]
        if after not in ids:
            raise invalid(
                f"`after` is '{after[:80]}', which is not the id of an item of this response.", "after"
            )
        start = ids.index(after) + 1
    data = listed[start : start + limit]
    return ItemList(
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=start + limit < len(listed),
    )


def _complete(item: Item) -> Item:
    """An item with the fields that clients may leave out."""
    kind = kind_of(item, "")
    if kind != "message":
        return {"type": kind, **item}
    content = item.get("content")
    if content is None or isinstance(content, str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        extra: dict[str, Any] = {"annotations": []} if part == "output_text" else {}
        content = [{"type": part, "text": content or "", **extra}]
    return {"type": "message", "status": "completed", **item, "content": content}
